# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Which request goes first?
#
# Forty system prompts of 2,000 tokens, popular and rare; the cache holds some of them. Policies that look at the cache
# (`lpm`, `dfs_weight`) reorder the queue so that prefixes are used while they are there.

# %%
import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(HERE.parent))

from common import figures_of, is_smoke, provenance, save, save_figure, variants
from matplotlib.figure import Figure

from testbed.report.style import SERIES, house_style

SCENARIO = HERE / "scenario.yaml"
RATES = (8, 16, 20, 24, 28)
KEYS = (
    "cache_hit_rate",
    "mean_ttft_ms",
    "p50_ttft_ms",
    "p99_ttft_ms",
    "mean_tpot_ms",
    "request_throughput",
    "evicted_tokens",
)


# %%
def study(smoke: bool) -> tuple[pd.DataFrame, dict[str, float]]:
    """One row a rate and policy, and the figures that ``expected.json`` holds."""
    rows = []
    for rate in (24,) if smoke else RATES:
        overrides = (f"workload.arrivals.rate_per_s={rate}", f"workload.count={250 if smoke else 1500}")
        for name, run in variants(SCENARIO, *overrides).items():
            rows.append({"rate_per_s": rate, "policy": name, **figures_of(run, KEYS)})
    table = pd.DataFrame(rows)
    at = table.set_index(["policy", "rate_per_s"])
    by = {name: at.loc[(name, 24)] for name in ("fcfs", "lpm", "dfs weight", "lof", "random")}
    return table, {
        "hit_rate_fcfs": by["fcfs"]["cache_hit_rate"],
        "hit_rate_lpm": by["lpm"]["cache_hit_rate"],
        "hit_rate_dfs_weight": by["dfs weight"]["cache_hit_rate"],
        "mean_ttft_lpm_over_fcfs": by["lpm"]["mean_ttft_ms"] / by["fcfs"]["mean_ttft_ms"],
        "p99_ttft_lpm_over_fcfs": by["lpm"]["p99_ttft_ms"] / by["fcfs"]["p99_ttft_ms"],
        "mean_ttft_lof_over_fcfs": by["lof"]["mean_ttft_ms"] / by["fcfs"]["mean_ttft_ms"],
    }


# %%
PANELS = (
    ("cache_hit_rate", "cache hit rate", "linear"),
    ("mean_ttft_ms", "mean TTFT, ms", "log"),
    ("p99_ttft_ms", "99th percentile of TTFT, ms", "log"),
)


def draw(table: pd.DataFrame) -> Figure:
    """Hit rate and first token over the rate, a line a policy."""
    with house_style("policies"):
        figure = Figure(figsize=(9.6, 3.8), layout="constrained")
        for axes, (column, label, scale) in zip(figure.subplots(1, 3), PANELS, strict=True):
            for (name, rows), colour in zip(table.groupby("policy", sort=False), SERIES, strict=False):
                axes.plot(rows["rate_per_s"], rows[column], "o-", color=colour, label=name, markersize=4)
            axes.set(xlabel="requests per second", ylabel=label, yscale=scale)
            if scale == "log":
                axes.yaxis.set_major_formatter("{x:g}")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


# %%
if __name__ == "__main__":
    table, found = study(smoke=is_smoke())
    save(HERE, table, found, provenance(HERE, 0, "modelled h100-sxm", "sglang-0.5"))
    save_figure(HERE, "hit_rate_and_ttft", draw(table))
