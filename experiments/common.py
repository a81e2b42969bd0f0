"""What every experiment needs: where it came from, tables and figures on disk, and expected figures with tolerances."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from testbed import load_scenario, simulate
from testbed.metrics.run import Run

ROOT = Path(__file__).parent.parent


def is_smoke() -> bool:
    """Whether a small run is asked for (``SMOKE=1``). Ends the program when it is given arguments: it takes none."""
    if arguments := sys.argv[1:] if Path(sys.argv[0]).name == "analysis.py" else []:
        raise SystemExit(f"unknown arguments: {' '.join(arguments)}; a small run is SMOKE=1 python {sys.argv[0]}")
    return os.environ.get("SMOKE", "0") not in ("", "0")


def variants(scenario: Path, *overrides: str) -> dict[str, Run]:
    """Simulate every variant of a scenario file, with ``field=value`` overrides."""
    return {name: simulate(each) for name, each in load_scenario(scenario, overrides).variants.items()}


def figures_of(run: Run, keys: Sequence[str]) -> dict[str, float]:
    """The aggregates with these keys (``docs/metrics.md`` defines them)."""
    found = run.aggregates()
    return {key: float(found[key]) for key in keys}


def provenance(folder: Path, seed: int | str, device: str, host: str) -> dict[str, str]:
    """Command, commit, seed, device, host profile, machine and date of a result."""
    asked = subprocess.run(["git", "log", "-1", "--format=%h"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "command": f"python experiments/{folder.name}/analysis.py",
        "commit": asked.stdout.strip() or "unknown",
        "seed": str(seed),
        "device": device,
        "host profile": host,
        "machine": f"{_processor()}, Python {platform.python_version()}",
        "date": datetime.now(UTC).date().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def save(folder: Path, table: pd.DataFrame, figures: Mapping[str, float], source: Mapping[str, str]) -> None:
    """Write ``table.csv``, ``figures.json`` and ``provenance.json`` into ``results``, and print table and figures.

    A small run writes nothing: the committed results are those of the whole one.
    """
    rounded = {name: float(f"{value:.6g}") for name, value in figures.items()}
    print(table.to_string(index=False), *(f"{name}: {value:g}" for name, value in rounded.items()), sep="\n")
    if is_smoke():
        return
    results = folder / "results"
    results.mkdir(exist_ok=True)
    table.to_csv(results / "table.csv", index=False, float_format="%.6g")
    _write(results / "figures.json", rounded)
    _write(results / "provenance.json", dict(source))


def save_figure(folder: Path, name: str, figure: Figure) -> None:
    """Write ``figures/NAME.png``; of a small run nothing."""
    if is_smoke():
        return
    (folder / "figures").mkdir(exist_ok=True)
    figure.savefig(folder / "figures" / f"{name}.png", dpi=150)


def unexpected(folder: Path, figures: Mapping[str, float]) -> list[str]:
    """What of ``expected.json`` (``{figure: {value, tolerance}}``) the figures of a smoke run miss."""
    expected: dict[str, dict[str, float]] = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    missing = sorted(set(expected) ^ set(figures))
    return [f"{name} is in one of expected.json and the figures only" for name in missing] + [
        f"{name}: {figures[name]:.6g}, expected {want['value']:.6g} +- {want['tolerance']:.6g}"
        for name, want in expected.items()
        if name in figures and abs(figures[name] - want["value"]) > want["tolerance"]
    ]


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
