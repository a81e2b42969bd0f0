"""When a loop cannot go on: deadlocks say where it waits, exceptions arrive as they are, lost awaits are failures."""

from __future__ import annotations

import re
import warnings

import pytest

from testbed.loops.base import LoopContext
from testbed.loops.normal import event_loop_normal
from testbed.loops.overlap import event_loop_overlap
from testbed.runtime.modelled import Deadlock
from testbed.scenario.errors import InputError
from tests.loops.stages import pipeline, run_stages
from tests.properties.draws import LOOPS
from tests.properties.world import Job, engine, run


class Never:
    """A strategy that schedules nobody."""

    def next_batch(self, scheduler: object) -> None:
        return None


class DecodeOnly:
    """A strategy that forgets new requests."""

    def next_batch(self, scheduler: object) -> object:
        return scheduler.decode_batch()  # type: ignore[attr-defined]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("strategy", [Never, DecodeOnly])
def test_a_strategy_that_schedules_nobody_is_a_deadlock_with_its_place(loop: str, strategy: type) -> None:
    with pytest.raises(Deadlock) as caught:
        run(engine(loop=loop), [Job("r", arrival_ns=50), Job("s", arrival_ns=70)], strategy=strategy())
    report = str(caught.value)
    assert "2 requests are open" in report and "at 70 ns nothing can happen" in report
    assert re.search(rf"event_loop_{loop} \(line \d+\) > recv_requests \(line \d+\) > recv", report)


def test_a_policy_that_empties_the_queue_is_found() -> None:
    def forget(waiting: list[object], scheduler: object) -> None:
        waiting.clear()

    with pytest.raises(InputError, match="sort the waiting list in place"):
        run(engine(loop="normal"), [Job("r", outputs=30), Job("s", arrival_ns=8_000)], policy=forget)


@pytest.mark.parametrize("paced", [False, True])
def test_exceptions_arrive_with_their_own_type_and_message(paced: bool) -> None:
    class Broken(Exception):
        def __init__(self, one: int, two: str) -> None:  # cannot be made again from its arguments alone
            super().__init__(f"{one} and {two}")
            self.one = one

    async def loop(context: LoopContext) -> None:
        await context.recv_requests(block=True)
        raise Broken(7, "text")

    with pytest.raises(Broken, match=r"^7 and text$") as caught:
        run(engine(), [Job("r")], loop=loop, paced=paced)
    assert caught.value.one == 7 and caught.traceback[-1].name == "loop"


@pytest.mark.parametrize("paced", [False, True])
def test_a_forgotten_await_is_a_failure(paced: bool) -> None:
    async def loop(context: LoopContext) -> None:
        await context.recv_requests(block=True)
        context.recv_requests(block=False)  # type: ignore[unused-coroutine]
        raise EOFError

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(EOFError):
            run(engine(), [Job("r")], loop=loop, paced=paced)
    assert any("never awaited" in str(warning.message) for warning in seen)


def test_never_awaited_is_an_error_in_this_suite(request: pytest.FixtureRequest) -> None:
    assert "error" in request.config.getini("filterwarnings")


@pytest.mark.parametrize("paced", [False, True])
def test_a_loop_that_awaits_what_is_no_port_is_refused(paced: bool) -> None:
    import types

    @types.coroutine
    def elsewhere() -> object:
        yield

    async def loop(context: LoopContext) -> None:
        await elsewhere()

    with pytest.raises(InputError, match="not a port") as caught:
        run(engine(), [Job("r")], loop=loop, paced=paced)
    assert caught.value.where == "engine.loop" and caught.value.remedy


def test_a_loop_of_ones_own_runs_unchanged() -> None:
    """A loop is a coroutine function over the ports, nothing more."""

    async def chatty(context: LoopContext) -> None:
        context.scheduler.recorder.count("mine")
        await event_loop_normal(context)

    outcome = run(engine(), [Job("r")], loop=chatty)
    assert outcome.records.counters["mine"] == 1


def test_a_loop_that_knows_of_no_stages_is_refused_in_a_pipeline() -> None:
    for loop in (event_loop_normal, event_loop_overlap):
        with pytest.raises(InputError, match="last stage alone draws them") as caught:
            run_stages(pipeline(2), [Job("r")], loop=loop)
        assert caught.value.where == "engine.loop" and caught.value.remedy
