# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Which batching strategy at which load?
#
# Four ways to share steps between prompts and decodes, from low load to saturation, on the same requests.

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
RATES = (2, 4, 8, 12, 16, 20, 24)
KEYS = (
    "mean_ttft_ms",
    "p99_ttft_ms",
    "mean_tpot_ms",
    "p99_tpot_ms",
    "p99_itl_ms",
    "output_throughput",
    "mean_batch_size",
)


# %%
def study(smoke: bool) -> tuple[pd.DataFrame, dict[str, float]]:
    """One row a rate and strategy, and the figures that ``expected.json`` holds."""
    rows = []
    for rate in (4, 16) if smoke else RATES:
        overrides = (f"workload.arrivals.rate_per_s={rate}", f"workload.count={120 if smoke else 1200}")
        for name, run in variants(SCENARIO, *overrides).items():
            rows.append({"rate_per_s": rate, "strategy": name, **figures_of(run, KEYS)})
    table = pd.DataFrame(rows)
    at = table.set_index(["strategy", "rate_per_s"])
    first, free, static = (at.loc[name] for name in ("prefill first", "stall free", "static"))
    return table, {
        "itl_p99_prefill_first_over_stall_free_at_16": first.loc[16, "p99_itl_ms"] / free.loc[16, "p99_itl_ms"],
        "ttft_mean_stall_free_over_prefill_first_at_16": free.loc[16, "mean_ttft_ms"] / first.loc[16, "mean_ttft_ms"],
        "tpot_mean_prefill_first_over_stall_free_at_16": first.loc[16, "mean_tpot_ms"] / free.loc[16, "mean_tpot_ms"],
        "ttft_mean_static_over_prefill_first_at_4": static.loc[4, "mean_ttft_ms"] / first.loc[4, "mean_ttft_ms"],
    }


# %%
PANELS = (
    ("mean_ttft_ms", "mean TTFT, ms", "log"),
    ("mean_tpot_ms", "mean TPOT, ms", "linear"),
    ("p99_itl_ms", "99th percentile of ITL, ms", "log"),
)


def draw(table: pd.DataFrame) -> Figure:
    """Latencies over the rate, a line a strategy."""
    with house_style("batching strategies"):
        figure = Figure(figsize=(9.6, 3.8), layout="constrained")
        for axes, (column, label, scale) in zip(figure.subplots(1, 3), PANELS, strict=True):
            for (name, rows), colour in zip(table.groupby("strategy", sort=False), SERIES, strict=False):
                line = "o--" if name == "stall free" else "o-"  # it lies on mixed chunk's where memory suffices
                axes.plot(rows["rate_per_s"], rows[column], line, color=colour, label=name, markersize=4)
            axes.set(xlabel="requests per second", ylabel=label, yscale=scale)
            if scale == "log":
                axes.yaxis.set_major_formatter("{x:g}")
            else:
                axes.set_ylim(0)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


# %%
if __name__ == "__main__":
    table, found = study(smoke=is_smoke())
    save(HERE, table, found, provenance(HERE, 0, "modelled h100-sxm", "sglang-0.5"))
    save_figure(HERE, "latency_over_rate", draw(table))
