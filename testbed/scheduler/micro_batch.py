"""Micro-batches: a scheduler of a pipeline of P stages has P running batches, one for each step that is under way."""

from __future__ import annotations

from array import array

from testbed.batch import Batch
from testbed.memory import KvMemory
from testbed.metrics.recorder import Recorder
from testbed.request import Request
from testbed.scheduler.running import RunningBatch


class MicroBatch:
    """What each micro-batch has for itself (specification A.3). Memory, the queues, the ratio and the one request whose
    prompt is half computed are shared: a long prompt's chunks travel through successive micro-batches, and it joins the
    one that held its last chunk (``Prefill.last`` says so, whatever became of the request since)."""

    __slots__ = ("last_batch", "others", "running", "times")

    def __init__(self, running: RunningBatch, times: array[int]) -> None:
        self.running = running
        self.last_batch: Batch | None = None
        """Its last decision: the prefills in it join ``running`` at its next one."""
        self.times = times
        """When the tokens of its decode steps were sent (see ``Recorder.timeline``)."""
        self.others: tuple[MicroBatch, ...] = ()

    @property
    def rows(self) -> int:
        """Running requests."""
        return len(self.running.requests) - self.running.finished_rows

    def joining(self) -> list[Request]:
        """Open requests whose prompt its last step completes. Only between its own decisions."""
        prefills = self.last_batch.prefills if self.last_batch is not None else ()
        return [p.request for p in prefills if p.last and p.request.finish_reason is None]

    def open_requests(self) -> list[Request]:
        """Those that run or are joining."""
        return [*(r for r in self.running.requests if r.finish_reason is None), *self.joining()]

    def remaining_outputs(self, clip: int) -> int:
        """As ``RunningBatch.remaining_outputs``, with those that are joining."""
        joining = sum(min(request.max_new_tokens - request.old_outputs, clip) for request in self.joining())
        return joining + (self.running.remaining_outputs(clip) if self.running.requests else 0)


def build_micro_batches(count: int, memory: KvMemory, recorder: Recorder) -> list[MicroBatch]:
    """``count`` empty ones that know each other."""
    running = [RunningBatch(memory.slots, memory.allocator, place) for place in range(count)]
    built = [MicroBatch(batch, recorder.timeline(place)) for place, batch in enumerate(running)]
    for one in built:
        one.others = tuple(other for other in built if other is not one)
    return built


def seats_of(max_running_requests: int, micro_batches: int) -> int:
    """Requests that one micro-batch may run: an equal share, and never 0, which would admit nobody for ever."""
    return max(max_running_requests // micro_batches, 1)
