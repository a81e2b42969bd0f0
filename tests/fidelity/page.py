"""``reports/fidelity``: results by target as JSON, and the page that is made from all that are kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from tests.fidelity.cases import CASES
from tests.fidelity.judge import FIGURES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "reports" / "fidelity"
NAMES = {
    "output_throughput": "throughput",
    "mean_tpot_ms": "TPOT",
    "mean_e2el_ms": "E2E",
    "mean_ttft_ms": "TTFT",
}
BARS = {
    "paced": {"output_throughput": 5.0, "mean_tpot_ms": 5.0, "mean_e2el_ms": 5.0, "mean_ttft_ms": 10.0},
    "cpu": {"output_throughput": 15.0, "mean_tpot_ms": 15.0, "mean_e2el_ms": 15.0, "mean_ttft_ms": 25.0},
    "gpu": {"output_throughput": 3.0, "mean_tpot_ms": 3.0, "mean_e2el_ms": 3.0, "mean_ttft_ms": 6.0},
}
"""Percent. Paced and CPU: the mean of |error| over all; GPU: every one."""
CAPACITY_BAR = 5.0
"""GPU: throughput of the case that asks for twice what the device can do, percent."""


def kind_of(target: str) -> str:
    """``paced``, ``cpu`` or ``gpu``."""
    return target.partition("-")[0]


def errors_of(judged: list[dict[str, Any]], figure: str) -> list[float]:
    """|error| of each variant of each case, percent."""
    return [abs(one["figures"][figure]["error"]) for one in judged]


def verdict(target: str, found: dict[str, Any]) -> tuple[bool, dict[str, float]]:
    """Whether the bars hold, and the figures that are held against them: means, on a GPU the worst."""
    of = np.max if kind_of(target) == "gpu" else np.mean
    figures = {key: float(of(errors_of(found["judged"], key))) for key in FIGURES}
    holds = all(figures[key] <= bar for key, bar in BARS[kind_of(target)].items())
    if kind_of(target) == "gpu":
        saturated = [one for one in found["judged"] if one["case"] == "saturated"]
        figures["capacity"] = max(errors_of(saturated, "output_throughput"), default=float("nan"))
        holds = holds and figures["capacity"] <= CAPACITY_BAR
    return holds and not misranked(found), figures


def misranked(found: dict[str, Any]) -> list[str]:
    """Where simulation orders variants otherwise than life does."""
    return [f"{one['case']}: {one['figure']}" for one in found["ranked"] if one["wrong"]]


def keep(target: str, found: dict[str, Any], folder: Path = FOLDER) -> None:
    """Write a target's results, and the page anew."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(found), indent=1, allow_nan=False)
    (folder / f"{target}.json").write_text(text + "\n", encoding="utf-8")
    results = {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}
    (folder / "README.md").write_text("\n".join(_page(results)) + "\n", encoding="utf-8")


def results_of(folder: Path, kind: str) -> dict[str, dict[str, Any]]:
    """The results that are kept of one kind of target, by target."""
    paths = (path for path in sorted(folder.glob("*.json")) if kind_of(path.stem) == kind)
    return {path.stem: _read(path) for path in paths}


def _read(path: Path) -> dict[str, Any]:
    """A target's results; what is undefined is null in the file and NaN here."""

    def with_nan(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: math.nan if value is None and key != "same_decisions" else value for key, value in pairs}

    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=with_nan)
    return found


def holds(folder: Path, kind: str) -> bool:
    """Whether there are results of this kind, and all their bars hold."""
    found = results_of(folder, kind)
    return bool(found) and all(verdict(target, one)[0] for target, one in found.items())


def summary(folder: Path, kind: str) -> str:
    """A line a target."""
    lines = []
    for target, found in results_of(folder, kind).items():
        good, figures = verdict(target, found)
        told = ", ".join(f"{NAMES.get(key, key)} {value:.2f} %" for key, value in figures.items())
        wrong = misranked(found)
        lines.append(f"{target}: {told}; {len(wrong)} orders wrong {wrong or ''}: {'PASS' if good else 'FAIL'}")
    return "\n".join(lines)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def _page(results: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "# Fidelity: simulation beside life",
        "",
        "Each scenario was simulated once and run twice, with `testbed confirm`; profiles were calibrated before, on",
        "workloads of their own (`testbed/study/calibration/workloads.py`), none of which is here. An error is",
        "(simulated - real) / real of the mean, in percent; behind it, in brackets, the noise: what the two real runs",
        "differ by. Runs of targets called `paced` have a modelled device that takes its time for real; loop, host and",
        "clock are real. `cpu` runs torch on the cores that the loop runs on too.",
        "",
        "| case | what |",
        "|---|---|",
        *(f"| {case.name} | {case.what} |" for case in CASES),
        "",
    ]
    for target, found in results.items():
        lines += _target(target, found)
    return lines


def _target(target: str, found: dict[str, Any]) -> list[str]:
    holds, figures = verdict(target, found)
    bars = BARS[kind_of(target)] | {"capacity": CAPACITY_BAR}
    how = "worst" if kind_of(target) == "gpu" else "mean"
    told = ", ".join(f"{NAMES.get(key, key)} {value:.1f} % (bar {bars[key]:g} %)" for key, value in figures.items())
    wrong = misranked(found)
    counts = [sum(one[key] for one in found["ranked"]) for key in ("right", "wrong", "close")]
    return [
        f"## {target}: {'PASS' if holds else 'FAIL'}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in found["source"].items()),
        f"| {how} absolute error | {told} |",
        f"| order of variants | {counts[0]} pairs right, {counts[1]} wrong, {counts[2]} too close to call"
        f"{': wrong in ' + ', '.join(wrong) if wrong else ''} |",
        f"| replay | {sum(one['replayed'] for one in found['judged'])} of {len(found['judged'])} variants: every "
        "decision of both real runs came out again |",
        "",
        "| case | variant | requests | steps | throughput | TPOT | E2E | TTFT | p99 TTFT | device time | host time |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(_row(one) for one in found["judged"]),
        "",
        "Device and host time: what the profiles say of the steps and stages that really ran, less what they took.",
        "",
    ]


def _row(one: dict[str, Any]) -> str:
    cells = [
        f"{one['figures'][key]['error']:+.1f} [{one['figures'][key]['noise']:.1f}]" for key in (*FIGURES, "p99_ttft_ms")
    ]
    times = (f"{one[name]:+.1f}" for name in ("device_error", "host_error"))
    return f"| {one['case']} | {one['variant']} | {one['requests']} | {one['steps']} | {' | '.join([*cells, *times])} |"
