"""The whole scheduler in virtual time, over engines, pools and workloads that hypothesis draws.

``run`` proves every invariant at every step, that each request ends once with its own tokens, that times and work add
up, that nothing is left, and (under our own rules) that no device idles beside a request that could run.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from testbed.memory import OutOfPages
from testbed.messages import AbortRequest, GenerateRequest, Prompt
from testbed.runtime.modelled import Deadlock
from testbed.scenario.schema import ConstantDevice
from tests.properties.draws import LOOPS, STRATEGIES, World, worlds
from tests.properties.world import DEVICE, Job, Outcome, burst, engine, run

QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=60)
MORE = settings(QUIET, max_examples=150)


def served(world: World, **how: object) -> Outcome:
    return run(world.config, world.jobs, kv_tokens=world.kv_tokens, **how)  # type: ignore[arg-type]


def requests_of(outcome: Outcome) -> dict[str, list[int]]:
    """All times of all requests, as columns."""
    return {
        name: np.asarray(column).tolist()
        for name, column in outcome.records.requests.items()
        if name.endswith("_ns") and not isinstance(column, list)
    }


@MORE
@given(worlds())
def test_every_engine_serves_everybody(world: World) -> None:
    outcome = served(world)
    assert all(output.status == 200 for output in outcome.sent)


@MORE
@given(worlds(sglang=True))
def test_sglang_rules_serve_or_stop_as_sglang_would(world: World) -> None:
    """Its queue may block for ever, and a chunk that finds no memory ends its server: both by name, nothing silent."""
    try:
        outcome = served(world)
    except (Deadlock, OutOfPages):
        return
    assert all(output.status in (200, 500) for output in outcome.sent)


@QUIET
@given(worlds(sglang=True))
def test_sglang_rules_without_the_stall_serve_everybody(world: World) -> None:
    rules = {**world.config.rules.model_dump(), "can_stall": False}
    served(world.twin(rules=rules))


# -- twins: what changes times, never tokens ------------------------------------------------------------


@settings(QUIET, max_examples=30)
@given(worlds())
def test_loop_batching_chunks_pages_and_cache_never_change_tokens(world: World) -> None:
    streams = served(world).streams()
    roomy = world._replace(kv_tokens=4096)
    limit = max(job.prompt_tokens + (job.max_new_tokens or job.outputs) for job in world.jobs)
    assume(limit + 8 < world.kv_tokens // world.config.page_size * world.config.page_size)
    for loop in LOOPS:
        for batching in STRATEGIES:
            assert served(world.twin(loop=loop, batching=batching)).streams() == streams
    other = "chunk" if world.config.prefix_cache == "radix" else "radix"
    assert served(world.twin(prefix_cache=other)).streams() == streams
    assert served(roomy.twin(page_size=2, chunked_prefill_size=6)).streams() == streams
    assert served(roomy.twin(page_size=1, chunked_prefill_size=-1)).streams() == streams


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("batching", STRATEGIES)
@pytest.mark.parametrize("page_size", [1, 16])
def test_retraction_never_changes_tokens(loop: str, batching: str, page_size: int) -> None:
    jobs = burst(6, prompt=17, outputs=40)
    tight = engine(
        loop=loop, batching=batching, page_size=page_size, chunked_prefill_size=32, init_new_token_ratio=0.01
    )
    squeezed, roomy = run(tight, jobs, kv_tokens=160), run(tight, jobs, kv_tokens=4096)
    assert squeezed.column("retractions").sum() > 0 == roomy.column("retractions").sum()
    assert squeezed.streams() == roomy.streams()


@QUIET
@given(worlds(), st.integers(1, 10**12))
def test_a_later_start_shifts_every_time(world: World, shift_ns: int) -> None:
    now, later = (
        served(world),
        served(world._replace(jobs=[j._replace(arrival_ns=j.arrival_ns + shift_ns) for j in world.jobs])),
    )
    durations = ("queue_ns", "prefill_ns", "decode_ns", "retracted_ns", "transfer_ns")
    for name, column in requests_of(now).items():
        by = 0 if name in durations else shift_ns
        assert [time + by if time >= 0 else time for time in column] == requests_of(later)[name], name
    assert now.records.decisions == later.records.decisions


@QUIET
@given(worlds())
def test_twice_the_costs_and_gaps_double_every_time(world: World) -> None:
    doubled = ConstantDevice(**{name: 2 * value for name, value in DEVICE.model_dump().items()})
    one = served(world, host=1500)
    slow = world._replace(jobs=[job._replace(arrival_ns=2 * job.arrival_ns) for job in world.jobs])
    two = served(slow, device=doubled, host=3000)
    for name, column in requests_of(one).items():
        assert [2 * time if time >= 0 else time for time in column] == requests_of(two)[name], name
    assert one.records.decisions == two.records.decisions


@QUIET
@given(worlds())
def test_names_mean_nothing(world: World) -> None:
    """With the same tokens by another name: same decisions, same times."""
    renamed = [job._replace(rid=f"{'z' * (9 - i % 9)} {i}") for i, job in enumerate(world.jobs)]
    old = {new.rid: job.rid for new, job in zip(renamed, world.jobs, strict=True)}

    def key_of(rid: str) -> int:
        return 1000 + int(old.get(rid, rid)[1:])

    one, two = served(world, key_of=key_of), served(world._replace(jobs=renamed), key_of=key_of)
    assert one.records.decisions == two.records.decisions
    assert requests_of(one) == requests_of(two)
    assert one.streams() == {old[rid]: stream for rid, stream in two.streams().items()}


@QUIET
@given(worlds(prefix_cache="chunk", policy="fcfs"))
def test_a_run_splits_at_an_idle_point(world: World) -> None:
    """Without a cache nothing is carried over a time at which nobody is there, but the order of page ids."""
    gap = 10**12
    second = [job._replace(rid="x" + job.rid, arrival_ns=job.arrival_ns + gap) for job in world.jobs]
    alone = served(world)
    both = served(world._replace(jobs=[*world.jobs, *second]))
    count = len(world.jobs)
    for name, column in requests_of(alone).items():
        assert requests_of(both)[name][:count] == column, name
    shifted = requests_of(served(world._replace(jobs=second)))
    for name, column in shifted.items():
        assert requests_of(both)[name][count:] == column, name


@QUIET
@given(worlds(priority=False), st.sampled_from([0, 5_000, 30_000]))
def test_a_refused_request_changes_nothing(world: World, arrival_ns: int) -> None:
    giant = Job("giant", (("g", world.kv_tokens + 1),), 3, arrival_ns=arrival_ns)
    one, two = served(world), run(world.config, [*world.jobs, giant], kv_tokens=world.kv_tokens)
    assert two.outputs["giant"].status == 400 and two.outputs["giant"].finish_reason == "error"
    assert one.records.decisions == two.records.decisions
    assert one.streams() == {rid: s for rid, s in two.streams().items() if rid != "giant"}


@QUIET
@given(worlds(loop="normal"))
def test_the_same_run_twice_is_the_same_bytes(world: World) -> None:
    one, two = served(world), served(world)
    assert one.records.decisions == two.records.decisions
    assert requests_of(one) == requests_of(two)
    assert one.records.counters == two.records.counters


def test_work_adds_up_after_retractions() -> None:
    """Prompt tokens computed are the uncached ones, and what a retraction made to be computed again."""
    outcome = run(engine(init_new_token_ratio=0.01, prefix_cache="chunk"), burst(5, 20, 30), kv_tokens=130)
    assert outcome.column("retractions").sum() > 0
    requests = list(outcome.requests.values())
    again = sum(len(r.fill_ids) for r in requests if r.retractions)
    first = sum(r.prompt_tokens for r in requests)
    computed = int(np.asarray(outcome.records.steps["new_tokens"]).sum())
    assert computed >= first + again
    if all(r.retractions <= 1 for r in requests):
        assert computed == first + again


# -- closed forms ------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("chunk", [-1, 1, 7, 64])
@pytest.mark.parametrize("prompt", [1, 7, 20])
def test_a_lone_requests_ttft_is_the_sum_of_its_chunks(loop: str, chunk: int, prompt: int) -> None:
    outcome = run(engine(loop=loop, chunked_prefill_size=chunk), [Job("r", (("p", prompt),), 3, arrival_ns=77)])
    sizes = [prompt] if chunk == -1 else [min(chunk, prompt - done) for done in range(0, prompt, chunk)]
    costs = [DEVICE.prefill_ns + round(DEVICE.prefill_token_ns * size) for size in sizes]
    assert outcome.column("first_token_ns")[0] - outcome.column("arrival_ns")[0] == sum(costs)
    assert np.asarray(outcome.records.steps["gpu_ns"])[: len(sizes)].tolist() == costs


def test_a_prompt_is_not_made_before_it_is_needed() -> None:
    prompt = Prompt([])
    assert len(prompt) == 0 and GenerateRequest("r", prompt).prompt.ids(10).tolist() == []


@MORE
@given(worlds(), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)), min_size=1, max_size=4))
def test_aborts_at_drawn_moments(world: World, aborts: list[tuple[int, int]]) -> None:
    """Whatever state they meet: the others get their tokens, and times, work and pages add up."""
    script: dict[int, list[AbortRequest]] = {}
    for at, which in aborts:
        script.setdefault(at, []).append(AbortRequest(f"r{which}"))
    outcome = served(world, script=script)
    targets = {f"r{which}" for _, which in aborts}
    assert all(output.status == 200 or rid in targets for rid, output in outcome.outputs.items())
