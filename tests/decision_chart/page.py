"""The committed page of the decision chart."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from datetime import date

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from testbed.report.style import INK, MUTED, PAPER, house_style
from tests.decision_chart.cells import LAYOUTS, MACHINES, MOST_RUNS, SEEDS, STATISTIC, WORKLOADS
from tests.decision_chart.table import FOLDER, best, change, estimate, per_device, places
from tests.laws.page import commit, machine

SINGLE = [name for name, layout in LAYOUTS.items() if layout.devices == 1]
DOUBLE = [name for name, layout in LAYOUTS.items() if layout.devices == 2]


def write_page(table: pd.DataFrame) -> None:
    """Write ``README.md`` and the figure from the whole table."""
    draw(per_device(table).sort_index()).savefig(FOLDER / "chart.png", dpi=150)
    (FOLDER / "README.md").write_text("\n".join(page_of(table)) + "\n", encoding="utf-8")


def page_of(table: pd.DataFrame) -> Iterator[str]:
    """The lines of the page."""
    rates = per_device(table).sort_index()
    yield from (
        "# Which loop wins where",
        "",
        f"Each cell is the highest rate of requests a second *and device* at which the {STATISTIC} of TTFT and the",
        f"{STATISTIC} of TPOT keep their limits, mean over seeds with its 95 % interval (Student's t), simulated.",
        "",
        "![Rate per device over that of the normal loop](chart.png)",
        "",
        "## The decision",
        "",
        "The best of one device with its gain over `normal`, then the best of two with its gain over `dp 2`, both seed",
        "by seed on the same requests. *Or*: what cannot be told from the best, since the paired interval holds 0.",
        "",
    )
    yield from _decision(rates)
    yield from ("", "## Every cell", "")
    yield from _limits()
    for name, host in dict.fromkeys(place[:2] for place in places()):
        yield from ("", f"### {name}, host {host}", "")
        yield from _cells(rates, name, host)
    yield from ("", "## Source", "")
    yield from _source()
    yield from ("", *NOT_JUDGED)


def _source() -> Iterator[str]:
    devices = dict.fromkeys(machine.device for machine in MACHINES.values())
    hosts = dict.fromkeys(host for machine in MACHINES.values() for host in machine.hosts)
    yield from (
        "| | |",
        "|---|---|",
        "| command | `python -m tests.decision_chart` |",
        f"| commit | {commit()} |",
        f"| seeds | {min(SEEDS)} to {max(SEEDS)} |",
        f"| device, host profile | modelled {', '.join(devices)}; {', '.join(hosts)} |",
        f"| machine | {machine()}, Python {platform.python_version()} |",
        f"| date | {date.today().isoformat()} |",
        "| held by | `python -m tests.evidence loops.6` |",
    )


def _decision(rates: pd.Series) -> Iterator[str]:
    yield "| machine, host | workload | one device | two devices |"
    yield "|---|---|---|---|"
    for place in places():
        name, host, workload = place
        first, second = _winner(rates, place, SINGLE, "normal"), _winner(rates, place, DOUBLE, "dp 2")
        yield f"| {name}, {host} | {workload} | {first} | {second} |"


def _winner(rates: pd.Series, place: tuple[str, str, str], layouts: list[str], base: str) -> str:
    names = best(rates, place, layouts)
    words = " or ".join(f"`{name}`" for name in names)
    if names[0] == base:
        return words
    gain = change(rates, place, names[0], base)
    return f"{words}, {gain.mean:+.0f} ± {gain.half:.0f} %"


def _limits() -> Iterator[str]:
    yield "| | TTFT, ms | TPOT, ms |"
    yield "|---|---:|---:|"
    for name, each in MACHINES.items():
        yield f"| {name} | {each.ttft_ms:g} | {each.tpot_ms:g} |"
    for name, load in WORKLOADS.items():
        if (load.ttft_factor, load.tpot_factor) != (1, 1):
            yield f"| {name}: times | {load.ttft_factor:g} | {load.tpot_factor:g} |"


def _cells(rates: pd.Series, name: str, host: str) -> Iterator[str]:
    yield f"| loop | devices | {' | '.join(WORKLOADS)} |"
    yield "|---|---:|" + "---:|" * len(WORKLOADS)
    for loop, layout in LAYOUTS.items():
        found = [estimate(rates[(name, host, load, loop)]) for load in WORKLOADS]
        numbers = " | ".join(f"{cell.mean:.3g} ± {cell.half:.2g}" if cell.mean else "none" for cell in found)
        yield f"| `{loop}` | {layout.devices} | {numbers} |"


NOT_JUDGED = (
    "## How to read it, and what is not judged",
    "",
    f"- Each cell and seed is a search of at most {MOST_RUNS} runs. Requests arrive for about three times as long as",
    "  one is served, so a rate is what a busy spell can have, not what can be kept for ever. Bursts (gamma gaps, cv",
    "  4) are few in so short a time: their intervals are wide.",
    "- Bold in the figure: the best of all, and what cannot be told from it. *None*: no rate keeps the limits.",
    "- Devices, links and hosts are modelled; host profiles contain guesses (each profile lists them), and so does the",
    "  time that a message takes between stages (20 us).",
    "- Every layout has the same settings otherwise: `prefill_first`, chunks of 8,192 tokens, 256 running requests, a",
    "  radix cache. Other chunks change pipelines and unified engines most (experiments 03 and 09).",
    "- `dp 2` has a router by shortest queue, also where prefixes are shared; experiment 08 is about routers. `tp 2`",
    "  is no loop, but what one would do with two devices otherwise; with long outputs it has twice the requests,",
    "  since all of the usual ones in one batch break no limit.",
    "- `overlap_suspended` is in experiment 07, other ratios than 1:1 and other links in 10, four devices in 09.",
    "- Not judged: the host `testbed` with the large model, where a host is worth a few percent (experiment 05);",
    "  models that need two devices to fit at all; what devices and their links cost.",
)


def draw(rates: pd.Series) -> Figure:
    """A panel a machine and host: loops against workloads, coloured by the rate per device over that of ``normal``."""
    panels = list(dict.fromkeys(place[:2] for place in places()))
    with house_style("decision chart"):
        figure = Figure(figsize=(11.4, 7.8), layout="constrained")
        grid = figure.subplots(2, -(-len(panels) // 2), sharey=True)
        for axes, (name, host) in zip(grid.flat, panels, strict=False):
            _panel(axes, rates, name, host)
        figure.suptitle("Requests a second and device within the limits, over those of the normal loop on one device")
    return figure


SPAN = 1.0
"""Colours end at half and at twice the normal loop's rate (a power of two)."""


def _panel(axes: Axes, rates: pd.Series, name: str, host: str) -> None:
    means = np.array(
        [[rates[(name, host, load, loop)].mean() for load in WORKLOADS] for loop in LAYOUTS], dtype=np.float64
    )
    ratio = means / means[list(LAYOUTS).index("normal")]
    with np.errstate(divide="ignore", invalid="ignore"):
        axes.imshow(np.log2(ratio), cmap="RdBu", vmin=-SPAN, vmax=SPAN, aspect="auto")
    for column, load in enumerate(WORKLOADS):
        winners = best(rates, (name, host, load), list(LAYOUTS))
        for row, loop in enumerate(LAYOUTS):
            value = ratio[row, column]
            words = f"{value:.2f}" if np.isfinite(value) and value else "none"
            strong = bool(np.isfinite(value) and value) and abs(np.log2(value)) > 0.6 * SPAN
            weight = "bold" if loop in winners and value else "normal"
            colour = PAPER if strong else INK
            axes.text(column, row, words, ha="center", va="center", color=colour, weight=weight, fontsize=9)
    axes.axhline(len(SINGLE) - 0.5, color=MUTED, linewidth=1.2)
    axes.set_title(f"{name}, {host}")
    axes.set_xticks(range(len(WORKLOADS)), [load.replace(" ", "\n") for load in WORKLOADS])
    axes.set_yticks(range(len(LAYOUTS)), list(LAYOUTS))
    axes.grid(visible=False)
    axes.tick_params(length=0)
