"""The ring of a pipeline in virtual time: one channel from each stage to the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import simpy

from testbed.ports import Channel
from testbed.runtime.virtual import VirtualRuntime
from testbed.runtime.wall import WallRuntime
from testbed.runtime.world import wait


class VirtualChannel:
    """What one loop sends to the next: it arrives ``latency_ns`` later, in order.

    Loops that only wait for one another in order see the same whichever is run first (a Kahn network), so an item is
    handed over with its stamp when it is sent, and an event is made only for a receiver that waits already.
    """

    def __init__(self, sender: VirtualRuntime, receiver: VirtualRuntime, latency_ns: int) -> None:
        self._sender, self._receiver = sender, receiver
        self._latency_ns = latency_ns
        self._items: deque[tuple[int, Any]] = deque()
        """(when it is there, item)"""
        self._waiting: simpy.Event | None = None

    def send(self, item: object) -> None:
        """See ports.Channel."""
        arrival_ns = self._sender.local_ns + self._latency_ns
        self._items.append((arrival_ns, item))
        waiting = self._waiting
        if waiting is not None:
            self._waiting = None
            waiting._ok, waiting._value = True, None
            env = self._receiver.env
            delay_ns = arrival_ns - env.now
            env.schedule(waiting, delay=delay_ns if delay_ns > 0 else 0)

    async def recv(self) -> Any:
        """See ports.Channel."""
        if not self._items:
            self._waiting = simpy.Event(self._receiver.env)
            await wait(self._waiting)
        arrival_ns, item = self._items.popleft()
        if arrival_ns > self._receiver.local_ns:
            self._receiver.local_ns = arrival_ns
        return item


@dataclass(frozen=True, slots=True)
class Ring:
    """A stage's neighbours."""

    stage: int
    stages: int
    previous: Channel
    next: Channel


def close_ring(runtimes: Sequence[VirtualRuntime | WallRuntime], channels: Sequence[Channel]) -> None:
    """Give the loops of a pipeline's stages their neighbours; ``channels``: from each stage to the next, the last one's
    to the first."""
    for stage, runtime in enumerate(runtimes):
        runtime.neighbours = Ring(stage, len(runtimes), channels[stage - 1], channels[stage])


def connect_stages(runtimes: Sequence[VirtualRuntime], latency_ns: int) -> None:
    """Make a ring of the loops of a pipeline's stages, in order of the stages."""
    count = len(runtimes)
    close_ring(runtimes, [VirtualChannel(runtimes[i], runtimes[(i + 1) % count], latency_ns) for i in range(count)])
