"""Batching strategies: what goes into the next step. A strategy is the shortest statement of an idea; the scheduler's
methods do the work. A user's own is a class of the same form, named ``package.module:Name`` in the scenario.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from testbed.batch import Batch

if TYPE_CHECKING:
    from testbed.scheduler.running import RunningBatch
    from testbed.scheduler.scheduler import Scheduler


class BatchingStrategy(Protocol):
    """Called once an iteration, after the last prefill joined the running batch."""

    def next_batch(self, scheduler: Scheduler) -> Batch | None:
        """The next step, its memory allocated; None when there is nothing to run."""
        ...


class PrefillFirst:
    """Prefill whenever something fits, else decode (SGLang)."""

    def next_batch(self, scheduler: Scheduler) -> Batch | None:
        """A prefill, or a decode step."""
        return scheduler.new_prefill_batch(scheduler.chunk_size) or scheduler.decode_batch()


class MixedChunk:
    """As PrefillFirst, but the running requests decode in the prefill's step; their rows count against its budgets
    (SGLang's ``enable_mixed_chunk``)."""

    def next_batch(self, scheduler: Scheduler) -> Batch | None:
        """A prefill with all decodes, or a decode step."""
        rows = len(scheduler.running)
        budget = None if scheduler.chunk_size is None else scheduler.chunk_size - rows
        prefill = scheduler.new_prefill_batch(budget, mixed_rows=rows)
        if prefill is None:
            return scheduler.decode_batch()
        return scheduler.mix_with_running(prefill)


class StallFree:
    """Decode always, and fill the rest of a token budget with prefill chunks (Sarathi-Serve, vLLM v1). A step that had
    to retract admits nobody."""

    def next_batch(self, scheduler: Scheduler) -> Batch | None:
        """All decodes, and prefills up to the budget."""
        decode = scheduler.decode_batch()
        if decode is None:
            return scheduler.new_prefill_batch(scheduler.chunk_size)
        budget = None if scheduler.chunk_size is None else scheduler.chunk_size - len(decode.decodes)
        if decode.retracted or (budget is not None and budget <= 0):
            return decode
        prefill = scheduler.new_prefill_batch(budget)
        return decode if prefill is None else scheduler.join(prefill, decode)


class Static:
    """Fill a batch, run it until its last request has finished, only then fill the next (what continuous batching
    replaced)."""

    def __init__(self) -> None:
        self._filling: dict[RunningBatch, bool] = {}

    def next_batch(self, scheduler: Scheduler) -> Batch | None:
        """A prefill while the batch is being filled, else a decode step."""
        running = scheduler.running
        if len(running) == running.finished_rows:
            self._filling[running] = True  # also with a half computed prompt: nobody is left that it could wait for
        if self._filling[running] and (prefill := scheduler.new_prefill_batch(scheduler.chunk_size)):
            return prefill
        self._filling[running] = False
        return scheduler.decode_batch()


STRATEGIES: dict[str, type[BatchingStrategy]] = {
    "prefill_first": PrefillFirst,
    "mixed_chunk": MixedChunk,
    "stall_free": StallFree,
    "static": Static,
}
