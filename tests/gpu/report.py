"""The GPU report: sections measured in processes of their own, kept in ``results.json``, shown as a page.

A kernel that fails takes its process's CUDA context with it, and a hang its time: on a GPU each section is a process
with a limit. Results are kept by section, so that a report can be made in several calls.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "reports" / "engine_gpu"
RESULTS, PAGE = "results.json", "README.md"
NO_GPU = "no GPU"
SEED = 0
LIMITS_S = {
    "ceilings": 60,
    "exactness": 180,
    "decode": 180,
    "attention": 100,
    "prefill": 90,
    "shared_bench": 330,
    "overlap": 200,
    "sanitizer": 570,
}
"""Sections in order of importance, and the time that each may take on a GPU, loading and compiling included."""
SECTIONS = tuple(LIMITS_S)
NOT_OF_SPEED = ("exactness", "sanitizer")
"""Sections whose bars hold at a tiny size on a CPU too."""
CPU_LIMIT_S = 600
LEAST_S = 30
"""With less time left no section is begun."""


@dataclass
class Section:
    """What one section gave."""

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    """As ``setting.Row``."""
    seconds: float | None = None
    """None: it did not come to its end."""
    error: str | None = "it was ended before it came to its end"
    machine: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    date: str = ""

    @property
    def on_gpu(self) -> bool:
        """Whether its figures are those of a GPU."""
        return self.machine.get("device", NO_GPU) != NO_GPU

    @property
    def works(self) -> bool:
        """Whether it came to its end without a GPU, with figures that cannot be wrong there."""
        right = self.name not in NOT_OF_SPEED or all(row["passed"] for row in self.rows)
        return self.error is None and bool(self.rows) and right

    @property
    def passed(self) -> bool:
        """Whether it came to its end and every bar holds."""
        return self.error is None and all(row["passed"] is not False for row in self.rows)


def measure(names: Sequence[str], budget_s: float, commit: str) -> list[Section]:
    """Run sections, on a GPU one after the other while the budget lasts, without one together at tiny sizes. What the
    time did not suffice for is left out."""
    if not torch.cuda.is_available():
        return _run(names, CPU_LIMIT_S, commit)
    end = monotonic() + budget_s
    found: list[Section] = []
    for name in names:
        if (left := end - monotonic()) > LEAST_S:
            found += _run([name], min(left, LIMITS_S[name]), commit)
    return found


def _run(names: Sequence[str], limit_s: float, commit: str) -> list[Section]:
    """Sections in one process of their own, with all the processes that they start ended at the limit."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "lines"
        environment = {**os.environ, "TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1"}
        command = [sys.executable, "-m", "tests.gpu.section", str(file), *names]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            print(f"{', '.join(names)}: ended at the limit of {limit_s:.0f} s", flush=True)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found = read_lines(lines)
    found += [Section(name) for name in names if name not in {section.name for section in found}]
    for section in found:
        section.commit, section.date = commit, datetime.now(UTC).date().isoformat()
    return found


def read_lines(lines: Iterable[str]) -> list[Section]:
    """What ``tests.gpu.section`` wrote; a last line that was cut off does not count."""
    machine: dict[str, str] = {}
    found: list[Section] = []
    for line in lines:
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            break
        if "machine" in value:
            machine = value["machine"]
        elif "section" in value:
            found.append(Section(value["section"], machine=machine))
        elif "row" in value:
            found[-1].rows.append(value["row"])
        else:
            found[-1].seconds, found[-1].error = value["seconds"], value["error"]
    return found


def load(folder: Path = FOLDER) -> dict[str, Section]:
    """The results kept so far, by section."""
    file = folder / RESULTS
    if not file.is_file():
        return {}
    return {section["name"]: Section(**section) for section in json.loads(file.read_text(encoding="utf-8"))}


def keep(found: Iterable[Section], folder: Path = FOLDER) -> dict[str, Section]:
    """Add to the results and write the page anew; results of a GPU are never replaced by others. Returns all."""
    kept = load(folder)
    for section in found:
        if section.on_gpu or not (section.name in kept and kept[section.name].on_gpu):
            kept[section.name] = section
    ordered = {name: kept[name] for name in SECTIONS if name in kept}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps([vars(section) for section in ordered.values()], indent=1)
    (folder / RESULTS).write_text(text + "\n", encoding="utf-8")
    (folder / PAGE).write_text(page(ordered), encoding="utf-8")
    return ordered


def page(kept: dict[str, Section]) -> str:
    """The report, in Markdown."""
    head = [
        "# The engine on a GPU",
        "",
        f"`python -m tests.gpu` (or `python -m tests.evidence engine.6`), seed {SEED}. How to run it on another",
        "machine: [docs/gpu.md](../../docs/gpu.md). Figures in full: [results.json](results.json).",
        "",
        f"**{verdict(kept)}**",
        "",
    ]
    machines = {tuple(section.machine.items()) for section in kept.values() if section.machine}
    head += [f"- {', '.join(f'{name}: {value}' for name, value in one)}" for one in sorted(machines)]
    body = [line for name in SECTIONS for line in _section_lines(name, kept.get(name))]
    return "\n".join([*head, *body]) + "\n"


def verdict(kept: dict[str, Section]) -> str:
    """In one sentence."""
    measured = [section for section in kept.values() if section.on_gpu]
    if not measured:
        ran = sum(section.works for section in kept.values())
        return f"No GPU: no figure was measured. {ran} of {len(SECTIONS)} sections ran on the CPU at a tiny size."
    bars = [row["passed"] for section in measured for row in section.rows if row["passed"] is not None]
    broken = [section.name for section in measured if section.error]
    missing = [name for name in SECTIONS if name not in kept or not kept[name].on_gpu]
    parts = [f"{sum(bars)} of {len(bars)} bars hold"]
    parts += [f"failed: {', '.join(broken)}"] if broken else []
    parts += [f"not measured: {', '.join(missing)}"] if missing else []
    return f"{'PASS' if complete(kept) else 'FAIL'}: {'; '.join(parts)}."


def complete(kept: dict[str, Section]) -> bool:
    """Whether every section was measured on a GPU and every bar holds."""
    return all(name in kept and kept[name].on_gpu and kept[name].passed for name in SECTIONS)


def _section_lines(name: str, section: Section | None) -> list[str]:
    lines = ["", f"## {name}", "", *_definition(name), ""]
    if section is None:
        return [*lines, "Not run."]
    when = f"{section.date}, commit {section.commit}"
    if section.error is not None:
        lines += [f"**FAIL** ({when}): {section.error}", ""]
    if not section.on_gpu:
        result = "ran" if section.works else "**FAIL**: did not run as it must"
        lines += [f"At a tiny size on the CPU it {result} ({when}): no speed was measured.", ""]
        return lines + [f"- {row['what']}: {row['figure']}" for row in section.rows if name in NOT_OF_SPEED]
    lines += [f"{when}.", "", "| what | figure | bar | |", "|---|---|---|---|"]
    verdicts = {True: "PASS", False: "FAIL", None: ""}
    return lines + [
        f"| {row['what']} | {row['figure'].replace('|', '/')} | {row['bar']} | {verdicts[row['passed']]} |"
        for row in section.rows
    ]


def _definition(name: str) -> list[str]:
    """The docstring of the section's file: what is measured, and how it is counted."""
    source = (ROOT / "tests" / "gpu" / f"{name}.py").read_text(encoding="utf-8")
    return source.split('"""')[1].strip().splitlines()


def table(kept: dict[str, Section]) -> str:
    """The rows as plain text."""
    lines = []
    for section in kept.values():
        for row in section.rows if section.on_gpu else []:
            mark = {True: "PASS ", False: "FAIL ", None: "     "}[row["passed"]]
            lines.append(f"{mark}{section.name:<13}{row['what']}: {row['figure']}")
        if section.error is not None:
            lines.append(f"FAIL {section.name:<13}{section.error}")
        elif not section.on_gpu:
            verdict_there = "ran" if section.works else "FAIL: ran, with a wrong result,"
            lines.append(f"     {section.name:<13}{verdict_there} at a tiny size on the CPU, {section.seconds:.1f} s")
    return "\n".join([*lines, verdict(kept)])


def head_commit() -> str:
    """The commit of this tree, ``unknown`` in a copy without its history."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
