"""Whatever is wrong with what a user gives: exit status 2, the place, the field, the remedy, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.cli.main import WRONG_INPUT, invoke
from tests.bad_input.cases import CASES, Case

SAMPLE = ("unknown field", "truncated JSON", "binary file", "plugin fails", "output folder in use")
"""Cases that also go through a process of their own."""


def lay_out(case: Case, folder: Path) -> None:
    for name, content in case.files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())


def check(case: Case, status: int, stdout: str, stderr: str) -> None:
    assert status == WRONG_INPUT, (status, stderr)
    assert f"error: {case.place}" in stderr, stderr
    for words in (*case.says, *case.remedy):
        assert words in stderr, stderr
    assert "Traceback" not in stdout + stderr
    lines = stderr.splitlines()
    assert any(line.startswith("  ") for line in lines), f"no remedy on a line of its own: {stderr}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_out(case, tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status = invoke([case.command, *case.arguments])
    captured = capsys.readouterr()
    check(case, status, captured.out, captured.err)
    after = [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts and path.name != "runs"]
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
    check(case, ended.returncode, ended.stdout, ended.stderr)


def test_enough_cases() -> None:
    assert len(CASES) >= 50
