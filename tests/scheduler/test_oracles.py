"""Small cases that can be checked by hand (specification P and B): constants, budgets, orders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from testbed.messages import GenerateRequest, TokenPrompt
from testbed.request import Request
from testbed.scheduler.admission import PrefillAdder
from testbed.scheduler.policies import dfs_weight, lof, lpm, with_priority
from testbed.scheduler.policies import fcfs as first_come
from testbed.scheduler.scheduler import Scheduler
from tests.properties.world import VOCABULARY, Job, burst, engine, run


def scheduler(kv_tokens: int = 1000, **fields: Any) -> Scheduler:
    return Scheduler(engine(**fields), kv_tokens=kv_tokens, context_length=10_000, vocab_size=VOCABULARY)


def enqueue(target: Scheduler, *prompts: list[int], **fields: Any) -> list[Request]:
    for prompt in prompts:
        rid = f"q{target.received}"
        assert target.handle_message(0, GenerateRequest(rid, TokenPrompt(prompt), 5, **fields)) == []
    return target.waiting[-len(prompts) :]


def cache(target: Scheduler, tokens: list[int], extra_key: str = "") -> None:
    pages = target.memory.allocator.alloc(len(tokens) // target.config.page_size)
    target.cache.insert(np.array(tokens, np.int32), pages, extra_key)


# -- the estimate of output --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conservativeness", "initial", "least", "decay"),
    [(1.0, 0.7, 0.098, 0.0010033), (0.3, 0.21, 0.0294, 0.000301), (10.0, 1.0, 0.14, 0.0014333)],
)
def test_ratio_constants(conservativeness: float, initial: float, least: float, decay: float) -> None:
    target = scheduler(schedule_conservativeness=conservativeness)
    found = (target.ratio_init, target.ratio_min, target.ratio_decay)
    assert found == pytest.approx((initial, least, decay), abs=1e-6)


def test_the_ratio_reaches_its_floor_after_600_decode_steps() -> None:
    outcome = run(engine(loop="normal"), [Job("r", outputs=700)])
    ratios = np.asarray(outcome.records.steps["new_token_ratio"])
    assert ratios[0] == 0.7 and ratios[599] > 0.098 + 1e-6
    assert ratios[600] == pytest.approx(0.098) and ratios[-1] == pytest.approx(0.098, abs=1e-12)
    assert outcome.scheduler.new_token_ratio == 0.7, "idle: it starts afresh"


def test_ratio_after_a_retraction() -> None:
    """(outputs so far + 20 a survivor) / what they may produce in all."""
    seen: list[tuple[list[int], float]] = []

    def look(target: Scheduler, _: Any) -> None:
        def step() -> None:
            if target.in_flight[-1].retracted:
                outputs = [r.outputs_known(target.running.done) for r in target.running.requests]
                seen.append((outputs, target.new_token_ratio))

        target.on_step = step

    jobs = [Job(f"r{i}", ((f"p{i}", 10),), 100, iteration=10 * i) for i in range(3)]
    run(engine(loop="normal", init_new_token_ratio=0.01, clip_max_new_tokens=1), jobs, kv_tokens=130, before=look)
    assert {len(outputs) for outputs, _ in seen} == {1, 2}
    for outputs, ratio in seen:
        assert ratio == pytest.approx(min(1.0, (sum(outputs) + 20 * len(outputs)) / (100 * len(outputs))))


@pytest.mark.parametrize(("generated", "ratio"), [([10, 30], 0.4), ([100, 100], 1.0), ([0, 0], 0.2)])
def test_ratio_formula(generated: list[int], ratio: float) -> None:
    """Survivors with 10 and 30 of 100 outputs: (40 + 2 x 20) / 200 = 0.4."""
    from testbed.scheduler.retraction import _new_ratio

    target = scheduler()
    requests = enqueue(target, [1] * 4, [2] * 4)
    for request, outputs in zip(requests, generated, strict=True):
        request.max_new_tokens, request.old_outputs = 100, outputs
    target.running.requests = requests
    _new_ratio(target)
    assert target.new_token_ratio == pytest.approx(ratio)


# -- pages --------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_page_16_opens_at_the_same_physical_step(loop: str) -> None:
    """Prompt 15: the first decode fills the page, the second opens one, late results or not."""
    outcome = run(engine(loop=loop, page_size=16), [Job("r", (("p", 15),), 6)])
    taken = [sum(map(len, batch.pages)) for batch, _ in outcome.batches]
    assert taken[:4] == [1, 0, 1, 0]


@pytest.mark.parametrize(("outputs", "opened"), [(13, 1), (12, 0)])
def test_the_extra_step_opens_a_page_or_not(outputs: int, opened: int) -> None:
    """Page 16, prompt 20: with 13 outputs the token decoded for nothing is number 33, the first of a page."""
    outcome = run(engine(loop="overlap", page_size=16), [Job("r", (("p", 20),), outputs)])
    extra = [batch for batch, _ in outcome.batches if batch.extra_rows]
    assert [sum(map(len, batch.pages)) for batch in extra] == [opened]


@pytest.mark.parametrize(("align", "first"), [("page", 512), ("page_plus_one", 497)])
def test_length_of_the_first_chunk(align: str, first: int) -> None:
    config = engine(page_size=16, chunked_prefill_size=512, rules={"chunk_align": align})
    outcome = run(config, [Job("r", (("p", 1200),), 2)], kv_tokens=4096)
    assert outcome.batches[0][0].prefills[0].new_tokens == first


# -- budgets --------------------------------------------------------------------------------


def test_mixed_rows_lower_both_budgets() -> None:
    target = scheduler(chunked_prefill_size=64, max_prefill_tokens=100)
    plain, mixed = PrefillAdder(target, 64, 0), PrefillAdder(target, 64 - 8, 8)
    assert (plain.input_left - mixed.input_left, plain.chunk_left - mixed.chunk_left) == (8, 8)  # type: ignore[operator]
    assert plain.total_left - mixed.total_left == 8


def test_a_mixed_step_prefills_what_the_running_rows_leave() -> None:
    config = engine(loop="normal", batching="mixed_chunk", chunked_prefill_size=32, max_running_requests=20)
    jobs = [*burst(8, 4, 30, iteration=0), Job("long", (("l", 100),), 3, iteration=3)]
    outcome = run(config, jobs)
    mixed = [batch for batch, _ in outcome.batches if batch.prefills and batch.decodes]
    assert [(batch.prefills[0].new_tokens, len(batch.decodes)) for batch in mixed[:3]] == [(24, 8)] * 3


@pytest.mark.parametrize(("spare", "admitted"), [(0, 1), (1, 2)])
def test_a_request_that_needs_exactly_what_is_left_waits(spare: int, admitted: int) -> None:
    """Needed must be less than left: prompt + max_new of both, strictly."""
    jobs = burst(2, prompt=10, outputs=20, iteration=0)
    outcome = run(engine(loop="normal"), jobs, kv_tokens=60 + spare)
    assert len(outcome.batches[0][0].prefills) == admitted


def test_a_prompt_beyond_the_prefill_budget_goes_alone() -> None:
    config = engine(loop="normal", chunked_prefill_size=-1, max_prefill_tokens=16)
    outcome = run(config, burst(3, 40, 2, iteration=0))
    assert [len(batch.prefills) for batch, _ in outcome.batches if batch.prefills] == [1, 1, 1]


# -- policies --------------------------------------------------------------------------------


def order(waiting: list[Request]) -> list[int]:
    return [request.rank for request in waiting]


@pytest.mark.parametrize(("count", "sorted_by_match"), [(128, True), (129, False)])
def test_lpm_leaves_a_long_queue_alone(count: int, sorted_by_match: bool) -> None:
    target = scheduler(in_batch_check_threshold=-1)
    cache(target, [7] * 40)
    enqueue(target, *[[i + 100, 1, 2] for i in range(count - 1)], [7] * 41)
    lpm(target.waiting, target)
    assert (order(target.waiting)[0] == count - 1) == sorted_by_match


def test_of_three_with_one_uncached_prefix_the_first_goes_first() -> None:
    target = scheduler()
    shared = list(range(1000, 1040))
    enqueue(target, [*shared, 1], [*shared, 2], [5, 6, 7], [*shared, 3])
    lpm(target.waiting, target)
    assert order(target.waiting) == [0, 2, 1, 3]


def test_a_cached_prefix_is_not_deprioritised() -> None:
    target = scheduler()
    shared = list(range(1000, 1040))
    cache(target, shared)
    enqueue(target, [5, 6, 7], [*shared, 1], [*shared, 2])
    lpm(target.waiting, target)
    assert order(target.waiting) == [1, 2, 0]


def test_name_spaces_do_not_deprioritise_each_other() -> None:
    target = scheduler()
    shared = list(range(1000, 1040))
    enqueue(target, [*shared, 1], extra_key="a")
    enqueue(target, [*shared, 2], extra_key="b")
    enqueue(target, [*shared, 3], extra_key="a")
    lpm(target.waiting, target)
    assert order(target.waiting) == [0, 1, 2]
    assert target.waiting[0].matched == 0


def test_dfs_visits_the_heavier_subtree_first_and_children_before_parents() -> None:
    target = scheduler(in_batch_check_threshold=-1)
    for tail in ([1], [2, 2], [2, 3]):
        cache(target, [9, 9, *tail])
    enqueue(target, [9, 9, 1, 0], [9, 9, 5, 0], [9, 9, 2, 2, 0], [9, 9, 2, 3, 0], [8, 8])
    dfs_weight(target.waiting, target)
    assert order(target.waiting) == [2, 3, 0, 1, 4]


def test_dfs_survives_a_very_deep_tree() -> None:
    target = scheduler(kv_tokens=9000, in_batch_check_threshold=-1)
    for length in range(2, 2200, 2):
        target.cache.insert(np.arange(length, dtype=np.int32), target.memory.allocator.alloc(length)[:length])
        target.memory.allocator.clear()
    enqueue(target, list(range(2199)), [1, 2])
    dfs_weight(target.waiting, target)
    assert len(target.waiting) == 2


def test_lof_and_priorities() -> None:
    target = scheduler()
    waiting = enqueue(target, [1], [2], [3], [4])
    for request, (most, priority) in zip(waiting, [(5, 1), (9, None), (7, 3), (9, 1)], strict=True):
        request.max_new_tokens, request.priority = most, priority
    lof(target.waiting, target)
    assert order(target.waiting) == [1, 3, 2, 0]
    with_priority(lof, low_values_first=False)(target.waiting, target)
    assert order(target.waiting) == [2, 3, 0, 1]
    with_priority(first_come, low_values_first=True)(target.waiting, target)
    assert order(target.waiting) == [0, 3, 2, 1]


def test_a_random_order_depends_on_seed_and_step_alone() -> None:
    def shuffled(seed: int) -> list[int]:
        target = Scheduler(engine(policy="random"), kv_tokens=500, context_length=500, vocab_size=VOCABULARY, seed=seed)
        enqueue(target, *[[i] for i in range(20)])
        target.policy(target.waiting, target)
        return order(target.waiting)

    assert shuffled(1) == shuffled(1) != shuffled(2)
    assert sorted(shuffled(3)) == list(range(20))


@pytest.mark.parametrize("policy", ["lpm", "dfs_weight"])
def test_cache_aware_policies_are_fcfs_without_a_cache(policy: str) -> None:
    assert scheduler(policy=policy, prefix_cache="chunk").policy is first_come


# -- retraction --------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "victim"), [("fewest_outputs", "long"), ("newest", "short")])
def test_victims(rule: str, victim: str) -> None:
    """Of those with the fewest outputs the one with the longest prompt; or who came last."""
    jobs = [
        Job("old", (("a", 20),), 30, iteration=0),
        Job("long", (("c", 14),), 30, iteration=4),
        Job("short", (("b", 6),), 30, iteration=4),
    ]
    victims: list[str] = []

    def look(target: Scheduler, _: Any) -> None:
        target.on_step = lambda: victims.extend(request.rid for request in target.in_flight[-1].retracted)

    config = engine(loop="normal", clip_max_new_tokens=1, rules={"retract_victim": rule})
    run(config, jobs, kv_tokens=70, before=look)
    assert victims[0] == victim


def test_where_a_retracted_request_waits() -> None:
    """Under our rule before everybody who came after it; under SGLang's behind everybody."""
    places: dict[str, list[str]] = {}
    jobs = [*burst(3, 10, 30, iteration=0), Job("later", (("z", 10),), 5, iteration=2)]
    for rule in ("arrival_rank", "back"):
        seen: list[list[str]] = []

        def look(target: Scheduler, _: Any, seen: list[list[str]] = seen) -> None:
            def step() -> None:
                if target.in_flight[-1].retracted:
                    seen.append([request.rid for request in target.waiting])

            target.on_step = step

        config = engine(loop="normal", init_new_token_ratio=0.01, retract_to=rule, max_running_requests=3)
        run(config, jobs, kv_tokens=80, before=look)
        places[rule] = seen[0]
    assert places["arrival_rank"][-1] == "later" and places["back"][0] == "later"
