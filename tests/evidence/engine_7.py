"""Too little memory, a broken checkpoint, an unsupported model, a lost device: one clear error, nothing half-written.

Each case of ``tests/engine/failures.py`` runs through the real command in a folder of its own: status 2, the place, the
fault and the remedy, no traceback, no new file, no process left. Then a worker is killed while it loads and while it
computes. At smoke size the table's devices need no process of their own, and one of each kind of loss is tried.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

from testbed.cli.main import WRONG_INPUT, invoke
from testbed.engine.device import open_device
from testbed.engine.models.create import Sizes, create_model
from tests.bad_input.cases import Case
from tests.bad_input.checking import lay_out, objections
from tests.cli.terminal import Command, is_alive
from tests.engine.failures import FAILURES, LOST, MODEL, Failure
from tests.evidence.evidence import Evidence

LOSSES = 5
"""How often a worker is killed at each moment."""


def check(smoke: bool) -> Evidence:
    """Count the failures that ended as they should."""
    failed: list[str] = []
    losses = [(moment, number) for moment in ("loading", "computing") for number in range(1 if smoke else LOSSES)]
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        model = create_model("llama-3.1-8b", Path(folder) / MODEL, Sizes(layers=1, hidden=32))
        for failure in FAILURES:
            with laid_out(failure, model) as place:
                found = _in_process(failure.case, place) if smoke else _in_a_process(failure.case, place)
            failed += [f"{failure.case.name}: {objection}" for objection in found]
        for moment, number in losses:
            with laid_out(LOST, model) as place:
                failed += [f"killed while {moment}, {number}: {objection}" for objection in _killed(moment, place)]
    total = len(FAILURES) + len(losses)
    broken = len({line.split(":")[0] for line in failed})
    return Evidence(
        figure=f"{total - broken} of {total} failures ended as asked: {len(FAILURES)} refusals, {len(losses)} losses",
        bar="all",
        passed=not failed,
        details=tuple(failed),
    )


@contextlib.contextmanager
def laid_out(failure: Failure, model: Path) -> Iterator[Path]:
    """A folder with the model and the scenario of a failure."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copytree(model, place / MODEL)
        lay_out(failure.case, place)
        failure.harm(place / MODEL)
        yield place


def _in_process(case: Case, folder: Path) -> list[str]:
    stdout, stderr = io.StringIO(), io.StringIO()
    before = sorted(folder.rglob("*"))
    in_process = mock.patch("testbed.api.open_device", partial(open_device, in_process=True))
    with contextlib.chdir(folder), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), in_process:
        status = invoke([case.command, *case.arguments])
    return [*objections(case, status, stdout.getvalue(), stderr.getvalue()), *_new(before, folder)]


def _in_a_process(case: Case, folder: Path) -> list[str]:
    before = sorted(folder.rglob("*"))
    with Command(case.command, *case.arguments, "--no-progress", cwd=folder) as command:
        ended = command.ended()
    left = [f"process {pid} is left" for pid in command.workers_seen if is_alive(pid)]
    answer = ended.stderr.replace("\r\n", "\n")
    return [*objections(case, ended.status, ended.stdout, answer), *left, *_new(before, folder)]


def _killed(moment: str, folder: Path) -> list[str]:
    before = sorted(folder.rglob("*"))
    with Command(LOST.case.command, *LOST.case.arguments, cwd=folder) as command:
        if moment == "computing":
            command.wait_for(r"[1-9]\d* of [\d,]+ finished")
        worker = command.worker()
        os.kill(worker, signal.SIGKILL)
        ended = command.ended()
    found = objections(LOST.case, ended.status, ended.stdout, ended.stderr.replace("\r\n", "\n"))
    if is_alive(worker) or ended.status != WRONG_INPUT:
        found.append(f"status {ended.status}, or process {worker} is left")
    return [*found, *_new(before, folder)]


def _new(before: list[Path], folder: Path) -> list[str]:
    return [f"{path.relative_to(folder)} was written" for path in sorted(folder.rglob("*")) if path not in before]
