"""The designs of overlap beside one another: the same decisions and tokens, and each its own times."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.batch import Batch
from testbed.costs import HostProfile, load_host
from testbed.costs.host import Terms
from testbed.loops import overlap_thread
from testbed.loops.base import LoopContext
from testbed.loops.overlap_thread import ForwardThread
from testbed.messages import AbortRequest, GrammarReady, GrammarSpec, Message
from testbed.ports import Stage
from testbed.runtime.modelled import Deadlock
from testbed.scenario.schema import ConstantDevice
from testbed.study.replay import replay
from tests.properties import test_grammar_mutants as defects
from tests.properties.draws import DESIGNS, World, worlds
from tests.properties.grammars import Rule, run_constrained
from tests.properties.test_leap import same
from tests.properties.test_mutants import around
from tests.properties.world import Job, Outcome, Script, burst, engine, run
from tests.study.recorded import as_run

DRAWN = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), max_examples=60)
ANY = GrammarSpec("json_object")
HOSTS = (0, 700, "sglang-0.5", "testbed")


class ReadyWhenTold:
    """Grammars that are compiled when a message of the script says so: by step, whatever the time."""

    def __init__(self, scheduler: Any, runtime: Any) -> None:
        runtime.grammars = self

    def compile(self, rank: int, spec: GrammarSpec) -> None:
        pass

    def masks(self, batch: Batch) -> None:
        pass

    def accept(self, rank: int, token_id: int) -> None:
        pass

    def forget(self, rank: int) -> None:
        pass


def by_step(world: World, with_grammar: list[bool], cut: list[tuple[int, int]]) -> tuple[list[Job], Script]:
    """The world's jobs, every other iteration one, with grammars that are ready some iterations later, and aborts."""
    jobs = [job._replace(iteration=2 * i, max_new_tokens=None) for i, job in enumerate(world.jobs)]
    script: dict[int, list[Message]] = {}
    for i, (job, chosen) in enumerate(zip(jobs, with_grammar * len(jobs), strict=False)):
        if chosen:
            jobs[i] = job._replace(grammar=ANY)
            script.setdefault(2 * i + 1 + i % 4, []).append(GrammarReady(i))
    jobs.append(Job("last", iteration=2 * len(jobs) + 6))
    for at, which in cut:
        script.setdefault(at, []).append(AbortRequest(f"r{which}"))
    return jobs, script


@DRAWN
@given(
    worlds(loop="overlap"),
    st.lists(st.booleans(), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), max_size=3),
    st.sampled_from(HOSTS),
)
def test_every_design_decides_the_same(
    world: World, with_grammar: list[bool], cut: list[tuple[int, int]], host: int | str
) -> None:
    """With arrivals, aborts and grammars tied to iterations: the bytes of the decision log, and every end."""
    jobs, script = by_step(world, with_grammar, cut)
    streams, *others = (
        run(
            world.twin(loop=loop).config,
            jobs,
            kv_tokens=world.kv_tokens,
            host=host,
            script=script,
            before=ReadyWhenTold,
        )
        for loop in DESIGNS
    )
    for other in others:
        assert other.records.decisions == streams.records.decisions
        assert other.streams() == streams.streams()
        assert [output.rid for output in other.sent] == [output.rid for output in streams.sent]
        assert other.records.steps["extra_rows"].tolist() == streams.records.steps["extra_rows"].tolist()  # type: ignore[union-attr]


# -- the design with a thread ------------------------------------------------------------------------------------------


def waking(iteration_ns: int, wake_ns: int) -> HostProfile:
    """A host that costs the same in every iteration, and takes a while to wake a thread."""
    terms = {Stage.SCHEDULE: Terms(fixed=float(iteration_ns))}
    return HostProfile("waking", terms, terms, wake_ns=wake_ns)


@DRAWN
@given(worlds(loop="overlap"), st.sampled_from(HOSTS[:3]))
def test_a_thread_that_is_woken_at_no_cost_gains_nothing_and_loses_nothing(world: World, host: int | str) -> None:
    """Two threads that share an interpreter do the host's work one after the other, as one does: every time of every
    step and request is that of the streams design, where no grammar makes sampling wait."""
    profile: HostProfile | int = host if isinstance(host, int) else load_host(host)
    if isinstance(profile, HostProfile):
        profile.wake_ns = 0
    streams, thread = (
        run(world.twin(loop=loop).config, world.jobs, kv_tokens=world.kv_tokens, host=profile)
        for loop in ("overlap", "overlap_thread")
    )
    for name in ("launch_ns", "start_ns", "end_ns", "rows"):
        assert np.array_equal(thread.records.steps[name], streams.records.steps[name]), name
    assert np.array_equal(thread.records.token_times_ns, streams.records.token_times_ns)


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize(("host_ns", "gpu_ns"), [(10, 100), (100, 100), (100, 10), (0, 50), (50, 0), (96, 100)])
@pytest.mark.parametrize("wake_ns", [0, 3, 20])
def test_makespan(steps: int, host_ns: int, gpu_ns: int, wake_ns: int) -> None:
    """A step wakes both threads, so the host's share of it is c' = c + 2 w. Of N steps with g on the device the last
    token is out when the device is done, or when the step behind it is launched: (N + 1) c' at least."""
    device = ConstantDevice(prefill_ns=gpu_ns, decode_ns=gpu_ns)
    host = waking(host_ns, wake_ns)
    outcome = run(engine(loop="overlap_thread"), [Job("r", outputs=steps, iteration=0)], device=device, host=host)
    each = host_ns + 2 * wake_ns
    assert outcome.makespan_ns() == max((steps + 1) * each, host_ns + wake_ns + steps * gpu_ns)


def begins(outcome: Outcome, stage: Stage) -> dict[int, int]:
    """When this stage of each step began, ns."""
    spans = {name: np.asarray(column) for name, column in outcome.records.spans.items()}
    rows = (spans["lane"] == 0) & (spans["name"] == stage)
    return dict(zip(spans["step"][rows].tolist(), spans["begin_ns"][rows].tolist(), strict=True))


def test_a_result_is_processed_behind_the_next_launch_and_before_its_sampling_where_a_grammar_waits() -> None:
    for grammar in (None, ANY):
        jobs = [job._replace(grammar=grammar) for job in burst(2, outputs=9)]
        outcome = run(engine(loop="overlap_thread"), jobs, host="sglang-0.5")
        processed, sampled = begins(outcome, Stage.PROCESS), begins(outcome, Stage.SAMPLE)
        for batch, result in outcome.batches[1:]:
            assert result.launch_ns < processed[batch.index - 1]
            assert (processed[batch.index - 1] < sampled[batch.index]) is (grammar is not None)


def test_masks_wait_for_a_result_without_a_grammar_too() -> None:
    """Unlike with streams, where a batch with a grammar is sampled at once if none before it has one."""
    jobs = [Job("plain", outputs=20), Job("bound", outputs=3, grammar=ANY)]
    slow = ConstantDevice(prefill_ns=10**7, decode_ns=10**7)
    for loop, waits in (("overlap", False), ("overlap_thread", True)):
        outcome = run(engine(loop=loop), jobs, host="sglang-0.5", device=slow)
        first = next(batch.index for batch, _ in outcome.batches if batch.has_grammar)
        assert first > 0
        assert (begins(outcome, Stage.PROCESS)[first - 1] < begins(outcome, Stage.SAMPLE)[first]) is waits


def without_the_dummy_first_batch(patch: pytest.MonkeyPatch) -> None:
    async def launched_only(loop: LoopContext, forward: ForwardThread) -> None:
        await forward.launched()

    patch.setattr(overlap_thread, "process_dummy_first_batch", launched_only)


def test_the_dummy_first_batch_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, nobody announces the masks behind an empty pipeline, and the report says who waits for whom."""
    config, jobs = engine(loop="overlap_thread"), [Job("r", outputs=5, grammar=ANY)]
    assert run(config, jobs).outputs["r"].status == 200
    without_the_dummy_first_batch(monkeypatch)
    with pytest.raises(Deadlock) as caught:
        run(config, jobs)
    report = str(caught.value)
    assert "1 requests are open" in report
    assert re.search(r"event_loop_overlap_thread \(line \d+\) > process_batch_result .* > result .* > recv", report)
    assert re.search(r"forward thread waits in .*_run \(line \d+\) > wait", report)
    assert run(config, [Job("plain", outputs=5)]).outputs["plain"].status == 200, "it is needed with grammars only"


def test_every_pause_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    dummies: list[int] = []
    process = overlap_thread.process_dummy_first_batch

    async def counted(loop: LoopContext, forward: ForwardThread) -> None:
        dummies.append(loop.scheduler.steps - 1)
        await process(loop, forward)

    monkeypatch.setattr(overlap_thread, "process_dummy_first_batch", counted)
    jobs = [Job(f"r{i}", outputs=4, arrival_ns=i * 10**9, grammar=ANY) for i in range(3)]
    outcome = run(engine(loop="overlap_thread"), jobs)
    assert dummies == [batch.index for batch, _ in outcome.batches if batch.prefills]


# -- the same on the wall clock ----------------------------------------------------------------------------------------


def test_a_thread_of_the_operating_system_gives_the_same_tokens() -> None:
    """Each token follows from the one before, under masks that the loop's thread makes and the forward thread uses."""
    jobs = burst(6, prompt=15, outputs=30)
    jobs = [job._replace(grammar=Rule(i, 20 + i).spec() if i % 3 else None, iteration=i) for i, job in enumerate(jobs)]
    for kv_tokens in (90, 4096):
        config = engine(loop="overlap_thread", chunked_prefill_size=16, clip_max_new_tokens=1)
        thread, grammars = run_constrained(config, jobs, kv_tokens=kv_tokens)
        streams, _ = run_constrained(config.model_copy(update={"loop": "overlap"}), jobs, kv_tokens=kv_tokens)
        assert thread.streams() == streams.streams()
        assert grammars.accepted > 0


def masks_are_announced_at_once(patch: pytest.MonkeyPatch) -> None:
    async def run_batch(original: Any, self: ForwardThread, batch: Batch) -> Any:
        submitted = await original(self, batch)
        self._loop._sample()
        return submitted

    around(patch, ForwardThread, "run_batch", run_batch)


@pytest.mark.parametrize(
    "break_it",
    [
        masks_are_announced_at_once,
        defects.tokens_are_not_accepted,
        defects.sampled_before_the_tokens_are_accepted,
        defects.first_tokens_are_not_accepted,
    ],
)
def test_masks_that_come_too_early_are_found(
    break_it: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [job._replace(grammar=Rule(i, 20).spec()) for i, job in enumerate(burst(3, outputs=30))]
    run_constrained(engine(loop="overlap_thread"), jobs)
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        run_constrained(engine(loop="overlap_thread"), jobs)


@settings(DRAWN, max_examples=25)
@given(
    worlds(loop="overlap_thread"),
    st.lists(st.booleans(), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), max_size=3),
)
def test_threads_decide_as_in_virtual_time(world: World, with_grammar: list[bool], cut: list[tuple[int, int]]) -> None:
    jobs, script = by_step(world, with_grammar, cut)
    virtual, paced = (
        run(world.config, jobs, kv_tokens=world.kv_tokens, script=script, before=ReadyWhenTold, paced=paced)
        for paced in (False, True)
    )
    assert paced.records.decisions == virtual.records.decisions
    assert paced.streams() == virtual.streams()


def test_the_deadlock_is_found_on_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    without_the_dummy_first_batch(monkeypatch)
    with pytest.raises(Deadlock, match="each waits for another: the loop, forward thread"):
        run_constrained(engine(loop="overlap_thread"), [Job("r", grammar=Rule(1, 3).spec(), iteration=0)])


def test_a_failure_in_the_forward_thread_ends_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Exception):
        pass

    def launch(*_: object) -> None:
        raise Broken("of the device")

    def before(scheduler: object, runtime: Any) -> None:
        runtime.launch = launch

    for paced in (False, True):
        with pytest.raises(Broken, match="of the device"):
            run(engine(loop="overlap_thread"), [Job("r")], before=before, paced=paced)


def test_injected_host_work_of_two_threads_excludes_each_other() -> None:
    """As the work of one interpreter does: no two spans of the host overlap."""
    terms = {stage: Terms(fixed=100_000.0) for stage in (Stage.LAUNCH, Stage.SAMPLE, Stage.PROCESS, Stage.SEND)}
    slow = HostProfile("slow", terms, terms)
    outcome = run(engine(loop="overlap_thread"), burst(3, outputs=12), paced=True, inject=slow)
    spans = {name: np.asarray(column) for name, column in outcome.records.spans.items()}
    rows = (spans["lane"] == 0) & np.isin(spans["name"], list(terms))
    found = sorted(zip(spans["begin_ns"][rows].tolist(), spans["end_ns"][rows].tolist(), strict=True))
    assert len(found) == 4 * len(outcome.batches)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(found))


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    run(engine(loop="overlap_thread"), burst(2), paced=True)
    for thread in threading.enumerate():
        if thread.name == "forward thread":
            thread.join(timeout=10)
    assert threading.active_count() == before


# -- what is done with runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paced", [False, True])
@pytest.mark.parametrize("loop", DESIGNS)
def test_its_runs_are_replayed(loop: str, paced: bool) -> None:
    jobs = burst(6, prompt=15, outputs=30)
    outcome = run(engine(loop=loop, clip_max_new_tokens=1), jobs, kv_tokens=90, paced=paced)
    again = replay(as_run(outcome, 90))
    assert again.equal and again.steps == len(outcome.batches), again.last.explain()


@DRAWN
@given(worlds(loop="overlap_suspended"), st.sampled_from([0, 700, 4_000]))
def test_a_leap_changes_nothing(world: World, host: int) -> None:
    jobs = [job._replace(outputs=job.outputs * 10, max_new_tokens=None) for job in world.jobs]
    leapt, stepped = (run(world.config, jobs, host=host, checks="delta", leap=leap) for leap in (True, False))
    same(leapt, stepped)


# -- suspended between prefills ----------------------------------------------------------------------------------------


def test_it_is_suspended_between_two_prefills_and_nowhere_else() -> None:
    """Then the second is launched when the first tokens of the first are out; any other launch is ahead of the result
    before it."""
    jobs = [Job(f"r{i}", ((f"p{i}", 40),), 6, arrival_ns=9_000 * (i // 3)) for i in range(12)]
    for loop in DESIGNS:
        outcome = run(engine(loop=loop, max_running_requests=12, chunked_prefill_size=40), jobs, host=400)
        sent = outcome.records.journal.sent  # type: ignore[union-attr]
        pairs = [(before, batch, result) for (before, _), (batch, result) in pairwise(outcome.batches)]
        suspended = [bool(before.prefills and batch.prefills) for before, batch, _ in pairs]
        assert suspended.count(True) > 4 < suspended.count(False)
        in_turn = [result.launch_ns >= sent[before.index] for before, _, result in pairs]
        assert in_turn == (suspended if loop == "overlap_suspended" else [False] * len(pairs))


def test_first_tokens_do_not_wait_for_the_launch_of_the_next_prefill() -> None:
    """Launching takes longer than the device here: a first token is out that much earlier."""
    jobs = [Job(f"r{i}", ((f"p{i}", 40),), 1) for i in range(4)]
    config = {"chunked_prefill_size": 40, "max_prefill_tokens": 40}
    host = HostProfile("slow to launch", {}, {Stage.LAUNCH: Terms(fixed=50_000.0)})
    device = ConstantDevice(prefill_ns=10_000, decode_ns=10_000)
    overlap, suspended = (
        run(engine(loop=loop, **config), jobs, host=host, device=device).column("first_token_ns")
        for loop in ("overlap", "overlap_suspended")
    )
    assert overlap.tolist() == [100_000, 150_000, 200_000, 210_000]
    assert suspended.tolist() == [60_000, 120_000, 180_000, 240_000]
