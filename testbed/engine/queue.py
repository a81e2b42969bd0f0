"""How a step's work reaches the device and its results come back: at once on a CPU, over two streams on CUDA.

On CUDA the schedule stream copies a step's arrays to the device while the forward stream still computes the step
before; the forward stream waits for the copy, not the host. Nothing here blocks the host but ``Ticket.wait``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from testbed.engine.inputs import Ints

STAGING_BUFFERS = 4
"""Steps whose arrays may be under way at once; two are in flight at most."""
ALIGNMENT = 4
"""Each staged array begins at a multiple of so many elements (16 bytes): Triton compiles a kernel anew for pointers
that are aligned otherwise, and that must not happen in the middle of a run."""
REANCHOR_NS = 1_000_000_000
"""Event times are float32 milliseconds: behind an anchor of at most this age they are right to a microsecond."""
WAKE_NS = 50_000
"""The host knows of an event no later than this, if it was waiting for it."""


class Ticket(Protocol):
    """A step's end."""

    def wait(self) -> tuple[int, int]:
        """Block until the device has done the step; when it began and ended (ns of the monotonic clock)."""
        ...


class Queue(Protocol):
    """The device's work, in order."""

    def stage(self, arrays: Sequence[Ints]) -> list[Tensor]:
        """The arrays on the device, int32; valid until the step's end."""
        ...

    def computing(self) -> AbstractContextManager[None]:
        """The context in which a step's operations are queued."""
        ...

    def send(self, array: Ints) -> Tensor:
        """One more array of the step, such as comes after its launch, on the device."""
        ...

    def begin(self) -> None:
        """A step begins here."""
        ...

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Start to copy results to the host; they may be read after ``Ticket.wait``."""
        ...

    def end(self) -> Ticket:
        """The step ends here."""
        ...


class CpuQueue:
    """No queue: everything is done when it is asked for."""

    def __init__(self) -> None:
        self._begin_ns = 0

    def stage(self, arrays: Sequence[Ints]) -> list[Tensor]:
        """See Queue."""
        return [torch.from_numpy(array) for array in arrays]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """See Queue."""
        with torch.inference_mode():
            yield

    def send(self, array: Ints) -> Tensor:
        """See Queue."""
        return torch.from_numpy(array)

    def begin(self) -> None:
        """See Queue."""
        self._begin_ns = time.perf_counter_ns()

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See Queue."""
        return list(tensors)

    def end(self) -> _Done:
        """See Queue."""
        return _Done(self._begin_ns, time.perf_counter_ns())


class _Done:
    def __init__(self, begin_ns: int, end_ns: int) -> None:
        self._times = (begin_ns, end_ns)

    def wait(self) -> tuple[int, int]:
        return self._times


class CudaQueue:
    """A schedule stream for copies to the device, a forward stream for everything else."""

    def __init__(self, device: torch.device, staging_ints: int) -> None:
        """``staging_ints``: int32 elements that a usual step's arrays take; larger steps allocate more."""
        self._device = device
        self._schedule = torch.cuda.Stream(device)
        self._forward = torch.cuda.Stream(device)
        self._staging = [_Staging(staging_ints, device) for _ in range(STAGING_BUFFERS)]
        self._steps = 0
        self._begin = torch.cuda.Event(enable_timing=True)
        self._timeline = _Timeline(self._forward)

    def stage(self, arrays: Sequence[Ints]) -> list[Tensor]:
        """See Queue: one copy from pinned memory. The buffer's last reader is four steps back; if it is not done, the
        host waits for it here, so that no buffer is written while it is read."""
        staging = self._staging[self._steps % STAGING_BUFFERS]
        staging.read.synchronize()
        with torch.cuda.stream(self._schedule):
            staged = staging.copy(arrays)
        self._forward.wait_stream(self._schedule)
        return staged

    @contextmanager
    def computing(self) -> Iterator[None]:
        """See Queue."""
        with torch.inference_mode(), torch.cuda.stream(self._forward):
            yield

    def send(self, array: Ints) -> Tensor:
        """See Queue: from pinned memory, because a copy from other memory may wait for all that is queued before it.
        The allocator of pinned memory does not hand it out again before the copy is done."""
        return torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)

    def begin(self) -> None:
        """See Queue."""
        self._begin = torch.cuda.Event(enable_timing=True)
        self._begin.record(self._forward)

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See Queue: copies into pinned memory on the forward stream."""
        return [tensor.to("cpu", non_blocking=True) for tensor in tensors]

    def end(self) -> _CudaTicket:
        """See Queue."""
        end = torch.cuda.Event(enable_timing=True)
        end.record(self._forward)
        self._staging[self._steps % STAGING_BUFFERS].read.record(self._forward)
        self._steps += 1
        return _CudaTicket(self._timeline, self._begin, end)


def aligned_places(lengths: Sequence[int]) -> tuple[list[int], int]:
    """Where arrays of these lengths begin, each at a multiple of ``ALIGNMENT``, and the room that all take."""
    begins, total = [], 0
    for length in lengths:
        begins.append(total)
        total += length + -length % ALIGNMENT
    return begins, total


class _Staging:
    """Pinned memory, and the device memory that it is copied to."""

    def __init__(self, ints: int, device: torch.device) -> None:
        self._device = device
        self.read = torch.cuda.Event()
        """The last step that reads the device's side has ended."""
        self._reserve(ints)

    def _reserve(self, ints: int) -> None:
        self._pinned = torch.empty(ints, dtype=torch.int32, pin_memory=True)
        self._here = self._pinned.numpy()
        self._there = torch.empty(ints, dtype=torch.int32, device=self._device)

    def copy(self, arrays: Sequence[Ints]) -> list[Tensor]:
        begins, total = aligned_places([len(array) for array in arrays])
        if total > len(self._here):
            self._reserve(2 * total)
        views = []
        for begin, array in zip(begins, arrays, strict=True):
            self._here[begin : begin + len(array)] = array
            views.append(self._there[begin : begin + len(array)])
        self._there[:total].copy_(self._pinned[:total], non_blocking=True)
        return views


class _Timeline:
    """Device events as times of the host's clock. The two clocks drift apart by some microseconds a second, so every
    event that the host has just waited for sets them right."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._anchor = torch.cuda.Event(enable_timing=True)
        self._anchor.record(stream)
        self._anchor.synchronize()
        self._anchor_ns = time.perf_counter_ns()

    def time_ns(self, event: torch.cuda.Event, waited: bool) -> int:
        """When a completed event happened; ``waited``: the host was blocked until now, because it had not. Old anchors
        are moved on from event to event."""
        seen_ns = self._anchor_ns + round(self._anchor.elapsed_time(event) * 1e6)
        when_ns = within(seen_ns, time.perf_counter_ns(), waited)
        self._anchor_ns += when_ns - seen_ns
        if when_ns - self._anchor_ns > REANCHOR_NS:
            self._anchor, self._anchor_ns = event, when_ns
        return when_ns


def within(seen_ns: int, now_ns: int, waited: bool) -> int:
    """The time of an event by the device's clock, made to agree with the host's: not in the future, and not long ago
    for a host that was waiting for it."""
    return min(max(seen_ns, now_ns - WAKE_NS) if waited else seen_ns, now_ns)


class _CudaTicket:
    def __init__(self, timeline: _Timeline, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self._timeline = timeline
        self._begin = begin
        self._end = end

    def wait(self) -> tuple[int, int]:
        waited = not self._end.query()
        self._end.synchronize()
        end_ns = self._timeline.time_ns(self._end, waited)
        return end_ns - round(self._begin.elapsed_time(self._end) * 1e6), end_ns
