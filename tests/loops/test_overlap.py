"""What overlap changes and what it must not: lateness by one step, extra rows, makespan (specification A.2, P)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.scenario.schema import ConstantDevice
from tests.properties.draws import LOOPS, STRATEGIES, worlds
from tests.properties.world import Job, Outcome, burst, engine, run

QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=60)


def discarded(outcome: Outcome) -> int:
    """Rows that computed a token nobody got, counted from batches and streams alone: a row's token is sent unless the
    request had all its tokens, or computed the same one again after a retraction."""
    computed: dict[str, list[int]] = {}
    for batch, _ in outcome.batches:
        for request, length in zip(batch.decodes, batch.seq_lens.tolist(), strict=True):
            computed.setdefault(request.rid, []).append(length - request.prompt_tokens)
        for prefill in batch.prefills:
            if prefill.last:
                index = prefill.prefix_tokens + prefill.new_tokens - prefill.request.prompt_tokens
                computed.setdefault(prefill.request.rid, []).append(index)
    return sum(len(tokens) for tokens in computed.values()) - sum(len(output.output_ids) for output in outcome.sent)


@QUIET
@given(worlds())
def test_results_are_at_most_one_step_late_and_in_order(world: object) -> None:
    outcome = run(world.config, world.jobs, kv_tokens=world.kv_tokens)  # type: ignore[attr-defined]
    limit = 0 if world.config.loop == "normal" else 1  # type: ignore[attr-defined]
    assert max(moment.in_flight for moment in outcome.moments) <= limit
    assert [batch.index for batch, _ in outcome.batches] == list(range(len(outcome.batches)))
    starts = [result.start_ns for _, result in outcome.batches]
    ends = [result.end_ns for _, result in outcome.batches]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False)), "one device, in order"


@QUIET
@given(worlds())
def test_extra_rows_are_the_discarded_tokens(world: object) -> None:
    """And the normal loop has none."""
    outcome = run(world.config, world.jobs, kv_tokens=world.kv_tokens)  # type: ignore[attr-defined]
    extra = int(np.asarray(outcome.records.steps["extra_rows"]).sum())
    if world.config.loop == "normal":  # type: ignore[attr-defined]
        assert extra == 0
    lost_prefills = discarded(outcome) - extra
    assert 0 <= lost_prefills <= outcome.column("retractions").sum()


@pytest.mark.parametrize("batching", STRATEGIES)
@pytest.mark.parametrize("page_size", [1, 16])
def test_one_extra_row_for_every_end(batching: str, page_size: int) -> None:
    """Everybody decodes together, so each end finds its request in the batch already launched; an end at the first
    token too."""
    jobs = [Job(f"r{i}", ((f"p{i}", 10 + i),), outputs) for i, outputs in enumerate([1, 2, 5, 9, 17])]
    fields = {"batching": batching, "page_size": page_size}
    normal, overlap = (run(engine(loop=loop, **fields), jobs) for loop in LOOPS)
    assert np.asarray(normal.records.steps["extra_rows"]).sum() == 0
    assert np.asarray(overlap.records.steps["extra_rows"]).sum() == len(jobs)
    assert overlap.streams() == normal.streams()


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize(("host_ns", "gpu_ns"), [(10, 100), (100, 100), (100, 10), (0, 50), (50, 0)])
def test_makespan(steps: int, host_ns: int, gpu_ns: int) -> None:
    """Of N steps with c on the host an iteration and g on the device: N (c + g) in turns, c + N max(c, g) overlapped.
    All host time is before the launch here, so nothing trails; the step decoded for nothing delays no token."""
    device = ConstantDevice(prefill_ns=gpu_ns, decode_ns=gpu_ns)
    job = [Job("r", outputs=steps, iteration=0)]
    normal, overlap = (run(engine(loop=loop), job, device=device, host=host_ns).makespan_ns() for loop in LOOPS)
    assert normal == steps * (host_ns + gpu_ns)
    assert overlap == host_ns + steps * max(host_ns, gpu_ns)


def test_the_device_never_waits_for_a_faster_host() -> None:
    device = ConstantDevice(prefill_ns=500, decode_ns=500)
    outcome = run(engine(loop="overlap"), [Job("r", outputs=30)], device=device, host=400)
    starts, ends = (np.asarray(outcome.records.steps[name]) for name in ("start_ns", "end_ns"))
    assert (starts[1:] == ends[:-1]).all()


@pytest.mark.parametrize("loop", LOOPS)
def test_every_pause_is_checked_once_with_nothing_in_flight(loop: str) -> None:
    """The estimate of output starts afresh at a pause, before the loop blocks, and never between two steps."""
    checked: list[tuple[int, int]] = []
    ratios: list[float] = []

    def count(scheduler: Any, _: object) -> None:
        check = scheduler.on_idle

        def checking() -> None:
            checked.append((len(scheduler.in_flight), len(scheduler.requests)))
            check()

        scheduler.on_idle = checking
        scheduler.on_step = lambda: ratios.append(scheduler.new_token_ratio)

    jobs = [*burst(3, 9, 20), Job("later", arrival_ns=10**9), Job("last", arrival_ns=2 * 10**9)]
    run(engine(loop=loop), jobs, before=count)
    assert checked == [(0, 0)] * 4, "three pauses, and the end of the run"
    assert [now > before for before, now in pairwise(ratios)].count(True) == 2 and max(ratios) == ratios[0] == 0.7


@QUIET
@given(st.integers(1, 6), st.integers(1, 12), st.sampled_from([1, 3, 16]))
def test_overlap_frees_what_it_allocated_too_much(count: int, outputs: int, page_size: int) -> None:
    """The slot of the extra step is given back at the finish, whether it opened a page or not (menu A3, A5)."""
    for over in ("free_at_finish", "free_at_result"):
        for prompt in (page_size - 1 or 1, page_size, page_size + 1):
            config = engine(loop="overlap", page_size=page_size, rules={"over_allocated": over})
            run(config, burst(count, prompt, outputs), kv_tokens=64 * page_size)
