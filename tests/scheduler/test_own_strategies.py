"""What a user's own strategy or policy may rely on, and what it is told when it goes wrong."""

from __future__ import annotations

from typing import Any

import pytest

from testbed.batch import Batch
from testbed.scenario.errors import InputError
from testbed.scheduler.batching import MixedChunk
from testbed.scheduler.scheduler import Scheduler
from tests.properties.world import Job, engine, run

JOBS = [Job(f"r{i}", ((f"p{i}", 30 + 7 * i),), outputs=5 + i, arrival_ns=900 * i) for i in range(8)]


class Renamed(MixedChunk):
    """A built-in strategy under a user's name."""


def test_a_built_in_strategy_decides_the_same_under_another_name() -> None:
    config = engine(batching="mixed_chunk", chunked_prefill_size=32)
    named, renamed = run(config, JOBS), run(engine(chunked_prefill_size=32), JOBS, strategy=Renamed())
    assert named.records.decisions == renamed.records.decisions


class BuildsTwo:
    def next_batch(self, scheduler: Scheduler) -> Batch | None:
        decode = scheduler.decode_batch()
        return scheduler.new_prefill_batch(scheduler.chunk_size) or decode


def test_a_batch_that_is_built_and_dropped_is_refused() -> None:
    with pytest.raises(InputError, match="built 2 batches"):
        run(engine(), JOBS, strategy=BuildsTwo())


class WaitsForFour:
    """Prefill when four wait, or the oldest has waited for 5 us."""

    def next_batch(self, scheduler: Scheduler) -> Batch | None:
        if scheduler.waiting and not scheduler.running.requests:
            due = scheduler.waiting[0].queued_ns + 5_000
            if len(scheduler.waiting) < 4 and scheduler.now_ns < due:
                scheduler.wake_at(due)
                return None
        return scheduler.new_prefill_batch(scheduler.chunk_size) or scheduler.decode_batch()


@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_a_strategy_can_wait_for_a_time(loop: str) -> None:
    done = run(engine(loop=loop), [Job("r"), Job("s", arrival_ns=10)], strategy=WaitsForFour())
    assert done.records.requests["first_scheduled_ns"].tolist() == [5_000, 5_000]  # type: ignore[union-attr]


@pytest.mark.parametrize("policy", [lambda waiting, _: sorted(waiting), lambda waiting, _: waiting.clear()])
def test_a_policy_that_does_not_sort_in_place_is_refused(policy: Any) -> None:
    def wrong(waiting: list[Any], scheduler: Scheduler) -> Any:
        return waiting if policy.__code__.co_names == ("sorted",) else waiting.clear()

    with pytest.raises(InputError, match="in place"):
        run(engine(), JOBS, policy=wrong)


def test_retracted_requests_go_to_the_back_with_priorities_too() -> None:
    """Equal priorities change nothing: SGLang orders by entry into the queue, which a retraction renews."""
    jobs = [Job(f"r{i}", ((f"p{i}", 20),), outputs=40, max_new_tokens=40, arrival_ns=i) for i in range(8)]
    fields: dict[str, Any] = {"retract_to": "back", "schedule_conservativeness": 0.1}
    plain, ranked = (run(engine(**fields, priority=on), jobs, kv_tokens=170) for on in (False, True))
    assert sum(plain.records.requests["retractions"]) > 0
    assert plain.records.decisions == ranked.records.decisions


def test_the_newest_is_retracted_even_while_its_prompt_is_half_computed() -> None:
    """vLLM preempts the last to come; an older request must not pay for a newer one's chunks."""
    config = engine(
        batching="stall_free", chunked_prefill_size=24, rules={"reserve": "none", "retract_victim": "newest"}
    )
    jobs = [Job(f"old{i}", ((f"p{i}", 20),), outputs=60, arrival_ns=i) for i in range(2)]
    jobs.append(Job("new", (("long", 150),), outputs=5, arrival_ns=40_000))
    done = run(config, jobs, kv_tokens=190)
    retractions = dict(zip(done.records.requests["id"], done.records.requests["retractions"], strict=True))
    assert retractions["new"] > 0 == retractions["old0"]
