# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # What does a pipeline gain, and when does tensor parallelism do better?
#
# Constant times against the bound, uneven stages, and `pp: 4` against `tp: 4` on two kinds of links.

# %%
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(HERE.parent))

from common import figures_of, is_smoke, provenance, save, save_figure, variants
from matplotlib.figure import Figure

from testbed import load_scenario, simulate
from testbed.metrics.run import Run
from testbed.report.style import BLUE, GREEN, INK, MUTED, ORANGE, house_style

SCENARIO = HERE / "scenario.yaml"
LOOPS = {"blocking": "pipeline", "asynchronous": "pipeline_async"}
STAGE_NS = 10_000_000
SEATS = 4
"""Requests of a micro-batch, with constant times."""
EDGE_STEPS = 16
"""Decode steps at either end that are left out: the pipe fills and drains."""


# %%
def slots_per_s(run: Run, filled: int = 2) -> float:
    """Decode steps per second of the first stage, over whole rounds of its ``filled`` micro-batches."""
    steps = run.records.steps
    start = steps["start_ns"][(steps["mode"] == 2) & (steps["replica"] == 0)][EDGE_STEPS:-EDGE_STEPS]
    count = (len(start) - 1) // filled * filled
    return float(count / (start[count] - start[0]) * 1e9)


def bound(stages, filled, hop):
    """Most that a pipeline gains over one device with the same steps: P x (filled / P) / (1 + communication share).

    A step computes P x g and crosses P - 1 hops, each ``hop`` of g; the way back carries tokens only.
    """
    return filled / (1 + hop * (stages - 1) / stages)


def hypothesis(loop: str, stages: int, filled: int, hop: float, host: float) -> float:
    """Gain by hypothesis 2; ``hop`` and ``host`` over g."""
    return filled / (1 + hop + (host if loop == "blocking" else host / stages))


def law(loop: str, stages: int, filled: int, hop: float, host: float) -> float:
    """Gain by what was found: a round is a step's journey with one turn of the host; in the blocking loop, if longer,
    the devices' turns with a turn of the host for each micro-batch."""
    journey = stages + (stages - 1) * hop + host
    turns = stages + filled * host if loop == "blocking" else 0.0
    return filled * stages / max(journey, turns)


# %% [markdown]
# ## Constant times
#
# A stage takes 10 ms, so that the 20 us of a message between stages are 0.2 %.


# %%
def constant(stages: int, filled: int, hop: float, host: float, output_tokens: int) -> list[dict[str, object]]:
    """One row a loop: the gain over one device, beside the bound."""
    device = f"{{decode_ns: {stages * STAGE_NS}, activation_ns: {int(hop * STAGE_NS)}}}"
    runs = variants(
        SCENARIO,
        f"device={{constant: {device}}}",
        f"host={{constant: {{iteration_ns: {int(host * STAGE_NS)}}}}}",
        "engine.kv_tokens=1_000_000",
        f"engine.parallel.pp={stages}",
        f"engine.max_running_requests={SEATS * stages}",
        f"workload.count={SEATS * filled}",
        f"workload.lengths.output_tokens={output_tokens}",
    )
    where = {"part": "constant", "stages": stages, "filled": filled, "hop": hop, "host": host}
    return [
        {
            **where,
            "loop": loop,
            "gain": slots_per_s(run, filled) * stages * STAGE_NS / 1e9,
            "bound": bound(stages, filled, hop),
            "hypothesis": hypothesis(loop, stages, filled, hop, host),
            "law": law(loop, stages, filled, hop, host),
        }
        for loop, run in runs.items()
    ]


# %% [markdown]
# ## Uneven stages


# %%
def layers(first: int, whole: int = 32) -> list[dict[str, object]]:
    """One row a loop: Llama-3.1-8B in two stages that decode at saturation, ``first`` of its layers in the first."""
    split = f"engine.parallel.stage_layers=[{first}, {whole - first}]"
    rows = []
    for loop, run in variants(SCENARIO, split, "workload.count=256", "engine.max_running_requests=256").items():
        steps = run.records.steps
        decodes = steps["mode"] == 2
        slowest = max(float(np.mean(steps["gpu_ns"][decodes & (steps["replica"] == stage)])) for stage in (0, 1))
        where = {"part": "layers", "first_layers": first, "loop": loop, "slowest_stage_ms": slowest / 1e6}
        rows.append({**where, "slots_per_s": slots_per_s(run), **idle(run)})
    return rows


def idle(run: Run) -> dict[str, float]:
    """Share of the window in which a device does nothing, mean over devices, percent."""
    return {"idle_percent": 100 - figures_of(run, ("device_busy_percent",))["device_busy_percent"]}


# %% [markdown]
# ## Arrivals
#
# Which micro-batch does a request join? The one whose turn is next when it arrives, so it matters where a loop waits.


# %%
def arrivals(rate: float, count: int) -> list[dict[str, object]]:
    """One row a loop: Azure's chats on two stages, and the larger micro-batch's share of the rows (0.5: equal)."""
    chat = f"{{arrivals: {{kind: poisson, rate_per_s: {rate}}}, lengths: azure-conv-2023, count: {count}}}"
    rows = []
    for loop, run in variants(SCENARIO, f"workload={chat}").items():
        steps = run.records.steps
        size = steps["rows"][(steps["mode"] == 2) & (steps["replica"] == 0)]
        share = float(np.mean(np.maximum(size[1:], size[:-1]) / (size[1:] + size[:-1])))
        where = {"part": "arrivals", "rate_per_s": rate, "loop": loop, "larger_share": share}
        rows.append({**where, **figures_of(run, KEYS), **idle(run)})
    return rows


# %% [markdown]
# ## Against tensor parallelism

# %%
MACHINES = {"H100, NVLink": ("llama-3.1-70b", "h100-sxm"), "L40S, PCIe": ("qwen3-32b", "l40s")}
MIXES = {"long prompts": ((2000, 6000), (25, 75)), "long outputs": ((100, 300), (250, 750))}
DESIGNS = {
    "tensor": ("engine.parallel={tp: 4}", "engine.loop=overlap"),
    "pipeline blocking": ("engine.parallel={pp: 4}", "engine.loop=pipeline"),
    "pipeline": ("engine.parallel={pp: 4}", "engine.loop=pipeline_async"),
    "pipeline, chunks of 1,024": (
        "engine.parallel={pp: 4}",
        "engine.loop=pipeline_async",
        "engine.chunked_prefill_size=1024",
    ),
    "pipeline, all seats": (
        "engine.parallel={pp: 4}",
        "engine.loop=pipeline_async",
        "engine.max_running_requests=256",
    ),
}
"""Micro-batches have seats for a quarter of the users; with all seats for 64, at any number of users."""
ROUNDS = {4: 16, 8: 4, 32: 8, 256: 4}
"""Requests a user, by number of users; 8 are for a small run."""
KEYS = ("request_throughput", "mean_ttft_ms", "mean_tpot_ms", "p99_itl_ms", "mean_batch_size")


def against(machine: str, mix: str, users: int) -> list[dict[str, object]]:
    """One row a design: the same four devices and the same users."""
    model, device = MACHINES[machine]
    prompt, output = (f"{{kind: uniform, low: {low}, high: {high}}}" for low, high in MIXES[mix])
    rows = []
    for design, settings in DESIGNS.items():
        scenario = load_scenario(
            SCENARIO,
            (
                "compare=null",
                f"model={model}",
                f"device={device}",
                f"engine.max_running_requests={users}",
                *settings,
                f"workload.arrivals={{kind: closed_loop, users: {users}}}",
                f"workload.lengths={{prompt_tokens: {prompt}, output_tokens: {output}}}",
                f"workload.count={ROUNDS[users] * users}",
                "measure.until=last_arrival",
            ),
        ).scenario
        run = simulate(scenario)
        where = {"part": "machines", "machine": machine, "mix": mix, "users": users, "design": design}
        rows.append({**where, **figures_of(run, KEYS), **idle(run)})
    return rows


# %% [markdown]
# ## Figures of the study


# %%
def study(smoke: bool) -> tuple[pd.DataFrame, dict[str, float]]:
    """The table of all points, and the figures that ``expected.json`` holds."""
    pipes = ((2, 1), (2, 2), (4, 4)) if smoke else [(p, m) for p in (2, 4, 8) for m in range(1, p + 1)]
    hops = (0.0, 0.5) if smoke else (0.0, 0.1, 0.5)
    rows = [
        r for p, m in pipes for a, c in product(hops, (0.0, 0.1)) for r in constant(p, m, a, c, 60 if smoke else 200)
    ]
    rows += [row for first in ((16, 17, 20) if smoke else range(10, 23)) for row in layers(first)]
    rows += [row for rate in ((16,) if smoke else (4, 8, 12, 16)) for row in arrivals(rate, 60 if smoke else 300)]
    points = product(["L40S, PCIe"], MIXES, [8]) if smoke else product(MACHINES, MIXES, (4, 32, 256))
    rows += [row for point in points for row in against(*point)]
    table = pd.DataFrame(rows)
    parts = ("constant", "layers", "arrivals", "machines")
    fixed, split, arrived, machines = (table[table["part"] == part] for part in parts)
    free = fixed[(fixed["host"] == 0) & (fixed["loop"] == "asynchronous")]
    full = fixed[(fixed["filled"] == fixed["stages"]) & (fixed["host"] > 0)].set_index("loop")
    paced = split["slots_per_s"] * split["slowest_stage_ms"] / 1e3
    at = split[split["loop"] == "asynchronous"].set_index("first_layers")["slots_per_s"]
    found = {
        "gain_over_bound_at_most": float((fixed["gain"] / fixed["bound"]).max()),
        "free_of_host_bound_at_least": float((free["gain"] / free["bound"]).min()),
        **{f"{loop}_off_hypothesis_percent": off_percent(full.loc[loop], "hypothesis") for loop in LOOPS},
        "off_law_percent": off_percent(fixed, "law"),
        "pace_of_slowest_stage_at_least": float(paced[split["loop"] == "asynchronous"].min()),
        "split_17_over_16": at[17] / at[16],
        **{
            f"{loop}_larger_share_at_16": float(rows.loc[rows["rate_per_s"] == 16, "larger_share"].iloc[0])
            for loop, rows in arrived.groupby("loop", sort=False)
        },
    }
    return table, found | against_tensor(machines)


def off_percent(rows: pd.DataFrame, formula: str) -> float:
    """How far the gain lies from a formula's, at most, in percent."""
    return float((rows["gain"] / rows[formula] - 1).abs().max() * 100)


def against_tensor(machines: pd.DataFrame) -> dict[str, float]:
    """Throughput and TPOT of the asynchronous pipeline over those of tensor parallelism, by machine, mix and users."""
    at = machines.set_index(["machine", "mix", "users", "design"])[list(KEYS)]
    found = {}
    for machine, mix, users in at.index.droplevel("design").unique():
        ratio = at.loc[(machine, mix, users, "pipeline")] / at.loc[(machine, mix, users, "tensor")]
        name = f"{machine.split(',')[0]}_{mix.replace(' ', '_')}_{users:.0f}".lower()
        found |= {f"{name}_throughput": ratio["request_throughput"], f"{name}_tpot": ratio["mean_tpot_ms"]}
    return found


# %% [markdown]
# ## The figure


# %%
def draw(table: pd.DataFrame) -> Figure:
    """Gain over filled micro-batches with the bound; slots over the split; the pipeline over tensor parallelism."""
    with house_style("pipeline"):
        figure = Figure(figsize=(11.4, 4.2), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        _draw_gain(left, table[(table["part"] == "constant") & (table["stages"] == 8)])
        _draw_layers(middle, table[table["part"] == "layers"])
        _draw_machines(right, table[table["part"] == "machines"])
    return figure


def _draw_gain(axes, rows: pd.DataFrame) -> None:
    for hop, style in zip((0.0, 0.5), ("-", "--"), strict=True):
        filled = np.array([1, 8])
        axes.plot(filled, bound(8, filled, hop), style, color=MUTED, label=f"bound, hop {hop:.0%} of a stage")
    for (loop, colour), hop in product(zip(LOOPS, (ORANGE, BLUE), strict=True), (0.0, 0.5)):
        at = rows[(rows["loop"] == loop) & (rows["hop"] == hop) & (rows["host"] == 0.1)]
        axes.plot(at["filled"], at["gain"], "o" if hop == 0 else "s", color=colour, markersize=4)
        if hop == 0:
            axes.plot([], [], "o", color=colour, markersize=4, label=f"{loop}, host 10 %")
    axes.set(xlabel="micro-batches with requests, of 8", ylabel="gain over one device")
    axes.set_title("8 stages, constant times")
    axes.legend()


def _draw_layers(axes, rows: pd.DataFrame) -> None:
    for (loop, at), colour in zip(rows.groupby("loop", sort=False), (ORANGE, BLUE), strict=True):
        axes.plot(at["first_layers"], at["slots_per_s"], "o", color=colour, label=loop, markersize=4)
    one = rows[rows["loop"] == "asynchronous"]
    axes.plot(one["first_layers"], 1e3 / one["slowest_stage_ms"], color=MUTED, label="1 / slowest stage")
    axes.set(xlabel="layers of the first stage, of 32", ylabel="decode steps per second")
    axes.set_title("Llama-3.1-8B, 2 H100")
    axes.legend()


def _draw_machines(axes, rows: pd.DataFrame) -> None:
    at = rows.set_index(["design", "machine", "mix", "users"]).sort_index()["request_throughput"]
    for (machine, mix), colour in zip(product(MACHINES, MIXES), (BLUE, GREEN, ORANGE, INK), strict=True):
        for design, style in (("pipeline", "o-"), ("pipeline, chunks of 1,024", "o--")):
            line = at.loc[(design, machine, mix)] / at.loc[("tensor", machine, mix)]
            label = f"{machine.split(',')[0]}, {mix}" if design == "pipeline" else None
            axes.plot(line.index, line, style, color=colour, label=label, markersize=4)
    axes.plot([], [], "--", color=MUTED, label="chunks of 1,024")
    axes.axhline(1, color=MUTED, linewidth=0.8)
    axes.set(xscale="log", xlabel="users", ylabel="throughput, pp 4 over tp 4", ylim=(0, None))
    axes.set_xticks((4, 32, 256), labels=("4", "32", "256"))
    axes.minorticks_off()
    axes.set_title("Against tensor parallelism")
    axes.legend(loc="upper left")


# %%
if __name__ == "__main__":
    table, found = study(smoke=is_smoke())
    devices = "constant times; modelled h100-sxm, l40s"
    save(HERE, table, found, provenance(HERE, 0, devices, "constant times, sglang-0.5"))
    if not is_smoke():
        save_figure(HERE, "pipeline", draw(table))
