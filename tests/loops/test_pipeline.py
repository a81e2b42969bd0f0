"""The pipeline loops: the same tokens through any number of stages, the same decisions on all of them, and the time
that the stages' devices leave them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.batch import Batch
from testbed.loops.pipeline import StagesDisagree
from testbed.messages import (
    AbortRequest,
    ControlOutput,
    FlushCache,
    GetInternalState,
    GrammarSpec,
    Message,
    SetInternalState,
    SlowDown,
)
from testbed.request import ADVANCES
from testbed.scenario.schema import ConstantDevice
from testbed.scheduler.scheduler import Scheduler
from tests.loops.stages import PIPELINES, Staged, pipeline, run_stages, same_everywhere
from tests.properties.draws import STRATEGIES, World, worlds
from tests.properties.world import Job, burst, engine, run

DRAWN = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), max_examples=30)
LOOPS = pytest.mark.parametrize("loop", PIPELINES)
STAGES = pytest.mark.parametrize("stages", [2, 3, 4])
LOAD = [Job(f"s{i}", (("stem", 20), (f"own {i}", 5)), 4 + i, arrival_ns=9_000 * i) for i in range(6)]
aborts = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)), max_size=4)


def script_of(chosen: list[tuple[int, int]]) -> dict[int, list[Message]]:
    script: dict[int, list[Message]] = {}
    for at, which in chosen:
        script.setdefault(at, []).append(AbortRequest(f"r{which}"))
    return script


# -- tokens and decisions ------------------------------------------------------------------------------------------


@DRAWN
@given(worlds(), st.sampled_from([2, 3, 4]), st.sampled_from(sorted(PIPELINES)), aborts)
def test_the_oracles_tokens_whatever_happens(world: World, stages: int, loop: str, cut: list[tuple[int, int]]) -> None:
    """Small pools, so that retraction is common; every stage decides the same at every step, and proves it."""
    config = world.twin(parallel={"pp": stages}).config
    staged = run_stages(config, world.jobs, loop=PIPELINES[loop], kv_tokens=world.kv_tokens, script=script_of(cut))
    alone = run(world.twin(loop="normal").config, world.jobs, kv_tokens=world.kv_tokens)
    for rid, output in staged.first.outputs.items():
        if output.status == 200:
            assert output.output_ids.tolist() == alone.streams()[rid]


@DRAWN
@given(worlds(sglang=True), st.sampled_from([2, 4]))
def test_the_loops_decide_the_same_where_nothing_depends_on_time(world: World, stages: int) -> None:
    """The other loop changes when things happen, never what: with all requests there from the beginning."""
    jobs = [job._replace(arrival_ns=0) for job in world.jobs]
    rules = {**world.config.rules.model_dump(), "can_stall": False}
    config = world.twin(parallel={"pp": stages}, rules=rules).config
    one, other = (run_stages(config, jobs, loop=loop, kv_tokens=world.kv_tokens) for loop in PIPELINES.values())
    assert one.logs() == other.logs()


@LOOPS
@STAGES
@pytest.mark.parametrize("batching", STRATEGIES)
@pytest.mark.parametrize("page_size", [1, 16])
def test_retraction_changes_no_token(loop: str, stages: int, batching: str, page_size: int) -> None:
    """Several micro-batches compete for a pool that holds two or three of the eight requests."""
    config = pipeline(stages, batching=batching, page_size=page_size, clip_max_new_tokens=1, chunked_prefill_size=32)
    jobs = burst(8, prompt=17, outputs=40)
    squeezed, roomy = (run_stages(config, jobs, loop=PIPELINES[loop], kv_tokens=tokens).first for tokens in (160, 4096))
    assert squeezed.column("retractions").sum() > 0 == roomy.column("retractions").sum()
    assert squeezed.streams() == roomy.streams() == run(engine(), jobs).streams()


def states(loop: str, at: int) -> str:
    jobs = [Job("aimed", (("long", 30),), 12), *burst(3, outputs=9)]
    config = pipeline(2, chunked_prefill_size=8)
    first = run_stages(config, jobs, loop=PIPELINES[loop], script={at: [AbortRequest("aimed")]}).first
    return first.moments[at].states.get("aimed", "ended") if at < len(first.moments) else "ended"


@LOOPS
def test_an_abort_at_every_moment(loop: str) -> None:
    seen = {states(loop, at) for at in range(60)}
    assert seen >= {"chunked", "prefill in flight", "decode in flight", "ended"}


@LOOPS
@STAGES
def test_control_messages_reach_every_stage(loop: str, stages: int) -> None:
    """Settings change, the cache is emptied and steps are slowed down everywhere in the same slot."""
    script: dict[int, list[Message]] = {
        3: [SetInternalState({"max_running_requests": 2, "new_token_ratio": 0.5}), FlushCache()],
        9: [GetInternalState()],
        12: [SlowDown(5_000)],
        20: [SlowDown(0), SetInternalState({"max_running_requests": 8})],
    }
    late = [*LOAD, Job("late", arrival_ns=10**9)]
    staged = run_stages(pipeline(stages), late, loop=PIPELINES[loop], script=script)
    answers = [control for control in staged.first.controls if isinstance(control, ControlOutput)]
    assert [control.success for control in answers] == [True, False, True, True, True, True]
    ratios = [np.asarray(s.recorder._step_columns()["new_token_ratio"]).tolist() for s in staged.schedulers]
    assert all(one == ratios[0] for one in ratios)


@LOOPS
def test_grammars_need_no_later_sampling(loop: str) -> None:
    """Compiled once for all (the first stage's word counts); the request decodes like any other."""
    spec = GrammarSpec("json_object")
    jobs = [job._replace(grammar=spec if i % 2 else None) for i, job in enumerate(burst(6, outputs=9))]
    staged = run_stages(pipeline(2), jobs, loop=PIPELINES[loop])
    assert staged.first.streams() == run(engine(), jobs).streams()
    assert any(batch.has_grammar for batch, _ in staged.steps[1])


@LOOPS
@STAGES
def test_the_users_hear_of_the_first_stage_only(loop: str, stages: int) -> None:
    staged = run_stages(pipeline(stages), LOAD, loop=PIPELINES[loop])
    recorders = [scheduler.recorder for scheduler in staged.schedulers]
    assert [len(recorder._ended) for recorder in recorders] == [len(LOAD), *[0] * (stages - 1)]
    assert all(len(recorder._step_columns()["step"]) == staged.schedulers[0].steps for recorder in recorders)


class Waits:
    """A user's own strategy: nobody runs before the oldest has waited for 5 us, and every fifth turn is let pass."""

    def __init__(self) -> None:
        self.turns = 0

    def next_batch(self, scheduler: Scheduler) -> Batch | None:
        self.turns += 1
        due = scheduler.waiting[0].queued_ns + 5_000 if scheduler.waiting else 0
        if scheduler.now_ns < due or self.turns % 5 == 0:
            scheduler.wake_at(max(due, scheduler.now_ns + 1_000))
            return None
        return scheduler.new_prefill_batch(scheduler.chunk_size) or scheduler.decode_batch()


@LOOPS
@STAGES
def test_the_first_stages_timers_wake_all(loop: str, stages: int) -> None:
    def before(stage: int, scheduler: Scheduler) -> None:
        scheduler.strategy = Waits()

    staged = run_stages(
        pipeline(stages), burst(5, outputs=9), loop=PIPELINES[loop], before=before, prove=False, devices=[constant(70)]
    )
    same_everywhere(staged)
    assert staged.first.streams() == run(engine(), burst(5, outputs=9)).streams()
    assert staged.first.column("first_scheduled_ns").min() == 5_000


# -- stages that decide differently --------------------------------------------------------------------------------


def _otherwise(stage: int, at: int) -> Any:
    """From its decision number ``at`` on, one stage admits nobody."""

    def before(place: int, scheduler: Scheduler) -> None:
        if place == stage:
            admit = scheduler.new_prefill_batch

            def refuse(*args: Any, **fields: Any) -> Any:
                return None if scheduler.steps >= at else admit(*args, **fields)

            scheduler.new_prefill_batch = refuse  # type: ignore[method-assign]

    return before


@LOOPS
@STAGES
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_stage_that_decides_otherwise_is_caught_at_that_step(loop: str, stages: int, at: int) -> None:
    jobs = [job._replace(iteration=3 * i) for i, job in enumerate(burst(8, outputs=12))]
    stage = stages - 1
    right = run_stages(pipeline(stages), jobs, loop=PIPELINES[loop]).first.batches
    step = next(batch.index for batch, _ in right if batch.prefills and batch.index >= at)
    with pytest.raises(StagesDisagree) as caught:
        run_stages(pipeline(stages), jobs, loop=PIPELINES[loop], before=_otherwise(stage, at))
    error = caught.value
    assert (error.stage, error.step) == (stage, step)
    assert error.theirs is not None and error.theirs.prefills and not (error.mine and error.mine.prefills)
    assert f"stage {stage} of the pipeline" in str(error) and f"step {step}" in str(error) and "extend" in str(error)
    assert error.where == "engine" and error.remedy


# -- time ----------------------------------------------------------------------------------------------------------


def constant(step_ns: int) -> ConstantDevice:
    return ConstantDevice(prefill_ns=step_ns, decode_ns=step_ns)


def filled(stages: int, outputs: int) -> list[Job]:
    """A request for each micro-batch, all there before the first slot."""
    return burst(stages, 8, outputs, iteration=0)


@LOOPS
@STAGES
@pytest.mark.parametrize("outputs", [1, 2, 7, 30])
def test_equal_stages_take_n_plus_p_minus_1_slots(loop: str, stages: int, outputs: int) -> None:
    config = pipeline(stages, max_running_requests=stages)
    staged = run_stages(config, filled(stages, outputs), loop=PIPELINES[loop], devices=[constant(700)])
    assert staged.schedulers[0].steps == stages * outputs
    assert staged.first.makespan_ns() == (stages * outputs + stages - 1) * 700


@LOOPS
@STAGES
def test_a_single_request_leaves_the_other_slots_empty(loop: str, stages: int) -> None:
    """Each of its steps goes through every stage before the next begins."""
    staged = run_stages(pipeline(stages), filled(1, 9), loop=PIPELINES[loop], devices=[constant(700)])
    assert staged.first.makespan_ns() == 9 * stages * 700


def asynchronous(costs: tuple[int, ...], steps: int) -> int:
    """Max-plus: a device begins a step when it has done the one before, the stage before has done this one, and (the
    first) the tokens of the slot P before are there."""
    stages = len(costs)
    end = np.zeros((stages, steps), dtype=np.int64)
    for k in range(steps):
        begin = int(end[-1, k - stages]) if k >= stages else 0
        for s in range(stages):
            begin = max(begin, int(end[s, k - 1]) if k else 0)
            end[s, k] = begin = begin + costs[s]
    return int(end[-1, -1])


def blocking(costs: tuple[int, ...], steps: int) -> int:
    """The same with hosts that wait for what they send: stage s in slot t, in the order of ``event_loop_pipeline``."""
    last = len(costs) - 1

    @cache
    def begins(s: int, t: int) -> int:
        """The slot begins: the one before is over, and what the stage before sends of it has come."""
        own = 0 if t == 0 else max(done(s, t - 1), sends(s, t - 1))
        return own if s == 0 else max(own, sends(s - 1, t), done(s - 1, t))

    @cache
    def done(s: int, t: int) -> int:
        return begins(s, t) + (costs[s] if t < steps else 0)

    @cache
    def tokens(s: int, t: int) -> int:
        """The tokens of slot t + 1 - P are there: from the last stage, or from the slot t + 1 of the one before."""
        slot = t - last
        if not 0 <= slot < steps:
            return 0
        return done(last, slot) if s == 0 else sends(s - 1, t + 1)

    @cache
    def sends(s: int, t: int) -> int:
        """The results are processed: the host hands on (the last stage has waited for its device by then)."""
        return max(begins(s, t) if s < last else done(s, t), tokens(s, t))

    return tokens(0, steps - 1 + last)


MODELS = {"pipeline": blocking, "pipeline_async": asynchronous}


@DRAWN
@given(st.lists(st.integers(0, 900), min_size=2, max_size=4), st.integers(1, 12), st.sampled_from(sorted(PIPELINES)))
def test_unequal_stages_take_what_an_independent_calculation_says(costs: list[int], outputs: int, loop: str) -> None:
    stages = len(costs)
    config, devices = pipeline(stages, max_running_requests=stages), [constant(cost) for cost in costs]
    staged = run_stages(config, filled(stages, outputs), loop=PIPELINES[loop], devices=devices, prove=sum(costs) > 0)
    assert staged.first.makespan_ns() == MODELS[loop](tuple(costs), stages * outputs)


@pytest.mark.parametrize("stages", [2, 4])
def test_the_calculations_agree_with_the_closed_form(stages: int) -> None:
    for model in MODELS.values():
        assert model((50,) * stages, 3 * stages) == (4 * stages - 1) * 50
        slowest = model((50,) * (stages - 1) + (90,), 30 * stages)
        assert slowest >= 30 * stages * 90


@LOOPS
def test_activations_and_messages_take_their_time(loop: str) -> None:
    """One request, two stages: each step waits for both devices, the activations and the tokens' way back."""
    staged = run_stages(pipeline(2), filled(1, 5), loop=PIPELINES[loop], devices=[constant(700)], latency_ns=40)
    hops = {"pipeline": 2 * 40, "pipeline_async": 40 + 0}
    assert staged.first.makespan_ns() == 5 * (2 * 700 + hops[loop])


@LOOPS
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize(("activation_ns", "latency_ns"), [(0, 0), (150, 0), (90, 40), (0, 200)])
def test_the_throughput_bound(loop: str, count: int, activation_ns: int, latency_ns: int) -> None:
    """Of P devices k / P work, where k micro-batches are filled, less what their steps spend on the way: a step of
    each takes at least P g and three activations and the way back of the tokens. Who does not block keeps to that."""
    outputs, step_ns = 60, 1_000
    staged = run_stages(
        pipeline(4, max_running_requests=4),
        filled(count, outputs),
        loop=PIPELINES[loop],
        devices=[constant(step_ns)],
        latency_ns=latency_ns,
        activation_ns=activation_ns,
    )
    on_the_way = (3 * activation_ns + latency_ns) / (4 * step_ns)
    bound = 4 * (count / 4) / (1 + on_the_way)
    speedup = count * outputs * 4 * step_ns / staged.first.makespan_ns()
    assert speedup <= bound
    if loop == "pipeline_async":
        assert speedup > 0.98 * bound


def test_the_host_is_hidden_behind_the_first_stage_only_where_nobody_blocks() -> None:
    """A stage behind the first decides and launches while the one before computes."""
    makespans = {}
    for loop, run_it in PIPELINES.items():
        config = pipeline(2, max_running_requests=2)
        makespans[loop] = run_stages(
            config, filled(2, 40), loop=run_it, devices=[constant(10_000)], host=500
        ).first.makespan_ns()
    ideal = (2 * 40 + 1) * 10_000
    assert ideal < makespans["pipeline_async"] < makespans["pipeline"]


@LOOPS
def test_every_pause_is_checked_once_a_stage_with_nothing_in_flight(loop: str) -> None:
    """The estimate of output starts afresh at a pause, on every stage, before the first one blocks."""
    checked: dict[int, list[tuple[int, int]]] = {}

    def before(stage: int, scheduler: Scheduler) -> None:
        check = scheduler.on_idle

        def checking() -> None:
            checked.setdefault(stage, []).append((len(scheduler.in_flight), len(scheduler.requests)))
            check()

        scheduler.on_idle = checking  # type: ignore[method-assign]

    jobs = [*burst(5, 9, 20), Job("later", arrival_ns=10**9), Job("last", arrival_ns=2 * 10**9)]
    run_stages(pipeline(3), jobs, loop=PIPELINES[loop], before=before)
    assert len(checked) == 3 and len({len(calls) for calls in checked.values()}) == 1
    assert {call for calls in checked.values() for call in calls} == {(0, 0)} and len(checked[0]) >= 4


# -- micro-batches -------------------------------------------------------------------------------------------------


@LOOPS
@STAGES
def test_each_micro_batch_has_its_share_of_the_seats(loop: str, stages: int) -> None:
    staged = run_stages(pipeline(stages, max_running_requests=9), burst(20, 5, 9), loop=PIPELINES[loop])
    assert max(batch.rows for batch, _ in staged.first.batches) == 9 // stages
    running = np.asarray(staged.first.records.steps["running"])
    assert running.max() == 9 // stages * stages


def test_a_long_prompts_chunks_travel() -> None:
    """Through successive micro-batches; it decodes in the one of its last chunk."""
    staged = run_stages(pipeline(2, chunked_prefill_size=16), [Job("long", (("l", 60),), 6)], latency_ns=10)
    batches = [batch for batch, _ in staged.first.batches]
    assert [[p.new_tokens for p in batch.prefills] for batch in batches[:4]] == [[16], [16], [16], [12]]
    assert [batch.prefills[0].last for batch in batches[:4]] == [False, False, False, True]
    decoded = [one.running.advance % ADVANCES for one in staged.schedulers[0].micro_batches]
    assert decoded == [0, 5]


def bubbles(staged: Staged, stage: int) -> int:
    """Idle time (ns) of a stage's device between its first and its last step."""
    results = [result for _, result in staged.steps[stage]]
    return results[-1].end_ns - results[0].start_ns - sum(result.end_ns - result.start_ns for result in results)


@LOOPS
def test_bubbles_are_what_unfilled_micro_batches_leave(loop: str) -> None:
    """With k of P micro-batches filled a device is busy k / P of the time."""
    for filled_ones in range(1, 5):
        config = pipeline(4, max_running_requests=4)
        staged = run_stages(config, filled(filled_ones, 25), loop=PIPELINES[loop], devices=[constant(1_000)])
        for stage in range(4):
            assert bubbles(staged, stage) == (4 - filled_ones) * 24 * 1_000
