"""Whatever is wrong with what a user gives: exit status 2, the place, the field, the remedy, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.cli.main import invoke
from tests.bad_input.cases import BASE, CASES, CSV, JSON_LINES, TRACE_BASE, Case
from tests.bad_input.checking import lay_out, objections

SAMPLE = ("unknown field", "truncated JSON", "binary file", "plugin fails", "output folder in use")
"""Cases that also go through a process of their own."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_out(case, tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status = invoke([case.command, *case.arguments])
    captured = capsys.readouterr()
    assert not objections(case, status, captured.out, captured.err)
    after = [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts]
    assert after == before, "a refused command leaves nothing behind"


@pytest.mark.parametrize("name", SAMPLE)
def test_refused_in_a_process(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    lay_out(case, tmp_path)
    ended = subprocess.run(
        [sys.executable, "-m", "testbed.cli.main", case.command, *case.arguments],
        cwd=tmp_path,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not objections(case, ended.returncode, ended.stdout, ended.stderr)


@pytest.mark.parametrize(
    "files",
    [
        {"scenario.yaml": BASE},
        {"scenario.yaml": TRACE_BASE, "requests.csv": CSV},
        {"scenario.yaml": TRACE_BASE.replace("requests.csv", "requests.jsonl"), "requests.jsonl": JSON_LINES},
    ],
    ids=["drawn", "csv", "jsonl"],
)
def test_the_unbroken_inputs_are_accepted(
    files: dict[str, str | bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a case could be refused for something that it does not break."""
    lay_out(Case("sound", "", (), (), files), tmp_path)
    monkeypatch.chdir(tmp_path)
    assert invoke(["simulate", "scenario.yaml", "--no-report"]) == 0


def test_enough_cases() -> None:
    assert len(CASES) >= 50
