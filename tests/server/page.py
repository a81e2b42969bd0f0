"""``reports/serve``: every run of the server's lines of evidence at full size, and the page that is made of them."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from testbed.engine.device import processor_name
from tests.evidence.evidence import Evidence
from tests.laws.page import commit

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "reports" / "serve"
TITLES = {
    "serve.1": "Clients that people have",
    "serve.2": "Streamed text",
    "serve.3": "Hostile clients",
    "serve.4": "Crowds",
    "serve.5": "Overhead",
    "serve.6": "The test menu",
}


EARLIER = ("Runs before:", "", "| date | commit | load | figure | |", "|---|---|---:|---|---|")


def busy() -> float:
    """The load average of the last minute: what else this machine does, before a line begins."""
    return os.getloadavg()[0]


def keep(line: str, evidence: Evidence, *, seed: str, load: float, folder: Path = FOLDER) -> Evidence:
    """Add a run of ``line`` to those that are kept, and write the page anew; returns ``evidence``.

    ``seed``: of what is drawn, in words; ``load``: see ``busy``, when the run began.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{line}.json"
    runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    runs.append(
        {
            "commit": commit(),
            "seed": seed,
            "machine": f"{processor_name()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "load": round(load, 1),
            "date": datetime.now(tz=UTC).strftime("%Y-%m-%d %H:%M"),
            "figure": evidence.figure,
            "bar": evidence.bar,
            "passed": evidence.passed,
            "details": list(evidence.details),
        }
    )
    path.write_text(json.dumps(runs, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    paths = {name: folder / f"{name}.json" for name in TITLES}
    kept = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}
    (folder / "README.md").write_text("\n".join(_page(kept)) + "\n", encoding="utf-8")
    return evidence


def _page(kept: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "# The server under its clients",
        "",
        "Each line of evidence at full size. Its last run counts and is shown whole; runs before are listed with",
        "what they found. *Load* is the load average of the machine when a run began: others work on the same cores.",
        "",
    ]
    for line, runs in kept.items():
        lines += _section(line, runs)
    return lines


def _section(line: str, runs: list[dict[str, Any]]) -> list[str]:
    last = runs[-1]
    before = [_row(run) for run in runs[:-1]]
    return [
        f"## {TITLES[line]}: {_verdict(last)}",
        "",
        "| | |",
        "|---|---|",
        f"| command | `python -m tests.evidence {line}` |",
        *(f"| {name} | {last[name]} |" for name in ("commit", "seed", "machine", "load", "date")),
        f"| figure | {last['figure']} |",
        f"| bar | {last['bar']} |",
        "",
        *(("```", *last["details"], "```", "") if last["details"] else ()),
        *([*EARLIER, *before, ""] if before else ()),
    ]


def _row(run: dict[str, Any]) -> str:
    cells = (run["date"], run["commit"], run["load"], run["figure"], _verdict(run))
    return f"| {' | '.join(map(str, cells))} |"


def _verdict(run: dict[str, Any]) -> str:
    return "PASS" if run["passed"] else "FAIL"
