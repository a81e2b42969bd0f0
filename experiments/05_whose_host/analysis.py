# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Whose host, which loop?
#
# On real traffic the device is not always saturated and steps differ. What is left of the overlapped loop's gain, for
# the hosts of known engines, a model of 8B and one of 0.6B parameters?

# %%
import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(HERE.parent))

from common import figures_of, is_smoke, provenance, save, save_figure, variants
from matplotlib.figure import Figure

from testbed.costs import host_presets
from testbed.report.style import BLUE, ORANGE, house_style

SCENARIO = HERE / "scenario.yaml"
MODELS = ("llama-3.1-8b", "qwen3-0.6b")
KEYS = (
    "mean_tpot_ms",
    "p99_tpot_ms",
    "mean_ttft_ms",
    "mean_e2el_ms",
    "bubble_host_percent",
    "mean_batch_size",
    "extra_rows",
)


# %%
def study(smoke: bool) -> tuple[pd.DataFrame, dict[str, float]]:
    """One row a model, host and loop, and the figures that ``expected.json`` holds."""
    rows = []
    for model in MODELS:
        for host in host_presets():
            overrides = (f"model={model}", f"host={host}", f"workload.count={60 if smoke else 2000}")
            for loop, run in variants(SCENARIO, *overrides).items():
                rows.append({"model": model, "host": host, "loop": loop, **figures_of(run, KEYS)})
    table = pd.DataFrame(rows)
    tpot = table.pivot_table(index=["model", "host"], columns="loop", values="mean_tpot_ms")
    gain = (tpot["normal"] / tpot["overlap"] - 1) * 100
    keys = {model: model.replace("-", "_").replace(".", "") for model in MODELS}
    hosts = ("none", "testbed", "sglang-0.5", "vllm-v1", "vllm-v0")
    return table, {
        f"{keys[model]}_{host.replace('-', '_').replace('.', '')}_tpot_gain_percent": gain[model, host]
        for model in MODELS
        for host in hosts
    }


# %%
def draw(table: pd.DataFrame) -> Figure:
    """Mean TPOT by host, a bar a loop."""
    with house_style("whose host"):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        for axes, model in zip(figure.subplots(1, 2), MODELS, strict=True):
            tpot = table[table["model"] == model].pivot_table(index="host", columns="loop", values="mean_tpot_ms")
            tpot = tpot.sort_values("normal")
            for shift, loop, colour in ((-0.2, "normal", ORANGE), (0.2, "overlap", BLUE)):
                places = [row + shift for row in range(len(tpot))]
                axes.barh(places, tpot[loop], height=0.38, color=colour, label=loop)
            for row, (normal, overlap) in enumerate(zip(tpot["normal"], tpot["overlap"], strict=True)):
                gain = round((normal / overlap - 1) * 100)
                axes.text(normal, row - 0.2, f"  {gain:+d} %", va="center", fontsize=8.5)
            axes.set_yticks(range(len(tpot)), tpot.index)
            axes.invert_yaxis()
            axes.set(xlabel="mean TPOT, ms", xlim=(0, 1.18 * tpot["normal"].max()))
            axes.set_title(model)
            axes.grid(axis="y", visible=False)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


# %%
if __name__ == "__main__":
    table, found = study(smoke=is_smoke())
    save(HERE, table, found, provenance(HERE, 0, "modelled h100-sxm", "every preset"))
    save_figure(HERE, "tpot_by_host", draw(table))
