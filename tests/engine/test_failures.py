"""Every failure of a real run: a clear error that names place and remedy, no process and no file left behind."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from testbed.cli.main import invoke
from testbed.engine import faults, wire
from testbed.engine.device import DeviceLost, open_device
from testbed.engine.faults import device_errors, free_bytes
from testbed.engine.models.create import Sizes, create_model
from testbed.engine.options import EngineOptions
from testbed.engine.process import ProcessDevice
from testbed.scenario.errors import InputError
from tests.bad_input.checking import lay_out, objections
from tests.cli.terminal import Command, is_alive
from tests.engine.failures import FAILURES, MODEL, NORM, Failure, reweighted
from tests.engine.machine import prefill, tiny_device

INTERPRETED = {"TRITON_INTERPRET": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_model("llama-3.1-8b", tmp_path_factory.mktemp("models") / MODEL, Sizes(layers=1, hidden=32))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that needs no process, since what is wrong is found by the same code: quick."""
    monkeypatch.setattr("testbed.api.open_device", partial(open_device, in_process=True))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def laid_out(failure: Failure, model: Path, folder: Path) -> None:
    shutil.copytree(model, folder / MODEL)
    lay_out(failure.case, folder)
    failure.harm(folder / MODEL)


@pytest.mark.usefixtures("in_this_process")
class TestRefused:
    @pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.case.name)
    def test_refused(
        self,
        failure: Failure,
        model: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        laid_out(failure, model, tmp_path)
        monkeypatch.chdir(tmp_path)
        before = sorted(tmp_path.rglob("*"))
        status = invoke([failure.case.command, *failure.case.arguments])
        captured = capsys.readouterr()
        assert not objections(failure.case, status, captured.out, captured.err)
        assert sorted(tmp_path.rglob("*")) == before

    def test_the_sound_model_is_not(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Otherwise a case could be refused for something that it does not break."""
        laid_out(FAILURES[0]._replace(harm=lambda model: None), model, tmp_path)
        monkeypatch.chdir(tmp_path)
        assert invoke(["run", "scenario.yaml", "--no-report"]) == 0

    def test_a_later_variant_is_refused_before_the_first_runs(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        laid_out(FAILURES[0]._replace(harm=lambda model: None), model, tmp_path)
        monkeypatch.chdir(tmp_path)
        variants = "compare={one: {seed: 1}, two: {engine.parallel: {tp: 2}}}"
        assert invoke(["run", "scenario.yaml", "--set", variants]) == 2
        assert "the engine runs on one device" in capsys.readouterr().err
        assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("dtype", "status"), [("float32", 0), ("bfloat16", 2)])
def test_triton_where_it_is_interpreted(dtype: str, status: int, model: Path, tmp_path: Path) -> None:
    laid_out(FAILURES[0]._replace(harm=lambda model: None), model, tmp_path)
    short = ("workload.count=1", "workload.lengths={prompt_tokens: 2, output_tokens: 1}")
    settings = ("engine.attention=triton", f"engine.dtype={dtype}", *short)
    asked = [part for setting in settings for part in ("--set", setting)]
    with Command("run", "scenario.yaml", "--no-report", *asked, cwd=tmp_path, environment=INTERPRETED) as command:
        ended = command.ended()
    assert ended.status == status, ended
    assert ("Triton's interpreter cannot compute in bfloat16" in ended.stderr) == (status == 2)


def options(model: Path, **changes: object) -> EngineOptions:
    fields = {"dtype": "float32", "page_size": 1, "max_running_requests": 2, "kv_tokens": 512, "context_length": 64}
    return EngineOptions(model=str(model), **{**fields, **changes})  # type: ignore[arg-type]


def test_no_process_is_left_by_a_broken_model(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / MODEL)
    reweighted(lambda tensors: tensors.pop(NORM))(tmp_path / MODEL)
    before = children()
    with pytest.raises(InputError, match=f"no tensor is called {NORM}") as told:
        ProcessDevice(options(tmp_path / MODEL))
    assert told.value.remedy == "are config.json and weights of one model?"
    assert not any(is_alive(child) for child in children() - before)


def children() -> set[int]:
    """Processes that this thread has started, for whichever test."""
    return set(map(int, Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()))


def worker_of(device: object) -> int:
    assert isinstance(device, ProcessDevice)
    return device._process.pid


def test_killed_between_launch_and_result() -> None:
    with tiny_device(256, in_process=False) as device:
        assert len(device.launch(prefill(0, 5)).wait().token_ids) == 1
        pid = worker_of(device)
        os.kill(pid, signal.SIGSTOP)
        launched = device.launch(prefill(1, 5))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(DeviceLost, match="was killed by SIGKILL"):
            launched.wait()
        with pytest.raises(DeviceLost, match="start the run again"):
            device.launch(prefill(2, 5))
    assert not is_alive(pid)


def test_a_step_beyond_the_memory() -> None:
    """The worker may take no more memory than it has, then a step needs a lot."""
    with tiny_device(4096, in_process=False, config={"intermediate_size": 65536}) as device:
        pid = worker_of(device)
        used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
        with pytest.raises(InputError, match="out of device memory: ") as told:
            device.launch(prefill(0, 4000)).wait()
        assert told.value.where == "engine.kv_tokens" and "choose a smaller model" in told.value.remedy


def test_a_defect_of_the_worker_is_one_of_the_program(capfd: pytest.CaptureFixture[str]) -> None:
    """It is not blamed on the scenario; the traceback goes where that of any defect goes."""
    with tiny_device(256, in_process=False) as device:
        assert isinstance(device, ProcessDevice)
        device._send(wire.Sample())  # nothing was launched
        with pytest.raises(RuntimeError, match="the worker process failed: AssertionError") as told:
            device.result(0)
    assert "Traceback" in told.value.__notes__[0] and "worker.py" in told.value.__notes__[0]
    assert capfd.readouterr().err == ""


def test_a_worker_ends_with_its_parent() -> None:
    """Also while it loads: nobody has to ask it for anything."""
    code = (
        "import sys, time\nfrom testbed.engine import process\n"
        "process.ProcessDevice._receive = lambda self: (print(self._process.pid, flush=True), time.sleep(100))\n"
        f"process.ProcessDevice(process.EngineOptions({str(Path(__file__).parent)!r}, 'float32', 1, 1))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    late = time.monotonic() + 60
    while is_alive(pid) and time.monotonic() < late:
        time.sleep(0.01)
    assert not is_alive(pid)


@pytest.mark.parametrize(
    ("raised", "becomes"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of device memory: CUDA out of memory"),
        (MemoryError(), "out of device memory: an allocation failed"),
        (RuntimeError("[enforce fail] can't allocate memory: 5 bytes"), "out of device memory"),
        (torch.AcceleratorError("CUDA error: unspecified launch failure\nmore"), "unspecified launch failure$"),
    ],
)
def test_errors_of_a_device(raised: Exception, becomes: str) -> None:
    with pytest.raises(InputError) as told, device_errors():
        raise raised
    assert re.search(becomes, told.value.message) and told.value.remedy and told.value.where


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes") as told, device_errors():
        raise RuntimeError("shapes do not fit")
    assert not isinstance(told.value, InputError)


def test_memory_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    told = free_bytes()
    monkeypatch.setattr(faults, "MEMINFO", Path("/nowhere"))
    assert 0 < told <= free_bytes()


def test_an_engine_that_is_not_installed(tmp_path: Path, model: Path) -> None:
    laid_out(FAILURES[0]._replace(harm=lambda model: None), model, tmp_path)
    code = "import sys; sys.modules['torch'] = None\nfrom testbed.cli.main import main\nmain()"
    command = [sys.executable, "-c", code, "run", "scenario.yaml"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "error: run: the engine is incomplete: torch is not installed\n  pip install" in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenario.yaml", MODEL]
