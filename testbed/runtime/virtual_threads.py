"""Threads of one loop in virtual time: processes of the loop's ``World`` that share one host clock.

They live in one Python process, whose interpreter lock lets one of them work at a time. So there is one clock of host
work, the loop's, and whoever works moves it on. A thread keeps the interpreter until it waits, for another thread or
for the device, or looks into its inbox: that the lock would be taken away in between (every 5 ms, CPython's switch
interval) is not modelled, since the stretches between two waits are shorter with every host but a very slow one; nor is
that calls into C give it away for their time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import simpy

from testbed.ports import Channel, Event
from testbed.runtime.world import wait

if TYPE_CHECKING:
    from testbed.runtime.virtual import VirtualRuntime


class VirtualThreads:
    """See ports.Threads."""

    def __init__(self, runtime: VirtualRuntime) -> None:
        self._runtime = runtime

    def start(self, name: str, thread: Coroutine[Any, Any, None]) -> None:
        """See ports.Threads."""
        self._runtime.world.start(name, thread, may_return=True)

    def event(self) -> Event:
        """See ports.Threads."""
        return VirtualEvent(self._runtime)

    def channel(self) -> Channel:
        """See ports.Threads."""
        return ThreadChannel(self._runtime)


class VirtualEvent:
    """See ports.Event."""

    def __init__(self, runtime: VirtualRuntime) -> None:
        self._runtime = runtime
        self._has_happened = False
        self._waiting: simpy.Event | None = None

    def set(self) -> None:
        """See ports.Event."""
        self._has_happened = True
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            waiting.succeed()

    async def wait(self) -> None:
        """See ports.Event."""
        if not self._has_happened:
            self._waiting = simpy.Event(self._runtime.env)
            await wait(self._waiting)
            self._runtime.local_ns += self._runtime.host.wake_ns


class ThreadChannel:
    """See ports.Channel: the queue from one thread of a loop to another."""

    def __init__(self, runtime: VirtualRuntime) -> None:
        self._runtime = runtime
        self._items: deque[Any] = deque()
        self._sent: VirtualEvent | None = None
        """For a receiver that waits already."""

    def send(self, item: object) -> None:
        """See ports.Channel."""
        self._items.append(item)
        if self._sent is not None:
            sent, self._sent = self._sent, None
            sent.set()

    async def recv(self) -> Any:
        """See ports.Channel."""
        if not self._items:
            self._sent = VirtualEvent(self._runtime)
            await self._sent.wait()
        return self._items.popleft()
