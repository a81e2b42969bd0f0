"""``testbed run`` on the CPU as a user meets it: what it leaves behind, and how Ctrl-C and a lost worker end it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from testbed import Run, execute
from testbed.cli.main import BROKEN_PIPE, INTERRUPTED, OK, WRONG_INPUT, invoke
from testbed.engine.models.create import Sizes, create_model
from testbed.metrics.laws import violations
from tests.cli.terminal import Command, Ended, is_alive

SCENARIO = """\
name: real
model: tiny
device: h100-sxm
engine: {kv_tokens: 2048, max_running_requests: 8, context_length: 256}
workload:
  arrivals: {kind: poisson, rate_per_s: 20}
  lengths: {prompt_tokens: {kind: uniform, low: 5, high: 90}, output_tokens: {kind: uniform, low: 1, high: 20}}
  count: 12
"""
LOOPS = "compare:\n  normal: {engine.loop: normal}\n  overlap: {engine.loop: overlap}\n"
LONG = ("--set", "workload.count=50000")
"""More than a test waits for."""
SOME_FINISHED = r"[1-9]\d* of 50,000 finished"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_model("llama-3.1-8b", tmp_path_factory.mktemp("models") / "tiny", Sizes(layers=1, hidden=32))


@pytest.fixture
def folder(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny").symlink_to(model)
    (tmp_path / "one.yaml").write_text(SCENARIO, encoding="utf-8")
    (tmp_path / "loops.yaml").write_text(SCENARIO + LOOPS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def meta(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())["meta"]
    return found


def test_both_loops_run_and_are_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["run", "loops.yaml", "-o", "out", "--no-report"]) == OK
    printed = capsys.readouterr()
    assert "paired" in printed.out and "Successful requests:                     12" in printed.out
    for name in ("normal", "overlap"):
        run = Run.load(folder / "out" / name)
        assert not violations(run.records)
        assert (run.meta["label"], run.meta["loop"], run.meta["host"]) == ("real", name, "this machine")
        assert run.meta["device"] == run.meta["provenance"]["machine"]
        assert set(run.records.requests["finish_reason"]) == {"length"}
        assert (np.asarray(run.records.steps["gpu_ns"]) > 0).all()
        assert f"note: {name}: computed in bfloat16 on " in printed.err
    assert (folder / "out/comparison/compare.json").is_file()
    assert invoke(["report", "out/overlap"]) == OK
    page = (folder / "out/overlap/report.html").read_text()
    assert "simulated" not in page and run.meta["device"] in page


def test_weights_are_drawn_where_there_are_none(folder: Path, model: Path) -> None:
    """A config alone is a model, without a tokenizer too; what was chosen is said."""
    (folder / "tiny").unlink()
    (folder / "tiny").mkdir()
    (folder / "tiny/config.json").write_bytes((model / "config.json").read_bytes())
    assert invoke(["run", "one.yaml", "--no-report", "--set", "engine.kv_tokens=null", "-o", "out"]) == OK
    notes = meta(folder / "out")["notes"]
    assert "weights: random, seed 0, deviation 0.02" in notes
    assert "KV: at most 1.07 GB on a CPU; engine.kv_tokens says otherwise" in notes


def cleanly_interrupted(ended: Ended) -> None:
    assert ended.status == INTERRUPTED, ended
    assert ended.stderr.rstrip().endswith("interrupted") and "Traceback" not in ended.stderr


def test_ctrl_c_keeps_the_records_so_far(folder: Path) -> None:
    """The variant that ran is saved, the next is not begun."""
    with Command("run", "loops.yaml", *LONG, "-o", "out", cwd=folder) as command:
        command.wait_for(SOME_FINISHED)
        worker = command.worker()
        command.interrupt()
        ended = command.ended()
    cleanly_interrupted(ended)
    assert not is_alive(worker)
    assert "Serving Benchmark Result" in ended.stdout and "run: out/normal" in ended.stdout
    assert {path.name for path in (folder / "out").iterdir()} == {"normal"}
    run = Run.load(folder / "out/normal")
    assert run.meta["interrupted"] and re.match(r"interrupted: .* of 50,000 requests had ended", run.meta["notes"][0])
    finish = np.asarray(run.records.requests["finish_ns"])
    assert 0 < (finish >= 0).sum() < 50_000
    assert not violations(run.records)
    assert invoke(["replay", "out/normal"]) == OK


def test_ctrl_c_while_the_model_loads(folder: Path) -> None:
    with Command("run", "one.yaml", cwd=folder) as command:
        worker = command.worker()
        command.interrupt()
        ended = command.ended()
    cleanly_interrupted(ended)
    assert not is_alive(worker) and not (folder / "runs").exists() and not ended.stdout


def test_a_second_ctrl_c_does_not_wait_for_the_device(folder: Path) -> None:
    """The worker is stopped in the middle of a step: its result never comes."""
    busy = ("--set", "workload.arrivals.rate_per_s=1000")
    with Command("run", "one.yaml", *LONG, *busy, cwd=folder) as command:
        command.wait_for(SOME_FINISHED)
        worker = command.worker()
        os.kill(worker, signal.SIGSTOP)
        time.sleep(0.5)  # until what it had sent is processed, and its next result waited for
        command.interrupt()
        time.sleep(0.5)  # or the two would be one
        assert command.is_running
        command.interrupt()
        ended = command.ended()
    cleanly_interrupted(ended)
    assert not is_alive(worker) and not (folder / "runs").exists() and not ended.stdout


def test_ctrl_c_while_saving_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("testbed.metrics.files.write_json", interrupted)
    assert invoke(["run", "one.yaml", "--paced", "-o", "out"]) == INTERRUPTED
    assert not (folder / "out").exists()


def test_ctrl_c_before_there_is_a_figure(folder: Path) -> None:
    early = ("--set", "measure.skip_s=1000")
    with Command("run", "one.yaml", "--paced", *LONG, *early, cwd=folder) as command:
        command.wait_for(SOME_FINISHED)
        command.interrupt()
        ended = command.ended()
    cleanly_interrupted(ended)
    assert "run: runs/real-1" in ended.stdout


def test_ctrl_c_on_a_modelled_device(folder: Path) -> None:
    with Command("run", "one.yaml", "--paced", *LONG, cwd=folder) as command:
        command.wait_for(SOME_FINISHED)
        command.interrupt()
        ended = command.ended()
    cleanly_interrupted(ended)
    assert "run: runs/real-1" in ended.stdout
    assert meta(folder / "runs/real-1")["interrupted"]


@pytest.mark.parametrize("moment", ["loading", "running"])
def test_a_worker_that_vanishes(moment: str, folder: Path) -> None:
    with Command("run", "one.yaml", *LONG, cwd=folder) as command:
        if moment == "running":
            command.wait_for(SOME_FINISHED)
        os.kill(command.worker(), signal.SIGKILL)
        ended = command.ended()
    assert ended.status == WRONG_INPUT
    assert "error: run: the device is lost: its process (a CPU worker) was killed by SIGKILL" in ended.stderr
    assert "Traceback" not in ended.stderr and not ended.stdout
    assert not (folder / "runs").exists()


def test_progress_is_told_in_time_not_in_steps(folder: Path) -> None:
    told: list[tuple[int, int, int, int, int | None]] = []
    execute("one.yaml", paced=True, progress=lambda *state: told.append(state))
    times = [state[0] for state in told]
    assert told and (np.diff(times) >= 500_000_000).all()
    assert {state[4] for state in told} == {12}


def test_nobody_reads(folder: Path) -> None:
    command = f"{sys.executable} -m testbed.cli.main run one.yaml --paced --no-report | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == BROKEN_PIPE and "Traceback" not in ended.stderr
