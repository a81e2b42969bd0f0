"""Broken scenarios, traces and command lines end with status 2 and name file, line, field and remedy; no traceback.

Each case of ``tests/bad_input/cases.py`` runs through the real command in a folder of its own. At full size each also
runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from testbed.cli.main import invoke
from tests.bad_input.cases import CASES, Case
from tests.bad_input.checking import lay_out, objections
from tests.evidence.evidence import Evidence

CASES_MIN = 50


def check(smoke: bool) -> Evidence:
    """Count the cases that were refused as they should be."""
    failed: list[str] = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            lay_out(case, Path(folder))
            found = objections(case, *(_in_process(case, folder) if smoke else _in_a_process(case, folder)))
        failed += [f"{case.name}: {objection}" for objection in found]
    broken = len({line.split(":")[0] for line in failed})
    return Evidence(
        figure=f"{len(CASES) - broken} of {len(CASES)} broken inputs refused as asked",
        bar=f"all, of at least {CASES_MIN}",
        passed=not failed and len(CASES) >= CASES_MIN,
        details=tuple(failed),
    )


def _in_process(case: Case, folder: str) -> tuple[int, str, str]:
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = invoke([case.command, *case.arguments])
    return status, stdout.getvalue(), stderr.getvalue()


def _in_a_process(case: Case, folder: str) -> tuple[int, str, str]:
    ended = subprocess.run(
        [sys.executable, "-m", "testbed.cli.main", case.command, *case.arguments],
        cwd=folder,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ended.returncode, ended.stdout, ended.stderr
