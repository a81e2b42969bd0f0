# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Which design of overlap?
#
# Three ways to launch a batch before the result of the one before is processed: in one thread with streams, in a second
# thread under the same interpreter lock, and with streams but not between two consecutive prefills. First decode steps
# at saturation, then bursts of prompts and arrivals.

# %%
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(HERE.parent))

from common import figures_of, is_smoke, provenance, save, save_figure, variants
from matplotlib.figure import Figure

from testbed.metrics.run import Run
from testbed.report.style import BLUE, GREEN, INK, MUTED, ORANGE, house_style

SCENARIO = HERE / "scenario.yaml"
HOSTS = ("testbed", "sglang-0.5")
MODELS = ("llama-3.1-8b", "qwen3-0.6b")
MS = 1_000_000
WAKES_MS = (0.0, 0.015, 0.1)
STEP_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)
RATES = (10, 20, 40)


# %%
def formula(c, g, wake=0.0):
    """Gain in steps per second over c + g a step: the host's share is c and two wakes of a thread."""
    return (c + g) / np.maximum(c + 2 * wake, g) - 1


EDGE_STEPS = 4
"""Decode steps at either end that are left out: the pipe fills and drains."""


def steps_per_s(run: Run) -> float:
    """Decode steps per second at saturation: from start to start on the device."""
    steps = run.records.steps
    start = steps["start_ns"][steps["mode"] == 2][EDGE_STEPS:-EDGE_STEPS]
    return float((len(start) - 1) / (start[-1] - start[0]) * 1e9)


def gains(runs: dict[str, Run]) -> dict[str, float]:
    """Of each design over the normal loop."""
    normal = steps_per_s(runs["normal"])
    return {name: steps_per_s(run) / normal - 1 for name, run in runs.items() if name != "normal"}


def host_file(folder: str, c_ms: float, wake_ms: float) -> str:
    """A host profile that takes c in every iteration, and w to wake a thread."""
    path = Path(folder) / f"host_{c_ms:g}_{wake_ms:g}.yaml"
    path.write_text(
        f"name: {c_ms:g} ms an iteration, {wake_ms:g} ms a wake\n"
        f"stages:\n  schedule:\n    fixed_us: [{c_ms * 1000:g}, guessed, swept]\n"
        f"launch: {{}}\nthreads:\n  wake_us: [{wake_ms * 1000:g}, guessed, swept]\n",
        encoding="utf-8",
    )
    return str(path)


# %% [markdown]
# ## Constant times, in virtual time
#
# c and g of a decode step, and w of waking a thread: none, what this machine takes, and what SGLang's second thread is
# said to have cost (100 to 300 us a step, two wakes).


# %%
def sweep(times_ms, wakes_ms, outputs: int) -> pd.DataFrame:
    """Every c with every g and w (ms)."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for c, g, wake in product(times_ms, times_ms, wakes_ms):
            runs = variants(
                SCENARIO,
                f"host={host_file(folder, c, wake)}",
                f"device={{constant: {{prefill_ns: {MS}, decode_ns: {round(g * MS)}}}}}",
                "engine.kv_tokens=400000",
                f"workload.lengths.output_tokens={outputs}",
            )
            wanted = {"streams_formula": formula(c, g), "thread_formula": formula(c, g, wake)}
            rows.append({"kind": "sweep", "c_ms": c, "g_ms": g, "wake_ms": wake, **wanted, **gains(runs)})
    return pd.DataFrame(rows)


# %% [markdown]
# ## Hosts of known engines


# %%
def engines(hosts, models, batches, outputs: int) -> pd.DataFrame:
    """Gains of decode steps at a mean context of 512 tokens, by host, model and batch size."""
    rows = []
    for host, model, batch in product(hosts, models, batches):
        runs = variants(
            SCENARIO,
            f"model={model}",
            f"host={host}",
            f"workload.count={batch}",
            f"workload.lengths={{prompt_tokens: {512 - outputs // 2}, output_tokens: {outputs}}}",
        )
        rows.append({"kind": "engine", "host": host, "model": model, "batch": batch, **gains(runs)})
    return pd.DataFrame(rows)


# %% [markdown]
# ## Bursts of prompts: first tokens against throughput
#
# Many requests at once, of one token each, so that prefill follows prefill; what a prefill holds is swept.

# %%
KEYS = ("mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "request_throughput")


def bursts(hosts, models, step_tokens, count: int) -> pd.DataFrame:
    """One row a host, model, size of a prefill and loop."""
    rows = []
    for host, model, tokens in product(hosts, models, step_tokens):
        overrides = (
            f"host={host}",
            f"model={model}",
            f"workload.count={count}",
            "workload.lengths={prompt_tokens: 128, output_tokens: 1}",
            f"engine.chunked_prefill_size={tokens}",
            f"engine.max_prefill_tokens={tokens}",
        )
        for loop, run in variants(SCENARIO, *overrides).items():
            row = {"kind": "burst", "host": host, "model": model, "step_tokens": tokens, "loop": loop}
            rows.append({**row, **figures_of(run, KEYS)})
    return pd.DataFrame(rows)


# %% [markdown]
# ## Arrivals


# %%
def arriving(models, rates, count: int) -> pd.DataFrame:
    """Azure's chat lengths under SGLang's host: one row a model, rate and loop."""
    rows = []
    for model, rate in product(models, rates):
        overrides = (
            f"model={model}",
            f"workload={{arrivals: {{kind: poisson, rate_per_s: {rate}}}, lengths: azure-conv-2023, count: {count}}}",
        )
        for loop, run in variants(SCENARIO, *overrides).items():
            row = {"kind": "arrivals", "host": "sglang-0.5", "model": model, "rate_per_s": rate, "loop": loop}
            rows.append({**row, **figures_of(run, KEYS)})
    return pd.DataFrame(rows)


# %% [markdown]
# ## Figures of the study


# %%
def study(smoke: bool) -> tuple[pd.DataFrame, dict[str, float]]:
    """The table of all points, and the figures that ``expected.json`` holds."""
    times, wakes = ((0.125, 0.5, 2.0), (0.0, 0.1)) if smoke else ((0.125, 0.25, 0.5, 1, 2, 4, 8), WAKES_MS)
    swept = sweep(times, wakes, 100 if smoke else 400)
    known = engines(HOSTS, MODELS, (1,) if smoke else (1, 32, 128), 40 if smoke else 100)
    prefills, hosts = ((256, 1024), ("sglang-0.5",)) if smoke else (STEP_TOKENS, HOSTS)
    burst = bursts(hosts, MODELS, prefills, 64 if smoke else 512)
    arrived = arriving(("qwen3-0.6b",) if smoke else MODELS, (20,) if smoke else RATES, 60 if smoke else 2000)
    table = pd.concat([swept, known, burst, arrived], ignore_index=True)
    gain = known.set_index(["host", "model", "batch"]) * 100
    change = changes(burst, "step_tokens").loc["sglang-0.5"]
    return table, {
        "streams_off_percent": off_percent(swept, "streams"),
        "thread_off_percent": off_percent(swept, "thread"),
        "thread_worst_percent": float(swept["thread"].min() * 100),
        "sglang_qwen_06b_1_streams_percent": gain.loc[("sglang-0.5", "qwen3-0.6b", 1), "streams"],
        "sglang_qwen_06b_1_thread_percent": gain.loc[("sglang-0.5", "qwen3-0.6b", 1), "thread"],
        "sglang_llama_8b_1_thread_percent": gain.loc[("sglang-0.5", "llama-3.1-8b", 1), "thread"],
        "suspended_decodes_off_percent": float((swept["suspended"] - swept["streams"]).abs().max() * 100),
    } | {
        f"burst_{name}_{tokens}_{key}": change.loc[(model, tokens), key]
        for name, model in (("llama_8b", "llama-3.1-8b"), ("qwen_06b", "qwen3-0.6b"))
        for tokens in (256, 1024)
        for key in ("ttft_ms", "throughput_percent")
    }


def off_percent(swept: pd.DataFrame, design: str) -> float:
    """How far the speed-up 1 + gain lies from the formula's, at most, in percent."""
    return float(((1 + swept[design]) / (1 + swept[f"{design}_formula"]) - 1).abs().max() * 100)


def changes(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """What suspending changes: mean TTFT in ms, requests per second in percent; of streams in both cases."""
    rows = table.pivot_table(index=["host", "model", by], columns="loop", values=["mean_ttft_ms", "request_throughput"])
    ttft, rate = rows["mean_ttft_ms"], rows["request_throughput"]
    percent = (rate["suspended"] / rate["streams"] - 1) * 100
    return pd.DataFrame({"ttft_ms": ttft["suspended"] - ttft["streams"], "throughput_percent": percent})


# %% [markdown]
# ## The figure

# %%
COLOURS = {"streams": BLUE, "thread": ORANGE}


def draw(table: pd.DataFrame) -> Figure:
    """Left: gain of both designs over c / g. Right: what suspending changes, by the size of a prefill."""
    with house_style("overlap designs"):
        figure = Figure(figsize=(9.6, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_gain(left, table[table["kind"] == "sweep"])
        _draw_bursts(right, changes(table[table["kind"] == "burst"], "step_tokens"))
    return figure


def _draw_gain(axes, swept: pd.DataFrame) -> None:
    at = swept[swept["g_ms"] == 1.0]
    for wake, style in zip(WAKES_MS, ("-", "--", ":"), strict=True):
        rows = at[at["wake_ms"] == wake].sort_values("c_ms")
        label = "streams; thread, 0 us" if wake == 0 else f"thread, {wake * 1000:g} us a wake"
        colour = COLOURS["streams" if wake == 0 else "thread"]
        c = np.geomspace(rows["c_ms"].min(), rows["c_ms"].max(), 200)
        axes.plot(c, formula(c, 1.0, wake) * 100, style, color=colour, label=label)
        axes.scatter(rows["c_ms"], rows["thread"] * 100, color=colour, s=18, zorder=3)
    axes.set(xlabel="c / g of a decode step of 1 ms", ylabel="gain over the normal loop, %", ylim=(0, 105))
    axes.set_title("Gain in decode steps per second")
    _log_ticks(axes, (0.125, 0.25, 0.5, 1, 2, 4, 8))
    axes.legend(loc="upper left", fontsize=8.5)


def _draw_bursts(axes, change: pd.DataFrame) -> None:
    for model, colour in zip(MODELS, (GREEN, INK), strict=True):
        rows = change.loc["sglang-0.5"].loc[model]
        axes.plot(rows.index, rows["ttft_ms"], "o-", color=colour, label=model, markersize=4)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.set(xlabel="tokens of a prefill", ylabel="mean TTFT, ms more than streams")
    axes.set_title("Suspended between prefills, SGLang's host")
    _log_ticks(axes, STEP_TOKENS)
    axes.legend()


def _log_ticks(axes, places) -> None:
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.set_xticks([], minor=True)


# %%
if __name__ == "__main__":
    table, found = study(smoke=is_smoke())
    hosts = f"constant times, {', '.join(HOSTS)}"
    save(HERE, table, found, provenance(HERE, 0, "constant times; modelled h100-sxm", hosts))
    if not is_smoke():  # a small one has not all points
        save_figure(HERE, "designs", draw(table))
