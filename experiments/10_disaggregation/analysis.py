# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # When is it worth to prefill and to decode on different devices?
#
# Goodput a device of prefill and decode engines against unified replicas on as many devices, from prompts alone to
# outputs alone, and over the links between them.

# %%
import sys
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(HERE.parent))

from common import is_smoke, provenance, save, save_figure
from matplotlib.figure import Figure
from scipy import stats

from testbed import load_scenario, simulate
from testbed.metrics.run import Run
from testbed.report.style import BLUE, GREEN, MUTED, ORANGE, RED, house_style

SCENARIO = HERE / "scenario.yaml"
SEEDS = (0, 1, 2)
TTFT_MS = 1000.0
TPOT_MS = {"loose": 20.0, "strict": 12.0}
ATTAINED = 0.9
"""Share of the requests that must keep both limits."""
MIXES = {
    (4000, 50): (2.0, 50),
    (2000, 100): (4.0, 60),
    (1000, 250): (7.0, 100),
    (500, 500): (7.0, 200),
    (250, 1000): (5.0, 250),
}
"""Prompt and output tokens: the lowest rate that is tried (requests/s), and requests, both a device."""
STEP = 1.35
MOST_STEPS = 6
LINKS_GB_PER_S = (1.25, 6.25, 12.5, 50.0, 450.0)
LINK_GB_PER_S = 50.0
LINK_MIXES = ((4000, 50), (1000, 250))


# %%
def unified(replicas: int) -> tuple[str, ...]:
    """Settings of that many devices that do both."""
    return (f"engine.parallel={{dp: {replicas}}}", "routing.policy=shortest_queue")


def split(prefill: int, decode: int, gb_per_s: float = LINK_GB_PER_S) -> tuple[str, ...]:
    """Settings of devices that do one of the two."""
    return (f"disaggregation={{prefill: {prefill}, decode: {decode}, link: {{gb_per_s: {gb_per_s}}}}}",)


DESIGNS = {
    "2 unified": (2, unified(2)),
    "1:1": (2, split(1, 1)),
    "3 unified": (3, unified(3)),
    "2:1": (3, split(2, 1)),
    "1:2": (3, split(1, 2)),
}
"""Devices and settings; prefill:decode."""


# %% [markdown]
# ## Goodput
#
# Rates go up step by step on the same requests; between the last that keeps the limits and the first that does not, the
# share of requests that keep them is taken as a straight line.


# %%
def attained(run: Run) -> dict[str, float]:
    """Share of the requests that keep both limits, by the limit of TPOT."""
    table = run.requests
    in_time = table["ttft_ms"] <= TTFT_MS
    return {name: float((in_time & (table["tpot_ms"] <= limit)).mean()) for name, limit in TPOT_MS.items()}


def goodput(mix: tuple[int, int], devices: int, settings: tuple[str, ...], seed: int) -> dict[str, float]:
    """Highest rate a device (requests/s) at which 90 % keep the limits, by the limit of TPOT.

    0 where not even the lowest keeps them, and the highest where all do.
    """
    prompt, output = mix
    lowest, requests = MIXES[mix]
    rate, before = lowest, dict.fromkeys(TPOT_MS, 1.0)
    found: dict[str, float] = {}
    for _ in range(MOST_STEPS):
        scenario = load_scenario(
            SCENARIO,
            (
                "compare=null",
                *settings,
                f"workload.arrivals.rate_per_s={rate * devices}",
                f"workload.lengths={{prompt_tokens: {spread(prompt)}, output_tokens: {spread(output)}}}",
                f"workload.count={requests * devices}",
                f"seed={seed}",
            ),
        ).scenario
        share = attained(simulate(scenario))
        for name in TPOT_MS.keys() - found.keys():
            if share[name] < ATTAINED:
                part = (before[name] - ATTAINED) / (before[name] - share[name])
                found[name] = rate / STEP * STEP**part if rate > lowest else 0.0
        if len(found) == len(TPOT_MS):
            break
        rate, before = rate * STEP, share
    return {name: found.get(name, rate / STEP) for name in TPOT_MS}


def spread(mean: int) -> str:
    """From half to one and a half of the mean."""
    return f"{{kind: uniform, low: {mean // 2}, high: {mean * 3 // 2}}}"


# %% [markdown]
# ## Figures of the study


# %%
def study(smoke: bool) -> tuple[pd.DataFrame, dict[str, float]]:
    """One row a mix, design, link and seed, and the figures that ``expected.json`` holds."""
    designs = dict(list(DESIGNS.items())[:2]) if smoke else DESIGNS
    points = [(mix, name, LINK_GB_PER_S, *design) for mix in MIXES for name, design in designs.items()]
    slow = LINKS_GB_PER_S[:1] if smoke else [speed for speed in LINKS_GB_PER_S if speed != LINK_GB_PER_S]
    points += [(mix, "1:1", speed, 2, split(1, 1, speed)) for mix in LINK_MIXES for speed in slow]
    rows = []
    for mix, name, speed, devices, settings in points[:2] + points[-1:] if smoke else points:
        for seed in SEEDS[:1] if smoke else SEEDS:
            where = {"prompt": mix[0], "output": mix[1], "design": name, "gb_per_s": speed, "seed": seed}
            rows.append({**where, **goodput(mix, devices, settings, seed)})
    table = pd.DataFrame(rows)
    means = table.groupby(["prompt", "output", "design", "gb_per_s"], sort=False)[list(TPOT_MS)].mean()
    return table, {
        f"{prompt}_{output}_{design}_{speed:g}_{name}".replace(" ", "_").replace(":", "_"): float(row[name])
        for (prompt, output, design, speed), row in means.iterrows()
        for name in TPOT_MS
    }


# %% [markdown]
# ## The figure


# %%
UNIFIED = {"1:1": "2 unified", "2:1": "3 unified", "1:2": "3 unified"}
"""On as many devices."""
COLOURS = {"1:1": ORANGE, "2:1": GREEN, "1:2": RED}


def over_unified(table: pd.DataFrame, design: str, mix: tuple[int, int], limit: str) -> tuple[float, float, float]:
    """Goodput over that of unified replicas: mean, lower and upper end of its 95 % interval over seeds.

    Seed by seed in logarithms, by Student's t. Where not even the lowest rate kept the limits, that rate stands in.
    """
    rows = table[(table["prompt"] == mix[0]) & (table["output"] == mix[1]) & (table["gb_per_s"] == LINK_GB_PER_S)]
    found = rows.set_index(["design", "seed"])[limit].clip(lower=MIXES[mix][0])
    logs = np.log(found[design] / found[UNIFIED[design]])
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    mean, low, high = np.exp([logs.mean(), logs.mean() - half, logs.mean() + half])
    return float(mean), float(low), float(high)


def draw(table: pd.DataFrame) -> Figure:
    """Goodput over that of unified replicas, by mix; and goodput by link."""
    with house_style("disaggregation"):
        figure = Figure(figsize=(11.4, 4.2), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        _draw_mixes(left, table, "loose")
        _draw_mixes(middle, table, "strict")
        _draw_links(right, table)
    return figure


def _draw_mixes(axes, table: pd.DataFrame, limit: str) -> None:
    places = np.arange(len(MIXES))
    for number, (design, colour) in enumerate(COLOURS.items()):
        mean, low, high = np.array([over_unified(table, design, mix, limit) for mix in MIXES]).T
        label = f"{design} over {UNIFIED[design]}"
        at = places + (number - 1) * 0.2
        axes.errorbar(at, mean, (mean - low, high - mean), fmt="o", color=colour, label=label, capsize=3, markersize=5)
    axes.axhline(1, color=MUTED, linewidth=0.8)
    axes.set_xticks(places, [f"{prompt} +\n{output}" for prompt, output in MIXES])
    axes.set(
        xlabel="prompt + output tokens", ylabel="goodput over that of unified replicas", yscale="log", ylim=(0.2, 6)
    )
    axes.set_yticks((0.25, 0.5, 1, 2, 4), labels=("0.25", "0.5", "1", "2", "4"))
    axes.minorticks_off()
    axes.set_title(f"TPOT at most {TPOT_MS[limit]:g} ms")
    axes.legend(loc="upper right")


def _draw_links(axes, table: pd.DataFrame) -> None:
    means = table.groupby(["prompt", "output", "design", "gb_per_s"])["strict"].mean()
    for mix, line in zip(LINK_MIXES, ("-", "--"), strict=True):
        split_up = means.loc[(*mix, "1:1")]
        axes.plot(split_up.index, split_up, f"o{line}", color=ORANGE, label=f"1:1, {mix[0]} + {mix[1]}", markersize=4)
        axes.axhline(means.loc[(*mix, "2 unified", LINK_GB_PER_S)], color=BLUE, linestyle=line)
    axes.plot([], [], color=BLUE, label="2 unified")
    axes.set(xscale="log", xlabel="link, GB/s", ylabel="goodput, requests/s and device", ylim=(0, 16))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(f"Links, TPOT at most {TPOT_MS['strict']:g} ms")
    axes.legend(loc="center right")


# %%
if __name__ == "__main__":
    table, found = study(smoke=is_smoke())
    save(HERE, table, found, provenance(HERE, "0 to 2", "modelled h100-sxm", "sglang-0.5"))
    if not is_smoke():
        save_figure(HERE, "goodput", draw(table))
