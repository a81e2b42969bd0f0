"""``testbed bench`` from the command line."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.cli.main import INTERRUPTED, MISSED, OK, WRONG_INPUT, invoke
from testbed.metrics.run import Run
from tests.study.stand_in import Asked, StandIn, one_by_one

SCENARIO = """\
name: Small
model: qwen3-0.6b
device: {constant: {prefill_ns: 5000000, decode_ns: 1000000}}
host: none
engine: {kv_tokens: 10000}
workload:
  arrivals: {kind: constant, rate_per_s: 400}
  lengths: {prompt_tokens: 20, output_tokens: 5}
  count: 8
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "s.yaml").write_text(SCENARIO, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_bench_is_reported_and_compared_with_a_simulation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StandIn() as server:
        assert invoke(["bench", server.url, "s.yaml", "-o", "bench", "--trace"]) == OK
    out = capsys.readouterr().out
    assert "Serving Benchmark Result" in out and "stand-in" in out and "report: bench/report.html" in out
    page = (folder / "bench/report.html").read_text(encoding="utf-8")
    assert "Requests under way" in page and "waiting included" in page and server.url in page
    for inside in ("KV cache", "Device and host", "decision digest"):
        assert inside not in page
    assert (folder / "bench/trace.pftrace").stat().st_size > 0
    assert json.loads((folder / "bench/run.json").read_text())["steps"] is None

    assert invoke(["simulate", "s.yaml", "-o", "simulated", "--no-report"]) == OK
    capsys.readouterr()
    assert invoke(["compare", "simulated", "bench", "-o", "both"]) == OK
    assert "paired" in capsys.readouterr().out
    assert invoke(["compare", "bench", "bench", "-o", "twice"]) == OK
    for name, loads in (("both", 1), ("twice", 0)):
        assert len(list((folder / name / "figures").glob("load_*.svg"))) == loads
        assert ("Load of each run" in (folder / name / "report.html").read_text(encoding="utf-8")) == bool(loads)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([], OK),
        (["--fail-if", "completed<8"], OK),
        (["--fail-if", "p99_send_delay_ms<0"], OK),
        (["--fail-if", "completed<=8"], MISSED),
        (["--fail-if", "mean_batch_size>0"], MISSED),  # a client cannot know it: nothing is proven
        (["--set", "slo={ttft_ms: {p99: 0.0001}}"], MISSED),
        (["--fail-if", "nonsense>1"], WRONG_INPUT),
        (["--chat"], WRONG_INPUT),
    ],
)
def test_exit_status(folder: Path, arguments: list[str], status: int) -> None:
    with StandIn() as server:
        assert invoke(["bench", server.url, "s.yaml", "-o", "out", "--no-report", *arguments]) == status
    assert (folder / "out/run.json").is_file() == (status != WRONG_INPUT)


def test_no_server(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StandIn() as server:
        pass
    assert invoke(["bench", server.url, "s.yaml"]) == WRONG_INPUT
    assert "no server answers" in capsys.readouterr().err and not (folder / "runs").exists()


def test_the_key_may_come_from_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-shell")
    with StandIn() as server:
        assert invoke(["bench", server.url, "s.yaml", "--no-report"]) == OK
    assert {asked.headers["authorization"] for asked in server.asked.values()} == {"Bearer from-the-shell"}


def test_variants_of_the_workload_and_of_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = "compare:\n  slow: {workload.arrivals.rate_per_s: 200}\n  fast: {workload.arrivals.rate_per_s: 800}\n"
    (folder / "rates.yaml").write_text(SCENARIO + rates, encoding="utf-8")
    loops = "compare:\n  normal: {engine.loop: normal}\n  overlap: {engine.loop: overlap}\n"
    (folder / "loops.yaml").write_text(SCENARIO + loops, encoding="utf-8")
    with StandIn() as server:
        assert invoke(["bench", server.url, "rates.yaml", "-o", "rates", "--no-report"]) == OK
        assert {path.name for path in (folder / "rates").iterdir()} == {"slow", "fast", "comparison"}
        assert invoke(["bench", server.url, "loops.yaml", "-o", "loops"]) == WRONG_INPUT
    assert "variants of the engine do not reach the server" in capsys.readouterr().err
    assert not (folder / "loops").exists()


def test_failures_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def answer(asked: Asked) -> None:
        await (asked.status("503 Busy", {"error": {"message": "full"}}) if asked.rid == "r1" else one_by_one(asked))

    with StandIn(answer) as server:
        assert invoke(["bench", server.url, "s.yaml", "--no-report"]) == OK
    captured = capsys.readouterr()
    assert "note: 1 requests failed: refused; the first, r1: HTTP 503: full" in captured.err
    assert "Failed refused:" in captured.out


def test_ctrl_c_keeps_what_there_is(folder: Path) -> None:
    """Half of the requests are answered, the others never; then somebody interrupts."""

    async def answer(asked: Asked) -> None:
        if int(asked.rid[1:]) % 2:
            await asyncio.sleep(1000)
        await one_by_one(asked)
        answered.append(asked.rid)

    answered: list[str] = []
    with StandIn(answer) as server:
        command = [sys.executable, "-m", "testbed.cli.main", "bench", server.url, "s.yaml", "-o", "out"]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert all(server.arrived.acquire(timeout=60) for _ in range(8))
        while len(answered) < 4:
            assert process.poll() is None
            signal.sigtimedwait([], 0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, stderr
    assert "Traceback" not in stderr and "were under way" in stdout
    run = Run.load(folder / "out")
    assert run.meta["interrupted"] is True
    ended = dict(zip(run.records.requests["id"], run.records.requests["finish_reason"], strict=True))
    assert len(ended) == 8 and all(ended[f"r{odd}"] == "" for odd in (1, 3, 5, 7))
    assert set(ended.values()) <= {"", "length"}
