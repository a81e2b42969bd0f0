"""How figures look: one palette that colour-blind readers can tell apart, and SVG that follows the page's theme.

Series colours are Okabe and Ito's (Color Universal Design, 2008). A figure is drawn once; on the page its colours
become CSS variables, so that the same drawing is right in light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#b5609a", "#56b4e9", "#d9c93a"
)  # fmt: skip
SERIES = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW)
INK, MUTED, GRID, PAPER, QUIET = "#1b1f24", "#5b6470", "#e3e6ea", "#fffffe", "#c9ced6"

THEME = {
    "ink": (INK, "#e8eaed"),
    "muted": (MUTED, "#9aa4b2"),
    "grid": (GRID, "#2c323a"),
    "paper": (PAPER, "#16191d"),
    "quiet": (QUIET, "#454d58"),
    "blue": (BLUE, "#4aa3df"),
    "orange": (ORANGE, "#f0b43c"),
    "green": (GREEN, "#2dbf95"),
    "red": (RED, "#f0793a"),
    "purple": (PURPLE, "#d58cbf"),
    "sky": (SKY, "#7cc8f2"),
    "yellow": (YELLOW, "#e5d85c"),
}
"""CSS variable: (light, dark). The light colours are those that figures are drawn in."""

MODE_COLOURS = {"extend": ORANGE, "mixed": PURPLE, "decode": BLUE}
WIDTH_IN = 9.6
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "savefig.facecolor": PAPER,
    "path.simplify": True,
}


@contextmanager
def house_style(salt: str) -> Iterator[None]:
    """Matplotlib settings of the house; ``salt`` names the figure, so that ids in SVGs repeat but do not clash."""
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": salt}):
        yield


def new_figure(height_in: float, rows: int = 1, columns: int = 1, **layout: Any) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width without pyplot's global state, and its axes, row by row."""
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **layout)
    return figure, list(axes.flat)


def legend_above(axes: Axes, columns: int = 6) -> None:
    """A legend in one line above the axes, right-aligned, out of the data's way."""
    handles, _labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=columns, borderaxespad=0.2, handlelength=1.2,
                    columnspacing=1.2)  # fmt: skip


def to_svg(figure: Figure) -> str:
    """The figure as SVG text without date or program version: equal figures give equal text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def inline_svg(svg: str, label: str) -> str:
    """SVG text for a page: colours as CSS variables, no prolog, no ids that could clash, named for screen readers."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    for name, (light, _) in THEME.items():
        body = body.replace(light, f"var(--{name})")
    body = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", body, count=1)
    body = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", body, count=1)
    return body.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def save_figure(figure: Figure, folder: Path, name: str, svg: str) -> None:
    """Write ``name.svg`` and ``name.png`` (150 dots an inch)."""
    (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
