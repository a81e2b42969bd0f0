# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Do fewer, larger prefills pay?
#
# `patient.py` is a batching strategy of one's own: it lets prompts gather before it stalls the decodes for them. Here
# it runs beside the built-in strategies on the same requests.

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
KEYS = ("mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms", "p99_itl_ms", "max_itl_ms", "output_throughput")


# %%
def study(smoke: bool) -> tuple[pd.DataFrame, dict[str, float]]:
    """One row a strategy, and the figures that ``expected.json`` holds."""
    rows = []
    for name, run in variants(SCENARIO, f"workload.count={150 if smoke else 2000}").items():
        steps = run.records.steps
        prefills = int((steps["prefill_rows"] > 0).sum())
        stalls = int(((steps["prefill_rows"] > 0) & (steps["decode_rows"] == 0) & (steps["running"] > 0)).sum())
        rows.append({"strategy": name, **figures_of(run, KEYS), "prefill_steps": prefills, "stalls": stalls})
    table = pd.DataFrame(rows)
    by = table.set_index("strategy")
    ratio = by.loc["patient"] / by.loc["prefill first"]
    return table, {
        "patient_prefill_steps_ratio": ratio["prefill_steps"],
        "patient_mean_ttft_ratio": ratio["mean_ttft_ms"],
        "patient_mean_tpot_ratio": ratio["mean_tpot_ms"],
        "patient_p99_itl_ratio": ratio["p99_itl_ms"],
        "stall_free_mean_tpot_ratio": by.loc["stall free", "mean_tpot_ms"] / by.loc["prefill first", "mean_tpot_ms"],
    }


# %%
def draw(table: pd.DataFrame) -> Figure:
    """First token against the tokens after it: lower left is better."""
    with house_style("own strategy"):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        for axes, (column, label) in zip(
            figure.subplots(1, 2),
            (("mean_tpot_ms", "mean TPOT, ms"), ("p99_itl_ms", "99th percentile of ITL, ms")),
            strict=True,
        ):
            # Strategies that decided the same share a point, and its label.
            points = table.groupby(["mean_ttft_ms", column], sort=False)["strategy"].agg(" = ".join)
            for ((x, y), name), colour in zip(points.items(), SERIES, strict=False):
                axes.plot(x, y, "D" if "patient" in name else "o", color=colour, markersize=9)
                below = "stall free" in name
                shift = (8, -14 if below else 6)
                axes.annotate(name, (x, y), xytext=shift, textcoords="offset points", color=colour)
            axes.set(xlabel="mean TTFT, ms", ylabel=label, xlim=(0, 1.35 * table["mean_ttft_ms"].max()))
            axes.margins(y=0.2)
        figure.suptitle(
            "Azure chat lengths, 12 requests/s, Llama-3.1-8B on a modelled H100; diamonds: patient.py",
            x=0.01,
            ha="left",
        )
    return figure


# %%
if __name__ == "__main__":
    table, found = study(smoke=is_smoke())
    save(HERE, table, found, provenance(HERE, 0, "modelled h100-sxm", "sglang-0.5"))
    save_figure(HERE, "trade_off", draw(table))
