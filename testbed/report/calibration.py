"""``calibration.html``: a calibration on one page: measured against predicted, held-out errors, the noise floor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from testbed.report import style
from testbed.report.page import Plate, draw_plate, environment
from testbed.report.series import spread

COLUMNS = 3
"""Panels beside each other."""
MOST = 400
"""Points of a part in one panel."""
_POINTS = (
    "Each point is a time that was measured (us, along) and what the profile says of it (up); on the line both agree. "
    "At most {most:,} points of each part are drawn, evenly spaced."
)


@dataclass(frozen=True)
class Half:
    """What was calibrated: the device or the host."""

    name: str
    file: str
    """The profile's file beside the page."""
    points: pd.DataFrame
    """``name`` (operator or stage), ``measured_ns``, ``predicted_ns``, ``held_out``."""
    errors: pd.DataFrame
    """One row a name: text and numbers, shown as they are."""
    notes: Sequence[str] = ()


def write_calibration(halves: Sequence[Half], provenance: Mapping[str, Any], folder: Path) -> Path:
    """Write the page and, under ``figures/``, its figures as SVG and PNG; returns the page's path."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    shown = [
        {
            "name": half.name,
            "file": half.file,
            "head": [str(column).replace("_", " ").replace(" percent", " (%)") for column in half.errors],
            "rows": [[_cell(value) for value in row] for row in half.errors.to_dict("split")["data"]],
            "notes": half.notes,
            "plate": _plate(half, folder),
        }
        for half in halves
    ]
    text = environment().get_template("calibration.html").render(theme=style.THEME, halves=shown, provenance=provenance)
    page = folder / "calibration.html"
    page.write_text(text + "\n", encoding="utf-8")
    return page


def _plate(half: Half, folder: Path) -> Plate:
    caption = _POINTS.format(most=MOST)
    return draw_plate(folder, half.name, f"{half.name}: fit", caption, lambda: fit_panels(half.points))


def fit_panels(points: pd.DataFrame) -> Figure:
    """Predicted against measured, a panel a name."""
    names = list(dict.fromkeys(points["name"]))
    rows = max(-(-len(names) // COLUMNS), 1)
    figure, panels = style.new_figure(0.4 + 2.5 * rows, rows, COLUMNS)
    for axes, name in zip(panels, names, strict=False):
        _draw_fit(axes, name, points[points["name"] == name])
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper right", ncols=2)
    return figure


def _draw_fit(axes: Axes, name: str, points: pd.DataFrame) -> None:
    times = points[["measured_ns", "predicted_ns"]].to_numpy(np.float64) / 1e3
    seen = (times > 0).all(axis=1)
    times, held_out = times[seen], points["held_out"].to_numpy(np.bool_)[seen]
    axes.set_title(name)
    if not len(times):
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", color=style.MUTED)
        return
    ends = [times.min() / 1.4, times.max() * 1.4]
    axes.plot(ends, ends, color=style.QUIET, linewidth=1)
    for which, colour, label in ((False, style.BLUE, "fitted to"), (True, style.ORANGE, "held out")):
        mine = times[held_out == which]
        mine = mine[spread(len(mine), MOST)]
        axes.plot(mine[:, 0], mine[:, 1], "o", color=colour, label=label, markersize=2.8, alpha=0.4, markeredgewidth=0)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
