"""The committed page of closed forms: a table, a figure, and the figures as CSV."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

from testbed.report.style import BLUE, MUTED, RED, house_style
from tests.laws.statistics import Check

ROOT = Path(__file__).parents[2]
ROW_IN = 0.21


def commit() -> str:
    """The commit that is checked out, or ``unknown`` outside of a repository."""
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "unknown"


def machine() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def source_table(line: str, seeds: str, device: str, host: str) -> list[str]:
    """Where a committed page came from, as a table."""
    return [
        "| | |",
        "|---|---|",
        f"| command | `python -m tests.evidence {line}` |",
        f"| commit | {commit()} |",
        f"| seeds | {seeds} |",
        f"| device, host profile | {device}; {host} |",
        f"| machine | {machine()}, Python {platform.python_version()} |",
        f"| date | {datetime.date.today().isoformat()} |",
    ]


def write_page(
    folder: Path, checks: Sequence[Check], sizes: Sequence[tuple[str, int, int]], exact: Sequence[str]
) -> None:
    """Write ``README.md``, ``results.csv`` and ``intervals.svg``.

    ``sizes``: (case, customers a run, runs); ``exact``: lines on the laws that hold on every run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["law", "what", "theory", "found", "half_width", "p_value", "kind", "holds"])
        for check in checks:
            kind = "bound" if check.bound else "distribution" if check.p_value is not None else "mean"
            p_value = "" if check.p_value is None else f"{check.p_value:.4f}"
            numbers = [f"{value:.9g}" for value in (check.theory, check.found, check.half_width)]
            writer.writerow([check.law, check.what, *numbers, p_value, kind, check.holds])
    _figure(folder, checks)
    (folder / "README.md").write_text("\n".join(_text(checks, sizes, exact)) + "\n", encoding="utf-8")


def _text(checks: Sequence[Check], sizes: Sequence[tuple[str, int, int]], exact: Sequence[str]) -> list[str]:
    outside = [check for check in checks if not check.holds]
    statistical = sum(1 for check in checks if check.half_width or check.p_value is not None)
    customers = sum(count * runs for _, count, runs in sizes)
    lines = [
        "# Exactness",
        "",
        "A device of constant times and a host that costs nothing make the simulator a queue of the textbook. Each law",
        "is compared with its closed form (sources: `tests/laws/queues.py`); intervals are 99 %, by batch means.",
        "",
        f"**{len(checks) - len(outside)} of {len(checks)} checks hold**, over more than {customers:,} customers. Of",
        f"the {statistical} checks that are statistical, one in a hundred is expected to fail by chance.",
        "",
        *source_table("simulate.5", "0, 1, 2, ... as many as runs", "constant times", "`none`"),
        "",
        "![Deviation from theory in units of the 99 % interval](intervals.svg)",
        "",
        "| law | figure | theory | found | 99 % interval | |",
        "|---|---|---:|---:|---:|---|",
    ]
    lines += [_row(check) for check in checks]
    lines += ["", "## Laws that hold on every run, to the nanosecond", "", *(f"- {line}" for line in exact)]
    lines += ["", "## Sizes", "", "| case | customers a run | runs |", "|---|---:|---:|"]
    lines += [f"| {name} | {count:,} | {runs} |" for name, count, runs in sizes]
    return lines


def _row(check: Check) -> str:
    mark = "" if check.holds else "**outside**"
    if check.p_value is not None:
        return f"| {check.law} | {check.what} | | p = {check.p_value:.3f} | | {mark} |"
    sign = "≤ " if check.bound else ""
    interval = f"± {check.half_width:.2g}" if check.half_width else "exact"
    return f"| {check.law} | {check.what} | {sign}{check.theory:.6g} | {check.found:.6g} | {interval} | {mark} |"


def _figure(folder: Path, checks: Sequence[Check]) -> None:
    """How far each statistical mean lies from theory, as a share of its interval."""
    from matplotlib.figure import Figure

    shown = [check for check in checks if check.half_width and not check.bound]
    with house_style("exactness"):
        figure = Figure(figsize=(9.6, 0.9 + ROW_IN * len(shown)), layout="constrained")
        axes = figure.add_subplot()
        for row, check in enumerate(shown):
            share = (check.found - check.theory) / check.half_width
            axes.plot([share], [row], "o", color=BLUE if check.holds else RED, markersize=5)
        axes.axvspan(-1, 1, color=BLUE, alpha=0.08, linewidth=0)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_yticks(range(len(shown)), [f"{check.law}: {check.what}" for check in shown], fontsize=7.5)
        axes.set_ylim(len(shown) - 0.3, -0.7)
        axes.set_xlim(-1.6, 1.6)
        axes.set_xlabel("(found - theory) / half width of the 99 % interval")
        figure.savefig(folder / "intervals.svg", metadata={"Date": None})
