"""Named defects of the second sampling phase, one at a time: what holds grammars to their rules finds each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from testbed.batch import Batch
from testbed.loops import base
from testbed.loops.base import LoopContext
from testbed.messages import AbortRequest
from testbed.runtime.leap import Leaper
from testbed.scheduler.grammar_queue import GrammarQueue
from testbed.scheduler.scheduler import Scheduler
from tests.properties.draws import LOOPS
from tests.properties.grammars import BROKEN, Rule, run_constrained
from tests.properties.test_leap import same
from tests.properties.test_mutants import around, without
from tests.properties.world import burst, engine, run

Patch = pytest.MonkeyPatch


def battery() -> None:
    """Grammars of several kinds beside plain requests: retracted, aborted, broken; and in virtual time."""
    jobs = burst(7, prompt=15, outputs=30)
    kinds = [Rule(1, 50).spec(), None, Rule(9, 20).spec(), Rule(4, 12, fails_at=5).spec(), BROKEN]
    jobs = [job._replace(grammar=kinds[i % 5], iteration=i) for i, job in enumerate(jobs)]
    for loop in LOOPS:
        for batching in ("prefill_first", "mixed_chunk"):
            config = engine(loop=loop, batching=batching, chunked_prefill_size=16, clip_max_new_tokens=1)
            streams = run_constrained(config, jobs, kv_tokens=90)[0].streams()
            assert streams == run_constrained(config, jobs)[0].streams(), "retraction changes tokens"
            run_constrained(config, jobs, script={at: [AbortRequest(f"r{at % 7}")] for at in range(1, 20, 3)})
        waiting = [job._replace(grammar=Rule(1, 3).spec() if job.rid == "r0" else None) for job in burst(3)]
        outcome, _ = run_constrained(engine(loop=loop, max_running_requests=1), waiting, delay_ns=0)
        assert [batch.prefills[0].request.rid for batch, _ in outcome.batches if batch.prefills][-1] == "r2", "order"
        virtual = [job._replace(arrival_ns=i * 10**6) for i, job in enumerate(burst(6, outputs=60))]
        plain = [job._replace(grammar=None if i % 2 else kinds[0]) for i, job in enumerate(virtual)]
        same(*(run(engine(loop=loop), plain, host="sglang-0.5", leap=leap, checks="delta") for leap in (True, False)))


def masks_of_the_step_before(patch: Patch) -> None:
    """Sampled at once, whatever is in flight."""

    async def launch(original: Any, self: LoopContext, batch: Batch) -> Any:
        pending = await original(self, batch)
        self._sample()
        return pending

    around(patch, LoopContext, "run_batch", launch)


def tokens_are_not_accepted(patch: Patch) -> None:
    without(patch, LoopContext, "_accept")


def sampled_before_the_tokens_are_accepted(patch: Patch) -> None:
    def accept(original: Any, self: LoopContext, batch: Batch, result: Any) -> None:
        self._sample()
        original(self, batch, result)

    around(patch, LoopContext, "_accept", accept)


def every_token_is_accepted(patch: Patch) -> None:
    """Also those of requests that were retracted or ended meanwhile."""

    def every_row(batch: Batch) -> Any:
        return enumerate([*(prefill.request for prefill in batch.prefills), *batch.decodes])

    patch.setattr(base, "open_rows", every_row)


def first_tokens_are_not_accepted(patch: Patch) -> None:
    def decodes(batch: Batch) -> Any:
        return [(row, r) for row, r in rows(batch) if row >= len(batch.prefills)]

    rows = base.open_rows
    patch.setattr(base, "open_rows", decodes)


def first_tokens_are_free(patch: Patch) -> None:
    def launch(original: Any, self: Scheduler, batch: Batch) -> None:
        original(self, batch)
        batch.has_grammar = any(request.grammar is not None for request in batch.decodes)

    around(patch, Scheduler, "_launch", launch)


def grammars_are_not_forgotten(patch: Patch) -> None:
    def ended(original: Any, self: GrammarQueue, request: Any) -> None:
        original(self, request)
        self.orders.pop()

    around(patch, GrammarQueue, "ended", ended)


def the_end_of_a_grammar_is_not_counted(patch: Patch) -> None:
    def ended(original: Any, self: GrammarQueue, request: Any) -> None:
        original(self, request)
        self.open += 1

    around(patch, GrammarQueue, "ended", ended)


def an_abort_leaves_it_compiling(patch: Patch) -> None:
    def take(original: Any, self: GrammarQueue, rank: int) -> Any:
        return self.compiling.get(rank)

    around(patch, GrammarQueue, "take", take)


def orders_are_kept_until_the_next_message(patch: Patch) -> None:
    """Nothing is ever compiled where nobody else comes."""
    without(patch, LoopContext, "_order_grammars")


def a_leap_passes_over_them(patch: Patch) -> None:
    def leap(original: Any, self: Leaper) -> None:
        queue = self._scheduler.grammar_queue
        before, queue.open = queue.open, 0
        original(self)
        queue.open = before

    around(patch, Leaper, "try_leap", leap)


MUTANTS: list[tuple[Callable[[Patch], None], str]] = [
    (masks_of_the_step_before, "is output"),
    (tokens_are_not_accepted, "r0: ["),
    (sampled_before_the_tokens_are_accepted, "is output"),
    (every_token_is_accepted, "is output"),
    (first_tokens_are_not_accepted, "r0: ["),
    (first_tokens_are_free, "r0: ["),
    (grammars_are_not_forgotten, "held by nobody"),
    (the_end_of_a_grammar_is_not_counted, "miscounted"),
    (an_abort_leaves_it_compiling, "request lost"),
    (orders_are_kept_until_the_next_message, "nothing will wake the loop"),
    (a_leap_passes_over_them, "steps."),
]


@pytest.mark.parametrize(("break_it", "found_as"), MUTANTS, ids=[mutant.__name__ for mutant, _ in MUTANTS])
def test_a_defect_is_found(break_it: Callable[[Patch], None], found_as: str, monkeypatch: Patch) -> None:
    break_it(monkeypatch)
    with pytest.raises(Exception) as caught:
        battery()
    assert found_as in f"{type(caught.value).__name__}: {caught.value}"


def test_nothing_is_found_where_nothing_is_broken() -> None:
    battery()
