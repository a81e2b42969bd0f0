"""Nobody waits without reason, and nobody for ever."""

from __future__ import annotations

from typing import Any

import pytest

from tests.properties.draws import LOOPS, PAGE_SIZES, STRATEGIES
from tests.properties.world import Job, burst, engine, run


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("batching", STRATEGIES)
def test_requests_near_the_capacity_do_not_block_others(loop: str, page_size: int, batching: str) -> None:
    """Prompt + max_new at, and up to 3 pages below, what the pool can ever hold; one bigger is refused."""
    kv_tokens = 6 * page_size if page_size > 3 else 60
    config = engine(loop=loop, page_size=page_size, batching=batching, chunked_prefill_size=64)
    for below in {0, 1, page_size - 1, page_size, page_size + 1, 3 * page_size}:
        total = kv_tokens - 2 - below
        prompt = max(1, total // 2)
        near = [Job(f"near {i}", ((f"n{i}", prompt),), total - prompt) for i in range(2)]
        jobs = [near[0], *burst(2, 3, 4), near[1], Job("big", (("big", kv_tokens),), 1), Job("last", (("l", 2),), 2)]
        outcome = run(config, jobs, kv_tokens=kv_tokens)
        statuses = {rid: output.status for rid, output in outcome.outputs.items()}
        assert statuses.pop("big") == 400 and set(statuses.values()) == {200}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("batching", STRATEGIES)
def test_four_cold_prompts_share_four_slots(loop: str, batching: str) -> None:
    """Menu C2: a flag "the batch is full" must not outlive its reason."""
    outcome = run(engine(loop=loop, batching=batching, max_running_requests=4), burst(4, 30, 20), kv_tokens=400)
    scheduled = {p.request.rid for batch, _ in outcome.batches[:4] for p in batch.prefills}
    assert scheduled == {"r0", "r1", "r2", "r3"}
    assert max(batch.rows for batch, _ in outcome.batches) == 4


@pytest.mark.parametrize("sglang", [False, True])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("batching", ["prefill_first", "mixed_chunk"])
@pytest.mark.parametrize("chunk", [-1, 4])
def test_ten_requests_one_slot(loop: str, batching: str, chunk: int, sglang: bool) -> None:
    """Menu C1, C17: the chunked request owns the only slot."""
    config = engine(sglang, loop=loop, batching=batching, chunked_prefill_size=chunk, max_running_requests=1)
    outcome = run(config, burst(10, 9, 4), kv_tokens=200)
    assert max(batch.rows for batch, _ in outcome.batches) == 1


@pytest.mark.parametrize("sglang", [False, True])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("at", range(12))
def test_an_arrival_at_any_iteration_is_served(loop: str, at: int, sglang: bool) -> None:
    """With one slot: also when it comes as the only running request has just ended."""
    jobs = [Job("one", outputs=5, iteration=0), Job("two", (("x", 3),), 2, iteration=at)]
    run(engine(sglang, loop=loop, max_running_requests=1), jobs)


@pytest.mark.parametrize("loop", LOOPS)
def test_static_batching_admits_nobody_before_the_batch_has_ended(loop: str) -> None:
    jobs = [*burst(3, 5, 20, iteration=0), Job("late", (("x", 5),), 4, iteration=4)]
    outcome = run(engine(loop=loop, batching="static"), jobs)
    (first_late,) = [b.index for b, _ in outcome.batches for p in b.prefills if p.request.rid == "late"]
    ended = max(b.index for b, _ in outcome.batches if any(r.rid == "r0" for r in b.decodes))
    assert first_late > ended
    continuous = run(engine(loop=loop), jobs)
    assert continuous.makespan_ns() < outcome.makespan_ns()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5])
def test_stall_free_progresses_with_a_budget_of_its_rows_or_less(loop: str, budget: int) -> None:
    """The decodes go on, and who waits is prefilled when rows end."""
    config = engine(loop=loop, batching="stall_free", chunked_prefill_size=budget)
    outcome = run(config, burst(8, 6, 9), kv_tokens=400)
    for batch, _ in outcome.batches:
        assert sum(p.new_tokens for p in batch.prefills) + len(batch.decodes) <= max(budget, len(batch.decodes))


@pytest.mark.parametrize("loop", LOOPS)
def test_stall_free_never_stalls_a_decode(loop: str) -> None:
    jobs = [Job("steady", outputs=30, iteration=0), *burst(4, 50, 3, iteration=5)]
    outcome = run(engine(loop=loop, batching="stall_free", chunked_prefill_size=16), jobs)
    begun = False
    for batch, _ in outcome.batches:
        running = any(request.rid == "steady" for request in batch.decodes)
        begun = begun or running
        if begun and not running:
            assert outcome.requests[0].finish_reason is not None and batch.index > 30


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("batching", STRATEGIES)
def test_retracted_requests_keep_their_rank(loop: str, batching: str) -> None:
    """Menu D7: under fcfs nobody who came later is first scheduled while one who was retracted waits, and nobody is
    retracted more than a few times."""
    waited: list[tuple[int, int]] = []

    def look(scheduler: Any, _: Any) -> None:
        def step() -> None:
            batch = scheduler.in_flight[-1]
            ranks = [p.request.rank for p in batch.prefills if not p.request.retractions and not p.prefix_tokens]
            oldest = min((r.rank for r in scheduler.waiting if r.retractions), default=1 << 30)
            victims = {request.rank for request in batch.retracted}
            if oldest not in victims:
                waited.extend((rank, oldest) for rank in ranks)

        scheduler.on_step = step

    config = engine(
        loop=loop, batching=batching, init_new_token_ratio=0.01, prefix_cache="chunk", chunked_prefill_size=16
    )
    outcome = run(config, burst(10, 12, 30), kv_tokens=120, before=look)
    assert outcome.column("retractions").sum() > 0
    assert all(rank < oldest for rank, oldest in waited)
    assert outcome.column("retractions").max() <= 10


@pytest.mark.parametrize("loop", LOOPS)
def test_first_come_is_first_scheduled(loop: str) -> None:
    outcome = run(engine(loop=loop, max_running_requests=3), burst(12, 9, 5), kv_tokens=90)
    scheduled = outcome.column("first_scheduled_ns").tolist()
    assert scheduled == sorted(scheduled)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("sglang", [False, True])
def test_high_priority_is_never_behind_low(loop: str, sglang: bool) -> None:
    jobs = [job._replace(priority=i % 2) for i, job in enumerate(burst(12, 6, 4))]
    outcome = run(engine(sglang, loop=loop, priority=True, max_running_requests=2), jobs)
    scheduled = outcome.column("first_scheduled_ns")
    assert max(scheduled[1::2]) <= min(scheduled[0::2])


def test_steady_after_pressure() -> None:
    """Menu D3: what comes after a time of retractions is served as if it had not been."""
    pressed = burst(8, 12, 30)
    calm = [Job(f"calm {i}", ((f"c{i}", 12),), 10, arrival_ns=10**9 + 200_000 * i) for i in range(5)]
    config = engine(loop="normal", init_new_token_ratio=0.01)
    after, alone = run(config, [*pressed, *calm], kv_tokens=120), run(config, calm, kv_tokens=120)
    assert after.column("retractions")[:8].sum() > 0
    lived = [o.column("finish_ns") - o.column("arrival_ns") for o in (after, alone)]
    assert lived[0][8:].tolist() == lived[1].tolist()
