"""``confirm.html``: a simulation beside the real runs of the same scenario, on one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from testbed.metrics.aggregate import LATENCIES
from testbed.metrics.columns import NS_PER_MS
from testbed.metrics.run import Run
from testbed.report import figures, style
from testbed.report.page import Plate, draw_plate, environment
from testbed.report.series import spread

FAULTS = ("executor", "scheduler", "decisions")
CAVEATS = ("noise", "few requests")
"""Causes of findings, as ``testbed.study.confirm.findings`` names them, by how the page shows them."""
CAUSES = {
    "device_busy": ("busy", style.BLUE),
    "bubble_host": ("waits for host", style.RED),
    "bubble_transfer": ("waits for transfer", style.PURPLE),
    "bubble_no_work": ("no work", style.QUIET),
}

_CDF = "Share of values at or below each latency: the simulation and each real run."
_STEPS = (
    "Each point is a step that really ran, priced by the cost model from its exact shape; on the line both agree. "
    "{points:,} of {steps:,} steps are drawn. Right: where the device's time went, in percent of the measure window."
)
_HOST = "Mean time of one charge of each stage of the loop. Wait: from the device's end to the loop's going on."


def write_confirmation(
    content: Mapping[str, Any],
    runs: Mapping[str, tuple[Run, Sequence[Run]]],
    steps: Mapping[str, pd.DataFrame],
    folder: Path | str,
) -> Path:
    """Write the page and, under ``figures/``, its figures as SVG and PNG; returns the page's path.

    ``content``: what ``confirm.json`` holds (``docs/confirm.md``). By variant: ``runs``, the simulation and the real
    runs; ``steps``, a frame with kind, predicted_ns and measured_ns of every step.
    """
    folder = Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    variants = [
        _variant(name, found, runs[name], steps[name], folder, index)
        for index, (name, found) in enumerate(content["variants"].items(), start=1)
    ]
    template = environment().get_template("confirm.html")
    target = folder / "confirm.html"
    shown = {**content, "variants": variants}
    text = template.render(
        theme=style.THEME,
        latencies=LATENCIES,
        statistics=("mean", "p50", "p90", "p99"),
        others=[key for key in variants[0]["by_figure"] if not key.endswith("_ms")],
        quantiles=("p5", "p25", "p50", "p75", "p95"),
        **shown,
    )
    target.write_text(text + "\n", encoding="utf-8")
    return target


def _variant(
    name: str,
    found: Mapping[str, Any],
    sides: tuple[Run, Sequence[Run]],
    steps: pd.DataFrame,
    folder: Path,
    index: int,
) -> dict[str, Any]:
    """What the page shows of one variant."""
    simulated, real = sides
    names = ["simulated", *(f"real {number}" for number in range(1, len(real) + 1))]
    drawn = spread(len(steps))
    caption = _STEPS.format(points=len(drawn), steps=len(steps))

    def plate(which: str, label: str, caption: str, draw: Any) -> Plate:
        return draw_plate(folder, f"{which}_{index}", f"{label}, {name}", caption, draw)

    return {
        **found,
        "name": name,
        "by_figure": {row["figure"]: row for row in found["figures"]},
        "findings": [{**finding, "kind": _kind(finding["cause"])} for finding in found["findings"]],
        "latency": [plate("latency", "Latencies", _CDF, lambda: figures.latency_cdf([simulated, *real], names))],
        "device": [plate("device", "Steps", caption, lambda: device_agreement(steps.iloc[drawn], found["bubbles"]))],
        "host_plates": [plate("host", "Host stages", _HOST, lambda: host_agreement(found["host"]))],
    }


def _kind(cause: str) -> str:
    return "fault" if cause in FAULTS else "caveat" if cause in CAVEATS else "profile"


def device_agreement(steps: pd.DataFrame, shares: Sequence[Mapping[str, Any]]) -> Figure:
    """Predicted against measured step times by kind of batch, and the device's time by cause on both sides."""
    figure = style.new_figure(3.9)[0]
    figure.clear()
    scatter, causes = figure.subplots(1, 2, width_ratios=(6, 4))
    _draw_steps(scatter, steps)
    _draw_shares(causes, shares)
    return figure


def _draw_steps(axes: Axes, steps: pd.DataFrame) -> None:
    axes.set(title="Step time (ms)", xlabel="measured", ylabel="predicted")
    times = steps[["measured_ns", "predicted_ns"]].to_numpy() / NS_PER_MS
    times = times[(times > 0).all(axis=1)]
    if not len(times):
        axes.text(0.5, 0.5, "no steps", transform=axes.transAxes, ha="center", color=style.MUTED)
        return
    ends = [times.min() / 1.3, times.max() * 1.3]
    axes.plot(ends, ends, color=style.QUIET, linewidth=1)
    for kind, group in steps.groupby("kind"):
        mode, _, how = str(kind).partition(", ")
        axes.plot(group["measured_ns"] / NS_PER_MS, group["predicted_ns"] / NS_PER_MS, "o" if how == "graph" else "D",
                  color=style.MODE_COLOURS.get(mode, style.INK), label=str(kind), markersize=3.5, alpha=0.4,
                  markeredgewidth=0)  # fmt: skip
    axes.set(xlim=ends, ylim=ends)
    if ends[1] / ends[0] > 8:
        axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    style.legend_above(axes, 3)


def _draw_shares(axes: Axes, shares: Sequence[Mapping[str, Any]]) -> None:
    left = np.zeros(2)
    for share in shares:
        values = np.array([share["simulated"], share["real"]])
        if not np.nan_to_num(values).any():
            continue
        label, colour = CAUSES[share["cause"]]
        axes.barh([0, 1], values, left=left, color=colour, label=label, height=0.5)
        for row, value in enumerate(values):
            if value > 8:
                ink = style.INK if colour == style.QUIET else "#ffffff"
                axes.text(left[row] + value / 2, row, f"{value:.1f} %", ha="center", va="center", fontsize=9, color=ink)
        left += values
    axes.set(title="Device time (%)", xlim=(0, 100), yticks=[0, 1], yticklabels=["simulated", "real"], ylim=(1.6, -0.6))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0, labelcolor=style.INK)
    if left.any():
        axes.legend(loc="lower left", ncols=2, bbox_to_anchor=(0, 0), borderaxespad=0.2, handlelength=1.2)


def host_agreement(stages: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean time of a charge by stage, predicted beside measured."""
    figure, (axes,) = style.new_figure(0.9 + 0.42 * max(len(stages), 1))
    rows = np.arange(len(stages))
    for shift, side, colour in ((-0.19, "predicted", style.SKY), (0.19, "measured", style.BLUE)):
        values = np.array([1e3 * stage[f"{side}_ms"] / stage["number"] for stage in stages])
        axes.barh(rows + shift, values, height=0.36, color=colour, label=side)
        for row, value in zip(rows, values, strict=True):
            axes.annotate(f"{value:,.1f}", (value, row + shift), xytext=(4, 0), textcoords="offset points", va="center",
                          fontsize=8, color=style.MUTED)  # fmt: skip
    axes.set(title="Host time of a charge (us)", yticks=rows, yticklabels=[stage["name"] for stage in stages])
    axes.set_ylim(len(stages) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0, labelcolor=style.INK)
    style.legend_above(axes)
    return figure
