"""What a line of evidence reports."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True)
class Evidence:
    """One figure against its bar."""

    figure: str
    """What was found, with its unit."""
    bar: str
    """What was asked for."""
    passed: bool
    details: tuple[str, ...] = field(default=())
    """Lines that explain the figure; of a failure, what failed."""


def commit_page(folder: str, title: str, line: str, evidence: Evidence) -> Path:
    """Write a long result to ``reports/FOLDER/README.md``, with its command, commit and date; returns the path."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=root, capture_output=True, text=True, check=False)
    page = root / "reports" / folder / "README.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    body = "\n".join(evidence.details)
    page.write_text(
        f"# {title}\n\n"
        f"`python -m tests.evidence {line}`, commit {commit.stdout.strip() or 'unknown'}, "
        f"{datetime.now(tz=UTC).date().isoformat()}\n\n"
        f"- figure: {evidence.figure}\n- bar: {evidence.bar}\n- **{'PASS' if evidence.passed else 'FAIL'}**\n\n"
        f"```\n{body}\n```\n",
        encoding="utf-8",
    )
    return page
