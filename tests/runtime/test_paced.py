"""The wall clock over a modelled device: decisions and tokens as in virtual time, and time that really passes."""

from __future__ import annotations

import time

import numpy as np
import pytest

from testbed.costs import constant_host
from testbed.messages import SlowDown, Timer
from testbed.ports import Stage
from testbed.runtime.wall import WallRuntime
from testbed.scenario.schema import ConstantDevice
from tests.properties.draws import LOOPS, STRATEGIES
from tests.properties.world import Job, burst, engine, run

QUICK = ConstantDevice(prefill_ns=20_000, decode_ns=10_000)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("batching", STRATEGIES)
@pytest.mark.parametrize("sglang", [False, True])
def test_the_same_decisions_as_in_virtual_time(loop: str, batching: str, sglang: bool) -> None:
    """Arrivals tied to iterations, with chunks and retractions: byte for byte the same log, the same tokens."""
    config = engine(sglang, loop=loop, batching=batching, chunked_prefill_size=16, clip_max_new_tokens=1)
    jobs = [job._replace(iteration=2 * i) for i, job in enumerate(burst(6, 18, 16))]
    virtual, paced = (run(config, jobs, kv_tokens=80, device=QUICK, paced=paced) for paced in (False, True))
    assert virtual.column("retractions").sum() > 0 or batching == "static"
    assert paced.records.decisions == virtual.records.decisions
    assert paced.streams() == virtual.streams()


@pytest.mark.parametrize("loop", LOOPS)
def test_the_device_takes_its_time(loop: str) -> None:
    device = ConstantDevice(prefill_ns=2_000_000, decode_ns=1_000_000)
    began = time.perf_counter_ns()
    outcome = run(engine(loop=loop), [Job("r", outputs=10)], device=device, paced=True)
    assert time.perf_counter_ns() - began >= 2_000_000 + 9 * 1_000_000
    steps = outcome.records.steps
    assert (np.asarray(steps["gpu_ns"]) >= [2_000_000] + [1_000_000] * (len(outcome.batches) - 1)).all()


def test_requests_arrive_when_they_are_due() -> None:
    jobs = [Job(f"r{i}", arrival_ns=20_000_000 * i) for i in range(3)]
    outcome = run(engine(), jobs, device=QUICK, paced=True)
    late = outcome.column("queued_ns") - outcome.column("arrival_ns")
    assert (late >= 0).all() and (outcome.column("first_token_ns") > outcome.column("arrival_ns")).all()


def test_users_who_answer() -> None:
    """A request sent when another ends, after a pause."""

    def next_turn(rid: str, now_ns: int) -> list[Job]:
        turn = int(rid[1:])
        return [Job(f"t{turn + 1}", arrival_ns=now_ns + 5_000_000)] if turn < 3 else []

    outcome = run(engine(), [Job("t0")], device=QUICK, answer=next_turn, paced=True)
    arrival, finish = outcome.column("arrival_ns"), outcome.column("finish_ns")
    assert len(arrival) == 4 and (arrival[1:] - finish[:-1] >= 4_000_000).all()


def test_timers_wake_the_loop() -> None:
    woken: list[int] = []

    def post(scheduler: object, runtime: WallRuntime) -> None:
        handle = scheduler.handle_message  # type: ignore[attr-defined]

        def handling(now_ns: int, message: object) -> object:
            if isinstance(message, Timer):
                woken.append(now_ns)
            return handle(now_ns, message)

        scheduler.handle_message = handling  # type: ignore[attr-defined]
        runtime.post_at(runtime.now_ns() + 10_000_000, Timer("late"))

    for paced in (True, False):
        woken.clear()

        def at_ten_ms(scheduler: object, runtime: WallRuntime, paced: bool = paced) -> None:
            if paced:
                post(scheduler, runtime)
            else:
                runtime.now_ns = lambda: 0  # type: ignore[method-assign]
                post(scheduler, runtime)

        run(engine(), [Job("r")], device=QUICK, paced=paced, before=at_ten_ms)
        (at,) = woken
        assert at >= 10_000_000


def test_sleep() -> None:
    script = {0: [SlowDown(3_000_000)]}
    outcome = run(engine(loop="normal"), [Job("r", outputs=5, iteration=0)], device=QUICK, script=script, paced=True)
    launches = np.asarray(outcome.records.steps["launch_ns"])
    assert (np.diff(launches) >= 3_000_000).all()


@pytest.mark.parametrize("loop", LOOPS)
def test_an_injected_host_takes_at_least_its_time(loop: str) -> None:
    iteration_ns = 500_000
    outcome = run(
        engine(loop=loop),
        [Job("r", outputs=20)],
        device=QUICK,
        inject=constant_host(iteration_ns),
        paced=True,
    )
    spans = outcome.records.spans
    names, lanes = np.asarray(spans["name"]), np.asarray(spans["lane"])
    schedule = (names == Stage.SCHEDULE) & (lanes == 0)
    spent = (np.asarray(spans["end_ns"]) - np.asarray(spans["begin_ns"]))[schedule]
    assert schedule.sum() >= 20 and (spent >= iteration_ns).all()
    assert outcome.makespan_ns() >= 20 * iteration_ns


@pytest.mark.parametrize("loop", LOOPS)
def test_spans_do_not_overlap(loop: str) -> None:
    outcome = run(engine(loop=loop), burst(4, 9, 8), device=QUICK, paced=True)
    spans = outcome.records.spans
    host = np.asarray(spans["lane"]) == 0
    begin, end = np.asarray(spans["begin_ns"])[host], np.asarray(spans["end_ns"])[host]
    assert (end >= begin).all() and (begin[1:] >= end[:-1]).all()
