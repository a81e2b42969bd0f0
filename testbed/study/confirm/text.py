"""A confirmation as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from testbed.metrics.table import number, percent
from testbed.study.confirm.errors import FigureError, TimeError, time_errors
from testbed.study.confirm.join import Joined
from testbed.study.confirm.run import Confirmation

MOST_FINDINGS = 6


def table(confirmation: Confirmation) -> str:
    """Every variant: verdict, errors with the noise beside them, steps, host, first difference, findings; and whether
    the order of the variants is right."""
    lines: list[str] = []
    for one in confirmation.variants:
        lines += [*_variant(confirmation, one), ""]
    for ranking in confirmation.rankings:
        orders = " > ".join(ranking.simulated), " > ".join(ranking.real)
        lines.append(f"ranking by {ranking.figure}: {ranking.verdict} (simulated {orders[0]}; real {orders[1]})")
    return "\n".join(lines).rstrip()


def _variant(confirmation: Confirmation, one: Joined) -> Iterator[str]:
    label = one.real[0].meta.get("label", "real")
    yield f"{one.name}: {confirmation.verdicts[one.name]}"
    yield from _columns(
        ["", "simulated", label, "error", "noise"],
        [_figure(row) for row in one.figures.values() if not np.isnan(row.error)],
    )
    for title, rows in (
        ("device, steps of", time_errors(one.steps, ["kind"])),
        ("host", time_errors(one.host, ["stage"])),
    ):
        yield from _columns([title, "predicted ms", "measured ms", "error", "noise"], [_time(row) for row in rows])
    found = one.differences[0]
    if found is None:
        yield "decisions: all equal"
    else:
        normal = " (timing: normal on the wall clock)" if found.by_timing else ""
        yield f"decisions: step {found.step:,} is the first to differ: {found.why}{normal}"
    findings = confirmation.findings[one.name]
    for finding in findings[:MOST_FINDINGS]:
        yield f"- {finding}\n    {finding.remedy}"
    if len(findings) > MOST_FINDINGS:
        yield f"- and {len(findings) - MOST_FINDINGS} more in confirm.json"


def _figure(row: FigureError) -> list[str]:
    return [row.figure, number(row.simulated), number(row.real), percent(row.error), percent(row.noise).lstrip("+")]


def _time(row: TimeError) -> list[str]:
    sums = f"{row.predicted_ms:,.1f}", f"{row.measured_ms:,.1f}"
    return [f"  {row.name} ({row.number:,})", *sums, percent(row.error), percent(row.noise).lstrip("+")]


def _columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows below their heads, the first column left, the others right."""
    widths = [max(len(row[place]) for row in [heads, *rows]) for place in range(len(heads))]
    for row in [heads, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()
