# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Which replica gets the next request?
#
# Six routers in front of four replicas, on shared prefixes, on long-tailed lengths and on a recorded trace, with
# reports after every step, every 10 and every 100.

# %%
import sys
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(HERE.parent))

from common import figures_of, is_smoke, provenance, save, save_figure
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from scipy import stats

from testbed import load_scenario, simulate
from testbed.metrics.run import Run
from testbed.report.style import SERIES, house_style

SCENARIO = HERE / "scenario.yaml"
SEEDS = (0, 1, 2, 3, 4)
INTERVALS = (1, 10, 100)
KEYS = ("cache_hit_rate", "mean_ttft_ms", "p99_ttft_ms", "mean_e2el_ms")
LOGNORMAL = "{{kind: lognormal, median: {0}, sigma: {1}, max: {2}}}"
WORKLOADS = {
    "prefixes": (),
    "lengths": (
        "workload.prefix=null",
        "workload.arrivals.rate_per_s=80",
        "engine.kv_tokens=400_000",
        f"workload.lengths.prompt_tokens={LOGNORMAL.format(500, 1.2, 30_000)}",
        f"workload.lengths.output_tokens={LOGNORMAL.format(150, 1.0, 4_000)}",
    ),
    "mooncake": (
        "engine.kv_tokens=400_000",
        "workload={requests: {trace: mooncake_conversation_first30min.jsonl, duration_s: 300, jitter_s: 3,"
        " too_long: drop}, rate_scale: 1.3}",
    ),
}


# %%
def imbalance(run: Run) -> float:
    """Device time of the busiest replica over the mean."""
    steps = run.records.steps
    busy = np.bincount(np.asarray(steps["replica"]), weights=np.asarray(steps["gpu_ns"]))
    return float(busy.max() / busy.mean())


def rows_of(workload: str, interval: int, seed: int, *overrides: str) -> list[dict[str, object]]:
    """One row a policy; of later reports than those of every step only where the policy reads them."""
    where = {"workload": workload, "report_every_steps": interval, "seed": seed}
    settings = (*WORKLOADS[workload], f"routing.report_every_steps={interval}", f"seed={seed}", *overrides)
    rows = []
    for name, scenario in load_scenario(SCENARIO, settings).variants.items():
        if interval == 1 or scenario.routing.reads_loads:
            run = simulate(scenario)
            rows.append({**where, "policy": name, **figures_of(run, KEYS), "imbalance": imbalance(run)})
    return rows


def study(smoke: bool) -> tuple[pd.DataFrame, dict[str, float]]:
    """One row a workload, report interval, seed and policy, and the figures that ``expected.json`` holds."""
    if smoke:
        rows = rows_of("prefixes", 1, 0, "workload.count=400") + rows_of("prefixes", 100, 0, "workload.count=400")
    else:
        rows = [row for workload in WORKLOADS for seed in SEEDS for row in rows_of(workload, 1, seed)]
        for workload in ("prefixes", "lengths"):
            rows += [row for late in INTERVALS[1:] for seed in SEEDS for row in rows_of(workload, late, seed)]
    table = pd.DataFrame(rows)
    at = table[table["workload"] == "prefixes"].groupby(["policy", "report_every_steps"])[[*KEYS, "imbalance"]].mean()
    prompt, late = at.xs(1, level=1), at.xs(100, level=1)
    base, ttft = prompt.loc["round robin"], prompt["mean_ttft_ms"] / prompt.loc["round robin", "mean_ttft_ms"]
    return table, {
        "hit_rate_round_robin": base["cache_hit_rate"],
        "hit_rate_cache_aware": prompt.loc["cache aware", "cache_hit_rate"],
        "mean_ttft_cache_aware_over_round_robin": ttft["cache aware"],
        "mean_ttft_shortest_queue_over_round_robin": ttft["shortest queue"],
        "mean_ttft_random_over_round_robin": ttft["random"],
        "mean_ttft_shortest_queue_late_over_prompt": (
            late.loc["shortest queue", "mean_ttft_ms"] / prompt.loc["shortest queue", "mean_ttft_ms"]
        ),
    }


# %%
def with_interval(values: pd.Series) -> tuple[float, float]:
    """(mean, half width of its 95 % interval over seeds) by Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half)


def by_policy(axes: Axes, rows: pd.DataFrame, key: str, at: float = 0.0) -> None:
    """A point with its interval for each policy, side by side around ``at``."""
    for place, (policy, each) in enumerate(rows.groupby("policy", sort=False)):
        mean, half = with_interval(each[key])
        x = at + (place - 2.5) / 8
        axes.errorbar(x, mean, half, fmt="o", color=SERIES[place], label=policy, capsize=3)


def by_interval(axes: Axes, rows: pd.DataFrame) -> None:
    """The first token over the steps between reports; a dashed line for a policy that reads none."""
    for place, (_, each) in enumerate(rows.groupby("policy", sort=False)):
        if each["report_every_steps"].nunique() == 1:
            axes.axhline(each["mean_ttft_ms"].mean(), color=SERIES[place], linestyle="--")
            continue
        points = [with_interval(of["mean_ttft_ms"]) for _, of in each.groupby("report_every_steps")]
        means, halves = zip(*points, strict=True)
        axes.errorbar(INTERVALS, means, halves, fmt="o-", color=SERIES[place], capsize=3)
    axes.set(xlabel="steps between reports", xscale="log")


def draw(table: pd.DataFrame) -> Figure:
    """Policies side by side, a column a workload; below, what late reports do, and how even the replicas work."""
    with house_style("routing"):
        figure = Figure(figsize=(10.5, 7.2), layout="constrained")
        above, (*below, last) = figure.subplots(2, 3)
        prompt = table[table["report_every_steps"] == 1]
        for place, (workload, rows) in enumerate(prompt.groupby("workload", sort=False)):
            by_policy(above[place], rows, "mean_ttft_ms")
            above[place].set(title=f"{workload}: mean TTFT, ms", yscale="log", xticks=[])
            by_policy(last, rows, "imbalance", place)
        for axes, (workload, rows) in zip(below, table.groupby("workload", sort=False), strict=False):
            by_interval(axes, rows)
            axes.set(title=f"{workload}: mean TTFT, ms", yscale="log")
        for axes in (*above, *below):
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        last.set(title="device time, busiest over mean", xticks=range(len(WORKLOADS)), xticklabels=WORKLOADS)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6)
    return figure


# %%
if __name__ == "__main__":
    table, found = study(smoke=is_smoke())
    save(HERE, table, found, provenance(HERE, "0 to 4", "modelled h100-sxm", "sglang-0.5"))
    if not is_smoke():
        save_figure(HERE, "routing", draw(table))
