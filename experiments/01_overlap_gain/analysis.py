# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # What does the overlapped loop gain?
#
# The normal loop takes c + g for a decode step, host time and device time one after the other; the overlapped loop
# takes the longer of the two. Its gain in steps per second is (c + g) / max(c, g) - 1: nothing where one of them
# vanishes, everything (100 %) where they are equal. This notebook sweeps c and g, then puts the hosts of known engines
# and two models on the map.

# %%
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(HERE.parent))

from common import is_smoke, provenance, save, save_figure
from matplotlib import rc_context
from matplotlib.figure import Figure

from testbed import execute, load_scenario, simulate
from testbed.costs import build_cost_model, build_host_profile, host_presets
from testbed.metrics.run import Run
from testbed.ports import Stage
from testbed.report.style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RED, house_style

SCENARIO = HERE / "scenario.yaml"
MODELS = ("llama-3.1-8b", "qwen3-0.6b")
BATCHES = (1, 32, 256)
CONTEXT = 512
HOSTS = [name for name in host_presets() if name != "none"]
MS = 1_000_000


# %%
def formula(c, g, sampling=0.0):
    """Gain in steps per second of a loop that takes max(c, g) a step over one that takes c + g.

    ``sampling`` is the part of c that comes after the launch: the normal loop issues it while the device works already,
    so that part is hidden without any overlap.
    """
    return (c - sampling + np.maximum(g, sampling)) / np.maximum(c, g) - 1


EDGE_STEPS = 4
"""Decode steps at either end that are left out: the pipe fills and drains."""


def steps_per_s(run: Run) -> float:
    """Decode steps per second at saturation: from start to start on the device, without the first and last few."""
    steps = run.records.steps
    start = steps["start_ns"][steps["mode"] == 2][EDGE_STEPS:-EDGE_STEPS]
    return float((len(start) - 1) / (start[-1] - start[0]) * 1e9)


def pair(overrides: list[str], runner=simulate) -> dict[str, Run]:
    """The same scenario under both loops."""
    return {
        loop: runner(load_scenario(SCENARIO, [*overrides, f"engine.loop={loop}"]).scenario)
        for loop in ("normal", "overlap")
    }


def measured_gain(runs: dict[str, Run]) -> float:
    return steps_per_s(runs["overlap"]) / steps_per_s(runs["normal"]) - 1


# %% [markdown]
# ## The sweep, in virtual time


# %%
def sweep(times_ms, outputs: int) -> pd.DataFrame:
    """Every c with every g (ms)."""
    rows = []
    for c, g in product(times_ms, times_ms):
        runs = pair(
            [
                f"host={{constant: {{iteration_ns: {round(c * MS)}}}}}",
                f"device={{constant: {{prefill_ns: {MS}, decode_ns: {round(g * MS)}}}}}",
                f"workload.lengths.output_tokens={outputs}",
            ]
        )
        rows.append({"kind": "sweep", "c_ms": c, "g_ms": g, "formula": formula(c, g), "simulated": measured_gain(runs)})
    return pd.DataFrame(rows)


# %% [markdown]
# ## Hosts of known engines, two models, three batch sizes
#
# c is the sum of the host profile's stages for a decode step and the launch; g is the cost model's decode step on an
# H100 SXM at a mean context of 512 tokens. The runs go through contexts 512 - n/2 to 512 + n/2. A CUDA graph holds the
# step at every batch size here; by default (as SGLang) graphs end at 160 rows on this device, and an eager launch would
# add 2.8 ms to c at 256 rows.


# %%
def host_and_device_ms(scenario, batch: int) -> tuple[float, float, float]:
    """(c, g, the part of c after the launch) of a decode step, ms."""
    host = build_host_profile(scenario)
    cost = build_cost_model(scenario).price_decode(batch, batch * CONTEXT, CONTEXT)
    stages = (stage for stage in Stage if stage is not Stage.FINISH)  # nothing ends in such a step
    c_ns = sum(host.price(stage, batch) for stage in stages) + host.launch_ns(cost.kernels, cost.graph)
    return c_ns / MS, cost.gpu_ns / MS, host.price(Stage.SAMPLE, batch) / MS


def engines(hosts, models, batches, outputs: int) -> pd.DataFrame:
    """The gain of every host, model and batch size: by the formula, by the formula for the exposed c, and simulated."""
    rows = []
    for host, model, batch in product(hosts, models, batches):
        overrides = [
            f"model={model}",
            "device=h100-sxm",
            f"host={host}",
            f"workload.count={batch}",
            f"workload.lengths={{prompt_tokens: {CONTEXT - outputs // 2}, output_tokens: {outputs}}}",
            "engine.cuda_graph_max_bs=256",
            "engine.max_prefill_tokens=200000",
            "engine.chunked_prefill_size=-1",
        ]
        c, g, sampling = host_and_device_ms(load_scenario(SCENARIO, overrides).scenario, batch)
        gains = {
            "formula": formula(c, g),
            "exposed": formula(c, g, sampling),
            "simulated": measured_gain(pair(overrides)),
        }
        rows.append({"kind": "engine", "host": host, "model": model, "batch": batch, "c_ms": c, "g_ms": g, **gains})
    return pd.DataFrame(rows)


# %% [markdown]
# ## The same on the wall clock
#
# Paced runs take c and g for real: the device is a promise to be ready at a time, the host spins until its stage has
# taken c. What this machine's Python and its neighbours add comes on top, so the best of a few repeats counts.


# %%
def host_file(folder: str, c_ms: float) -> str:
    """A host profile that takes c in every iteration."""
    path = Path(folder) / f"host_{c_ms:g}ms.yaml"
    path.write_text(
        f"name: {c_ms:g} ms an iteration\nstages:\n  schedule:\n    fixed_us: [{c_ms * 1000:g}, guessed, swept]\n"
        "launch: {}\n",
        encoding="utf-8",
    )
    return str(path)


def paced_run(c_ms: float, g_ms: float, loop: str, outputs: int) -> Run:
    """One run on the wall clock."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"engine.loop={loop}",
            f"device={{constant: {{prefill_ns: {MS}, decode_ns: {round(g_ms * MS)}}}}}",
            f"host_inject={host_file(folder, c_ms)}",
            f"workload.lengths.output_tokens={outputs}",
        ]
        return execute(load_scenario(SCENARIO, overrides).scenario, paced=True)


def host_ms(run: Run) -> np.ndarray:
    """What each decode step really took on the host, waiting apart: the sum of its spans, float64 [steps]."""
    spans, steps = run.records.spans, run.records.steps
    host = spans["lane"] == 0
    taken = np.bincount(spans["step"][host], (spans["end_ns"] - spans["begin_ns"])[host], len(steps["step"]))
    return taken[steps["step"][steps["mode"] == 2]][EDGE_STEPS:-EDGE_STEPS] / MS


def paced(points, outputs: int, repeats: int) -> pd.DataFrame:
    """Best of ``repeats`` for every (c, g); ``noise`` is the spread of the repeats, worst over best, of either loop.

    ``formula`` is for the c that was asked for, ``measured`` for what the spans of the best runs say each step took
    on the host: more where others compete for its core.
    """
    rows = []
    for c, g in points:
        runs: dict[str, list[tuple[float, np.ndarray]]] = {"normal": [], "overlap": []}
        for _ in range(repeats):  # in turns, so that both meet the same neighbours
            for loop, found in runs.items():
                run = paced_run(c, g, loop, outputs)
                found.append((steps_per_s(run), host_ms(run)))
        best = {loop: max(found, key=lambda each: each[0]) for loop, found in runs.items()}
        (normal, c_normal), (overlap, c_overlap) = best.values()
        noise = max(1 - min(rate for rate, _ in runs[loop]) / best[loop][0] for loop in runs)
        measured = (c_normal + g).mean() / np.maximum(c_overlap, g).mean() - 1
        taken = {"c_normal_ms": c_normal.mean(), "c_overlap_ms": c_overlap.mean()}
        gains = {"formula": formula(c, g), "measured": measured, "paced": overlap / normal - 1}
        rows.append({"kind": "paced", "c_ms": c, "g_ms": g, **taken, **gains, "noise": noise})
    return pd.DataFrame(rows)


def off_percent(table: pd.DataFrame, found: str, wanted: str = "formula") -> float:
    """How far the speed-up 1 + gain lies from the formula's, at most, in percent."""
    return float(((1 + table[found]) / (1 + table[wanted]) - 1).abs().max() * 100)


# %% [markdown]
# ## Figures of the study


# %%
def study(smoke: bool) -> tuple[pd.DataFrame, dict[str, float]]:
    """The table of all points in virtual time, and the figures that ``expected.json`` holds."""
    times = (0.5, 2.0, 8.0) if smoke else (0.25, 0.5, 1, 2, 4, 8, 16)
    swept = sweep(times, 100 if smoke else 400)
    known = engines(HOSTS, MODELS, (1, 32) if smoke else BATCHES, 40 if smoke else 100)
    by_name = known.set_index(["host", "model", "batch"])["simulated"] * 100
    figures = {
        "sweep_off_percent": off_percent(swept, "simulated"),
        "engines_off_percent": off_percent(known, "simulated", "exposed"),
        "hidden_by_the_normal_loop_percent": off_percent(known, "simulated"),
        "highest_gain_percent": float(max(swept["simulated"].max(), known["simulated"].max()) * 100),
        "sglang_llama_8b_1_percent": by_name["sglang-0.5", "llama-3.1-8b", 1],
        "sglang_qwen_06b_1_percent": by_name["sglang-0.5", "qwen3-0.6b", 1],
        "vllm_v1_qwen_06b_1_percent": by_name["vllm-v1", "qwen3-0.6b", 1],
    }
    if not smoke:
        figures["engines_within_20_to_40_percent"] = int(known["simulated"].between(0.2, 0.4).sum())
    return pd.concat([swept, known], ignore_index=True), figures


# %% [markdown]
# ## The map

# %%
COLOURS = dict(zip(HOSTS, (BLUE, GREEN, PURPLE, ORANGE, RED), strict=False))
MARKERS = {"llama-3.1-8b": "o", "qwen3-0.6b": "^"}
SIZES = {1: 40, 32: 85, 256: 160}
HATCH = {"hatch.color": MUTED, "hatch.linewidth": 0.5}


def draw(known: pd.DataFrame) -> Figure:
    """Gain over g and c, the band of 20 to 40 % hatched, engines marked."""
    with house_style("overlap gain"), rc_context(HATCH):
        figure = Figure(figsize=(9.6, 6.2), layout="constrained")
        axes = figure.add_subplot()
        g, c = np.meshgrid(np.geomspace(0.8, 30, 400), np.geomspace(0.1, 40, 400))
        gain = formula(c, g) * 100
        filled = axes.contourf(g, c, gain, levels=np.arange(0, 101, 10), cmap="Greys", alpha=0.5)
        axes.contourf(g, c, gain, levels=[20, 40], colors=["none"], hatches=["///"])
        axes.contour(g, c, gain, levels=[20, 40], colors=[MUTED], linewidths=0.9)
        for row in known.itertuples():
            axes.scatter(
                row.g_ms,
                row.c_ms,
                s=SIZES[row.batch],
                marker=MARKERS[row.model],
                color=COLOURS[row.host],
                edgecolor="white",
                linewidth=0.8,
                zorder=3,
            )
        axes.set(xscale="log", yscale="log", xlim=(0.8, 30), ylim=(0.1, 40))
        axes.set_xlabel("g: device time of a decode step, ms")
        axes.set_ylabel("c: host time of a decode step, ms")
        axes.set_title("Gain of the overlapped loop, (c + g) / max(c, g) - 1; hatched: 20 to 40 %")
        for at, words in (((1.05, 0.29), "20 to 40 %"), ((1.05, 3.6), "20 to 40 %"), ((1.05, 1.05), "100 %")):
            axes.annotate(words, at, rotation=36, ha="center", va="center", fontsize=9, fontweight="bold", color=INK)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        _legend(figure, axes)
        figure.colorbar(filled, ax=axes, label="gain, %", shrink=0.75)
    return figure


def _legend(figure: Figure, axes) -> None:
    handles = [axes.scatter([], [], s=60, color=COLOURS[host], label=f"host {host}") for host in HOSTS]
    handles += [axes.scatter([], [], s=60, marker=MARKERS[model], color=INK, label=model) for model in MODELS]
    handles += [axes.scatter([], [], s=SIZES[batch], color=MUTED, label=f"batch {batch}") for batch in BATCHES]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)


# %%
if __name__ == "__main__":
    table, found = study(smoke=is_smoke())
    save(HERE, table, found, provenance(HERE, 0, "constant times; modelled h100-sxm", ", ".join(HOSTS)))
    save_figure(HERE, "map", draw(table[table["kind"] == "engine"]))
