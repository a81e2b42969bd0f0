"""What enters a scheduler, at every moment of small runs: aborts, flushes, settings, limits, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from testbed.messages import (
    AbortRequest,
    BatchGenerateRequest,
    FlushCache,
    GenerateRequest,
    GetInternalState,
    SetInternalState,
    SlowDown,
    Timer,
    TokenPrompt,
)
from testbed.scenario.schema import EngineConfig
from testbed.scheduler.scheduler import Scheduler
from tests.properties.draws import LOOPS
from tests.properties.world import VOCABULARY, Job, Outcome, burst, engine, run

# Small runs that chunk, retract and share: aborts must be right in every state of a request.
SCENES: dict[str, dict[str, Any]] = {
    "chunks": {"chunked_prefill_size": 8},
    "mixed": {"batching": "mixed_chunk", "chunked_prefill_size": 8},
    "stall-free": {"batching": "stall_free", "chunked_prefill_size": 8},
    "pages": {"page_size": 4, "chunked_prefill_size": 8},
    "late-free": {"rules": {"over_allocated": "free_at_result"}, "page_size": 2, "chunked_prefill_size": 8},
    "sglang": {"sglang": True, "chunked_prefill_size": 8},
}
JOBS = [
    Job("r1", (("s", 8), ("a", 4)), 9, iteration=0),
    Job("r10", (("s", 8), ("b", 9)), 7, iteration=0),
    Job("r2", (("c", 11),), 8, iteration=1, max_new_tokens=10),
    Job("r3", (("c", 5),), 6, iteration=6),
]


def scene(name: str, loop: str) -> EngineConfig:
    return engine(loop=loop, max_running_requests=3, init_new_token_ratio=0.01, **SCENES[name])


def small(config: EngineConfig, **how: Any) -> Outcome:
    return run(config, JOBS, kv_tokens=44, **how)


SEEN: set[str] = set()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", SCENES)
def test_abort_of_each_request_at_every_iteration(name: str, loop: str) -> None:
    """Twice at once, once more an iteration later, beside an unknown id: the target ends once and is in no later batch,
    the others get all their tokens (menu B1, B2, B7, B12, B16, X12, X13)."""
    plain = small(scene(name, loop))
    for at in range(plain.iterations):
        for target in ("r1", "r10", "r2", "r3"):
            script = {
                at: [AbortRequest(target), AbortRequest(target), AbortRequest("r")],
                at + 1: [AbortRequest(target)],
            }
            outcome = small(scene(name, loop), script=script)
            state = outcome.moments[at].states.get(target)
            if state is not None:
                SEEN.add(state)
                assert outcome.outputs[target].finish_reason == "abort" and outcome.outputs[target].status == 499
                steps = outcome.moments[at].steps
                later = [batch for batch, _ in outcome.batches if batch.index >= steps]
                assert not any(target in members(batch) for batch in later), f"{target} runs on after its abort"
            others = [output for rid, output in outcome.outputs.items() if rid != target]
            assert all(output.status == 200 for output in others)


def members(batch: Any) -> list[str]:
    return [prefill.request.rid for prefill in batch.prefills] + [request.rid for request in batch.decodes]


def test_every_state_was_aborted() -> None:
    """The runs above would prove little if a state never occurred."""
    states = {"waiting", "chunked", "prefill in flight", "decode in flight", "running", "retracted", "prefilled"}
    if not SEEN:
        pytest.skip("runs after the exhaustive aborts only")
    assert states <= SEEN


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", SCENES)
def test_abort_all_at_every_iteration(name: str, loop: str) -> None:
    plain = small(scene(name, loop))
    for at in range(plain.iterations):
        outcome = small(scene(name, loop), script={at: [AbortRequest(abort_all=True)] * 2})
        open_then = set(outcome.moments[at].states)
        aborted = {output.rid for output in outcome.sent if output.finish_reason == "abort"}
        assert aborted == open_then


def test_an_abort_before_the_arrival_has_no_effect() -> None:
    """Ids are known from their arrival to their end; nothing is remembered of others (menu B8)."""
    outcome = run(engine(), [Job("late", iteration=3), Job("r", outputs=9)], script={0: [AbortRequest("late")]})
    assert outcome.outputs["late"].status == 200


def test_aborts_leave_no_memory_of_ids() -> None:
    outcome = run(engine(), [Job("r", outputs=5)], script={1: [AbortRequest(f"x{i}") for i in range(10_000)]})
    assert not outcome.scheduler.requests and outcome.outputs["r"].status == 200


@pytest.mark.parametrize("loop", LOOPS)
def test_stop_and_abort_in_one_iteration(loop: str) -> None:
    """The token that stops it comes with the result after the abort (menu B3)."""
    job = Job("r", outputs=4, max_new_tokens=50, iteration=0)
    for at in range(1, 8):
        outcome = run(engine(loop=loop), [job], script={at: [AbortRequest("r")]})
        assert outcome.outputs["r"].finish_reason in ("abort", "stop")


# -- flush --------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", SCENES)
def test_flush_at_every_iteration(name: str, loop: str) -> None:
    """Done exactly when nothing is open or in flight, else refused without effect (menu X21, 3.1.35)."""
    plain = small(scene(name, loop))
    for at in range(plain.iterations):
        outcome = small(scene(name, loop), script={at: [FlushCache()]})
        (answer,) = outcome.controls
        moment = outcome.moments[at]
        assert answer.success == (not moment.states and not moment.in_flight)
        assert bool(answer.message) != answer.success
        if not answer.success:
            assert outcome.records.decisions == plain.records.decisions


def test_a_flush_empties_the_cache() -> None:
    jobs = [Job("r1", (("p", 20),)), Job("r2", (("p", 20),), arrival_ns=10**9)]
    warm, cold = run(engine(loop="normal"), jobs), None
    idle_at = next(i for i, m in enumerate(warm.moments) if i and not m.open)
    cold = run(engine(loop="normal"), jobs, script={idle_at: [FlushCache()]})
    assert (warm.outputs["r2"].cached_tokens, cold.outputs["r2"].cached_tokens) == (19, 0)
    assert cold.controls[0].success


# -- ids --------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_a_duplicate_id_is_refused_and_the_first_is_unharmed(loop: str) -> None:
    for second in (0, 1, 2, 4):
        jobs = [Job("r", (("a", 9),), 6, iteration=0), Job("r", (("b", 5),), 6, iteration=second)]
        outcome = run(engine(loop=loop), jobs, prove=False)
        refused, served = sorted(outcome.sent, key=lambda output: -output.status)
        assert (refused.status, refused.finish_reason, len(refused.output_ids)) == (400, "error", 0)
        assert "'r'" in refused.message
        assert (served.status, served.prompt_tokens, len(served.output_ids)) == (200, 9, 6)
        assert outcome.column("output_tokens")[0] == 6, "the record is the first one's"


@pytest.mark.parametrize("loop", LOOPS)
def test_an_id_may_return_right_after_its_end(loop: str) -> None:
    """With another length each time, stopping early or not: nothing of its former life counts (menu B11)."""
    lives = [(3, 40), (9, None), (2, 30), (7, None), (7, 7)] * 4
    left = iter(lives[1:])

    def again(rid: str, now_ns: int) -> list[Job]:
        life = next(left, None)
        return [] if life is None else [Job("r", (("p", 6),), life[0], max_new_tokens=life[1])]

    first = Job("r", (("p", 6),), lives[0][0], max_new_tokens=lives[0][1])
    outcome = run(engine(loop=loop), [first], answer=again, prove=False)
    assert [len(output.output_ids) for output in outcome.sent] == [outputs for outputs, _ in lives]
    assert all(output.status == 200 for output in outcome.sent)


@pytest.mark.parametrize("rid", ["", " ", "r\n", "ü" * 5000])
def test_any_string_is_an_id(rid: str) -> None:
    run(engine(), [Job(rid), Job("other")])


# -- settings --------------------------------------------------------------------------------


def scheduler(**fields: Any) -> Scheduler:
    return Scheduler(engine(**fields), kv_tokens=200, context_length=1000, vocab_size=VOCABULARY, checks="full")


def one(target: Scheduler, message: Any) -> Any:
    (answer,) = target.handle_message(5, message)
    return answer


def generate(rid: str, prompt: int, **fields: Any) -> GenerateRequest:
    return GenerateRequest(rid, TokenPrompt(list(range(prompt))), **fields)


def test_get_internal_state() -> None:
    target = scheduler()
    target.handle_message(0, generate("r", 5))
    state = one(target, GetInternalState()).state
    assert (state["waiting"], state["running"], state["steps"]) == (1, 0, 0)
    assert state["free_tokens"] == state["max_total_num_tokens"] == 200
    target.get_next_batch_to_run(1)
    state = one(target, GetInternalState()).state
    assert (state["waiting"], state["free_tokens"], state["steps"]) == (0, 195, 1)


def test_set_internal_state() -> None:
    target = scheduler(max_running_requests=8)
    assert one(target, SetInternalState({"max_running_requests": 3, "new_token_ratio": 0.5})).success
    assert (target.max_running_requests, target.new_token_ratio) == (3, 0.5)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_running_requests": 0},
        {"max_running_requests": 9},
        {"new_token_ratio": 0.0},
        {"new_token_ratio": 1.5},
        {"new_token_ratio": float("nan")},
        {"new_token_ratio": True},
        {"max_running_requests": "3"},
        {"page_size": 4},
        {"new_token_ratio": 0.5, "page_size": 4},
    ],
)
def test_a_wrong_setting_changes_nothing_and_the_answer_says_so(settings: dict[str, Any]) -> None:
    target = scheduler(max_running_requests=8)
    before = (target.max_running_requests, target.new_token_ratio)
    answer = one(target, SetInternalState(settings))
    assert not answer.success and any(name in answer.message for name in settings)
    assert (target.max_running_requests, target.new_token_ratio) == before


@pytest.mark.parametrize("loop", LOOPS)
def test_a_lower_limit_holds_from_the_next_admission_on(loop: str) -> None:
    jobs = burst(8, prompt=4, outputs=6)
    outcome = run(engine(loop=loop), jobs, script={1: [SetInternalState({"max_running_requests": 2})]})
    prefilled = [batch for batch, _ in outcome.batches if batch.prefills]
    assert all(len(batch.prefills) <= 2 for batch in prefilled[1:])


@pytest.mark.parametrize("loop", LOOPS)
def test_slow_down_sleeps_before_every_launch(loop: str) -> None:
    job = [Job("r", outputs=5, iteration=0)]
    sleep_ns = 1_000_000
    plain, slow = (run(engine(loop=loop), job, script=script) for script in ({}, {0: [SlowDown(sleep_ns)]}))
    steps = len(slow.batches)
    assert steps == len(plain.batches)
    launches = np.asarray(slow.records.steps["launch_ns"])
    assert launches[0] == sleep_ns and (np.diff(launches) >= sleep_ns).all()
    off = run(engine(loop=loop), job, script={0: [SlowDown(sleep_ns)], 1: [SlowDown(-3)]})
    assert off.makespan_ns() == plain.makespan_ns() + sleep_ns


def test_unknown_messages_are_answered() -> None:
    target = scheduler()
    for message in (object(), 7, None, "abort", {"rid": "r"}, [Timer("t")]):
        answer = one(target, message)
        assert not answer.success and type(message).__name__ in answer.message
    assert target.handle_message(0, Timer("t")) == []


def test_a_batch_is_its_requests_one_by_one() -> None:
    jobs = [job._replace(iteration=0) for job in burst(5, 9, 5)]

    def as_batch(_: Scheduler, runtime: Any) -> None:
        requests = tuple(runtime.traffic.send(job.timed()) for job in jobs)
        runtime.script[0] = [BatchGenerateRequest(requests)]

    singles, batch = run(engine(), jobs), run(engine(), [], before=as_batch, prove=False)
    assert batch.streams() == singles.streams()
    assert batch.records.decisions == singles.records.decisions


# -- limits --------------------------------------------------------------------------------


def test_a_full_queue_refuses_with_503() -> None:
    target = scheduler(max_queued_requests=2)
    answers = [target.handle_message(0, generate(f"r{i}", 5)) for i in range(4)]
    assert [len(answer) for answer in answers] == [0, 0, 1, 1]
    assert {(a[0].status, a[0].finish_reason) for a in answers[2:]} == {(503, "error")}  # type: ignore[union-attr]
    target.get_next_batch_to_run(0)
    assert target.handle_message(0, generate("r9", 5)) == []


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("off", [-2, -1, 0, 1, 2])
def test_prompt_lengths_around_the_limit(loop: str, page_size: int, off: int) -> None:
    """At the pool's limit, with other load: refused or served whole, nobody else harmed (menu C7, C8, H10, X18)."""
    config = engine(loop=loop, page_size=page_size, chunked_prefill_size=64)
    limit = 160 - 1 - 5
    jobs = [*burst(3, 20, 9), Job("edge", (("e", limit + off),), 50), Job("after", (("f", 30),), 9)]
    outcome = run(config, jobs, kv_tokens=160)
    assert outcome.outputs["edge"].status == (400 if off >= 0 else 200)
    assert {outcome.outputs[rid].status for rid in ("r0", "r1", "r2", "after")} == {200}


def test_prompt_lengths_around_the_context() -> None:
    statuses = []
    for length in (93, 94, 95):
        (output,) = run(engine(), [Job("r", (("p", length),), 3)], context_length=101, kv_tokens=500).sent
        statuses.append(output.status)
    assert statuses == [200, 200, 400]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("batching", ["prefill_first", "stall_free"])
@pytest.mark.parametrize(("asked", "made"), [(0, 0), (1, 1), (2, 2), (None, 20), (2**62, 20)])
def test_max_new_tokens(loop: str, batching: str, asked: int | None, made: int) -> None:
    """0 only fills the cache; None and huge numbers are bounded by the pool; the executor ends it before."""
    config = engine(loop=loop, batching=batching)
    job = Job("r", (("p", 12),), 20, iteration=0)

    def ask(_: Scheduler, runtime: Any) -> None:
        timed = job.timed()
        request = GenerateRequest("r", timed.request.prompt, asked, ignore_eos=asked is not None and asked < 20)
        runtime.script[0] = [runtime.traffic.send(timed._replace(request=request))]

    outcome = run(config, [], before=ask, prove=False)
    (output,) = outcome.sent
    assert (len(output.output_ids), output.status) == (made, 200)
    assert output.finish_reason == ("stop" if asked is None or asked > 20 else "length")
    cached = outcome.scheduler.cache.matched_tokens(job.timed().request.prompt.ids(VOCABULARY))
    assert cached == 12, "the prompt is cached in any case"


def test_unbounded_output_stops_at_the_pool() -> None:
    outcome = run(engine(loop="normal"), [Job("r", (("p", 12),), 10_000)], kv_tokens=100)
    (output,) = outcome.sent
    assert output.finish_reason == "length" and len(output.output_ids) == 100 - 1 - 12 - 1


@pytest.mark.parametrize(("prompt", "fields"), [(0, {}), (5, {"max_new_tokens": -1})])
def test_what_cannot_be_served_is_refused(prompt: int, fields: dict[str, Any]) -> None:
    answer = one(scheduler(), generate("r", prompt, **fields))
    assert (answer.status, answer.finish_reason) == (400, "error") and answer.message
