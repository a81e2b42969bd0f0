"""Constrained requests through scheduler and loops: whatever happens to them and around them, each token follows from
the one before, and nobody else's tokens change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.batch import ForwardMode
from testbed.messages import AbortRequest, GrammarSpec, Message
from testbed.ports import Stage
from testbed.request import Request
from testbed.runtime.virtual import GRAMMAR_NS
from testbed.tokens import oracle_key, token_ids
from tests.properties.draws import LOOPS, STRATEGIES, World, worlds
from tests.properties.grammars import BROKEN, EOS, Rule, run_constrained
from tests.properties.test_leap import same
from tests.properties.world import VOCABULARY, Job, Outcome, burst, engine, run
from tests.runtime.test_replay import again, holds, one_charge_a_span
from tests.study.recorded import as_run

DRAWN = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), max_examples=100)
ANY = GrammarSpec("json_object")

rules = st.one_of(
    st.none(),
    st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda drawn: Rule(*drawn)),
    st.tuples(st.integers(0, 60), st.just(12), st.integers(0, 12)).map(lambda drawn: Rule(*drawn)),
)
aborts = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)), max_size=3)


def constrained(world: World, chosen: list[Rule | None]) -> list[Job]:
    """The world's jobs, one in every other iteration, with these rules in turn."""
    return [
        job._replace(iteration=2 * i, max_new_tokens=None, grammar=rule.spec() if rule else None)
        for i, (job, rule) in enumerate(zip(world.jobs, chosen * len(world.jobs), strict=False))
    ]


def script_of(chosen: list[tuple[int, int]]) -> dict[int, list[Message]]:
    script: dict[int, list[Message]] = {}
    for at, which in chosen:
        script.setdefault(at, []).append(AbortRequest(f"r{which}"))
    return script


def oracles(outcome: Outcome, job: Job) -> None:
    """An unconstrained request has the oracle's tokens."""
    tokens = outcome.outputs[job.rid].output_ids
    assert np.array_equal(tokens, token_ids(oracle_key(0, job.rid), 0, len(tokens), VOCABULARY))


@DRAWN
@given(worlds(), st.lists(rules, min_size=1, max_size=5), aborts)
def test_every_loop_gives_the_same_tokens(world: World, chosen: list[Rule | None], cut: list[tuple[int, int]]) -> None:
    """An abort may come at another moment of the request: then one output is the beginning of the other."""
    jobs = constrained(world, chosen)
    normal, overlap = (
        run_constrained(world.twin(loop=loop).config, jobs, kv_tokens=world.kv_tokens, script=script_of(cut))[0]
        for loop in LOOPS
    )
    aborted = {f"r{which}" for _, which in cut}
    for job in jobs:
        one, other = (found.outputs[job.rid] for found in (normal, overlap))
        shared = min(len(one.output_ids), len(other.output_ids))
        assert one.output_ids[:shared].tolist() == other.output_ids[:shared].tolist()
        if job.rid not in aborted:
            assert (len(one.output_ids), one.finish_reason) == (len(other.output_ids), other.finish_reason)
        if job.grammar is None:
            oracles(normal, job)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("batching", STRATEGIES)
@pytest.mark.parametrize("page_size", [1, 16])
def test_retraction_never_changes_tokens(loop: str, batching: str, page_size: int) -> None:
    jobs = burst(6, prompt=17, outputs=40)
    jobs = [job._replace(grammar=Rule(i, 30 + i).spec() if i % 3 else None) for i, job in enumerate(jobs)]
    tight = engine(
        loop=loop, batching=batching, page_size=page_size, chunked_prefill_size=32, init_new_token_ratio=0.01
    )
    (squeezed, _), (roomy, grammars) = (run_constrained(tight, jobs, kv_tokens=tokens) for tokens in (160, 4096))
    assert squeezed.column("retractions").sum() > 0 == roomy.column("retractions").sum()
    assert squeezed.streams() == roomy.streams()
    assert grammars.accepted == sum(30 + i for i in range(6) if i % 3)


@pytest.mark.parametrize("loop", LOOPS)
def test_others_are_not_touched_by_it(loop: str) -> None:
    jobs = [job._replace(iteration=i) for i, job in enumerate(burst(8, outputs=20))]
    some = [job._replace(grammar=Rule(i, 9).spec() if i % 2 else None) for i, job in enumerate(jobs)]
    plain, beside = run_constrained(engine(loop=loop), jobs)[0], run_constrained(engine(loop=loop), some)[0]
    for job in jobs[::2]:
        assert plain.streams()[job.rid] == beside.streams()[job.rid]
    assert all(beside.outputs[job.rid].output_ids[-1] == EOS for job in jobs[1::2])
    assert [batch.has_grammar for batch, _ in plain.batches] == [False] * len(plain.batches)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_failure_ends_its_request_only(loop: str) -> None:
    """At its compilation, before its first token, in the middle (menu H13, H19)."""
    grammars = [BROKEN, Rule(3, 9, fails_at=0).spec(), Rule(5, 9, fails_at=4).spec(), Rule(7, 9).spec(), None]
    jobs = [job._replace(grammar=spec) for job, spec in zip(burst(10, outputs=20), grammars * 2, strict=True)]
    outcome, _ = run_constrained(engine(loop=loop), jobs)
    for job, output in ((job, outcome.outputs[job.rid]) for job in jobs):
        if job.grammar in grammars[:3]:
            assert (output.finish_reason, output.status) == ("error", 400) and "grammar" in output.message
        else:
            assert output.status == 200


def states(job: Job, at: int, loop: str) -> str:
    outcome, _ = run_constrained(
        engine(loop=loop, chunked_prefill_size=8), [job, Job("other", outputs=9)], script={at: [AbortRequest(job.rid)]}
    )
    assert outcome.outputs["other"].status == 200
    moments = outcome.moments
    return moments[at].states.get(job.rid, "ended") if at < len(moments) else "ended"


@pytest.mark.parametrize("loop", LOOPS)
def test_an_abort_at_every_moment(loop: str) -> None:
    job = Job("aimed", (("long", 30),), 12, iteration=1, grammar=Rule(1, 30).spec())
    seen = {states(job, at, loop) for at in range(40)}
    assert {"waiting", "ended"} < seen and ("decode in flight" if loop == "overlap" else "running") in seen


@DRAWN
@given(worlds(), st.lists(rules, min_size=1, max_size=4), aborts)
def test_it_is_replayed(world: World, chosen: list[Rule | None], cut: list[tuple[int, int]]) -> None:
    jobs = constrained(world, chosen)
    outcome, _ = run_constrained(world.config, jobs, kv_tokens=world.kv_tokens, script=script_of(cut))
    recorded = as_run(outcome, world.kv_tokens)
    found, tokens, _ = again(recorded)
    assert found.equal, found.last.explain()
    assert tokens == {rid: ids for rid, ids in outcome.streams().items() if outcome.outputs[rid].status != 400}
    one_charge_a_span(recorded, found)


# -- in virtual time ---------------------------------------------------------------------------------------


@DRAWN
@given(worlds(), st.lists(st.booleans(), min_size=1, max_size=3), st.sampled_from([0, 700, 4_000]))
def test_virtual_time_knows_when_not_what(world: World, with_grammar: list[bool], host: int) -> None:
    """The oracle's tokens and lengths, every law at every step; a leap never passes over one; a replay is the run."""
    jobs = [
        job._replace(grammar=ANY if chosen else None)
        for job, chosen in zip(world.jobs, with_grammar * len(world.jobs), strict=False)
    ]
    stepped = run(world.config, jobs, kv_tokens=world.kv_tokens, host=host, checks="full")
    leapt = run(world.config, jobs, kv_tokens=world.kv_tokens, host=host, checks="delta", leap=True)
    same(stepped, leapt)
    holds(leapt, as_run(leapt, world.kv_tokens))
    scheduled, arrived = stepped.column("first_scheduled_ns"), stepped.column("arrival_ns")
    for row, job in enumerate(sorted(jobs, key=lambda job: (job.iteration < 0, job.iteration, job.arrival_ns))):
        if job.grammar is not None:
            assert scheduled[row] >= arrived[row] + GRAMMAR_NS


def test_a_step_has_not_ended_before_it_is_sampled() -> None:
    """Under overlap that is behind the processing of the one before: with a host slower than the device, a step that
    would have ended by then has not."""
    jobs = burst(3, outputs=12)
    for spec in (None, ANY):
        outcome = run(engine(loop="overlap"), [job._replace(grammar=spec) for job in jobs], host="sglang-0.5")
        spans = {name: np.asarray(column) for name, column in outcome.records.spans.items()}
        process = (spans["lane"] == 0) & (spans["name"] == Stage.PROCESS)
        processed = dict(zip(spans["step"][process].tolist(), spans["end_ns"][process].tolist(), strict=True))
        early = [
            batch.index
            for batch, result in outcome.batches
            if batch.mode is ForwardMode.DECODE and result.end_ns < processed[batch.index - 1]
        ]
        assert bool(early) is (spec is None)
        assert {batch.has_grammar for batch, _ in outcome.batches} == {spec is not None}


def test_requests_know_that_they_heed_the_end_of_sequence() -> None:
    request = Job("r", grammar=ANY).timed().request
    assert request.ignore_eos and not Request(request, 0, np.arange(4, dtype=np.int32), 4).ignore_eos
