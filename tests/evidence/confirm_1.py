"""Simulation agrees with life on scenarios that nothing was calibrated with: paced runs, and the CPU of this machine.

Calibrates, then simulates and runs a dozen cases from idle to saturation: the error of means, the order of loops and of
batching strategies, the replay of every real run. At full size writes ``reports/fidelity``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.evidence.evidence import Evidence
from tests.fidelity import page

ROOT = Path(__file__).parents[2]
KINDS = ("paced", "cpu")
SMOKE = ("--minutes", "0.2", "--seconds", "0.5", "--cases", "light")
SHOWN = ("every order that exceeds twice the noise", "at smoke size: all runs replay, no token is wrong")


def check(smoke: bool) -> Evidence:
    """Measure both; the bars are those of the page."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) if smoke else page.FOLDER
        ended = [run(kind, folder, smoke) for kind in KINDS]
        results = {name: found for kind in KINDS for name, found in page.results_of(folder, kind).items()}
    figures = {name: page.verdict(name, found)[1] for name, found in results.items()}
    if smoke:  # half a second of a busy machine says nothing of errors
        judged = [one for found in results.values() for one in found["judged"]]
        works = all(one["replayed"] and not one["faults"] for one in judged)
        passed = len(results) == len(KINDS) and works
    else:  # not the page: it may be from before when a command fails
        passed = all(status == 0 for status, _ in ended)
    return Evidence(
        figure="; ".join(f"{name}: {in_percent(found)}" for name, found in figures.items()),
        bar="; ".join((*(f"{kind}: {in_percent(page.BARS[kind])}" for kind in KINDS), SHOWN[smoke])),
        passed=passed,
        details=tuple(line for _, lines in ended for line in lines),
    )


def in_percent(figures: dict[str, float]) -> str:
    """By name."""
    return ", ".join(f"{page.NAMES[key]} {value:.1f} %" for key, value in figures.items())


def run(kind: str, folder: Path, smoke: bool) -> tuple[int, list[str]]:
    """Judge one kind of target in a process of its own: its exit status, and what it said of the target."""
    command = [sys.executable, "-m", "tests.fidelity", kind, "--folder", str(folder), *(SMOKE if smoke else ())]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = [line for line in ended.stdout.splitlines() if line.startswith(kind)]
    return ended.returncode, said or [f"{kind} failed: {line}" for line in ended.stderr.splitlines()[-5:]]
