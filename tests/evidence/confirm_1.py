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
SMOKE_BARS = 10.0
"""Times the bars: half a second of a busy machine says no more than that the parts work together."""


def check(smoke: bool) -> Evidence:
    """Measure both; the bars are those of the page."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) if smoke else page.FOLDER
        told = [run(kind, folder, smoke) for kind in KINDS]
        results = {name: found for kind in KINDS for name, found in page.results_of(folder, kind).items()}
    verdicts = {name: page.verdict(name, found) for name, found in results.items()}
    if smoke:
        within = (
            figures[key] <= SMOKE_BARS * bar
            for name, (_, figures) in verdicts.items()
            for key, bar in page.BARS[page.kind_of(name)].items()
        )
        replayed = (one["replayed"] for found in results.values() for one in found["judged"])
        passed = len(results) == len(KINDS) and all(within) and all(replayed)
    else:
        passed = len(results) == len(KINDS) and all(good for good, _ in verdicts.values())
    return Evidence(
        figure="; ".join(
            f"{name}: " + ", ".join(f"{page.NAMES[key]} {value:.1f} %" for key, value in figures.items())
            for name, (_, figures) in verdicts.items()
        ),
        bar="; ".join(
            f"{kind}: " + ", ".join(f"{page.NAMES[key]} {bar:g} %" for key, bar in page.BARS[kind].items())
            for kind in KINDS
        )
        + ("; at smoke size ten times that" if smoke else "; every order right that exceeds twice the noise"),
        passed=passed,
        details=tuple(line for lines in told for line in lines),
    )


def run(kind: str, folder: Path, smoke: bool) -> list[str]:
    """Judge one kind of target in a process of its own; the last lines that it printed."""
    command = [sys.executable, "-m", "tests.fidelity", kind, "--folder", str(folder), *(SMOKE if smoke else ())]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = [line for line in ended.stdout.splitlines() if line.startswith(kind)]
    return said or [f"{kind} failed: {line}" for line in ended.stderr.splitlines()[-5:]]
