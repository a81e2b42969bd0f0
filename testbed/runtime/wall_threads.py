"""Threads of one loop on the wall clock: the operating system's, under Python's own interpreter lock."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from testbed.loops.overlap_thread import event_loop_overlap_thread
from testbed.loops.select import LOOPS, EventLoop
from testbed.ports import Channel, Event, Stage
from testbed.runtime.modelled import Deadlock
from testbed.runtime.wall import WallRuntime


class WallThreads:
    """See ports.Threads. All their waiting is on one condition: so a failure in one reaches the others, and it shows
    when each waits for another."""

    def __init__(self, on_wake: Callable[[], None]) -> None:
        """``on_wake``: called in a thread that has waited and goes on."""
        self._changed = threading.Condition()
        self._on_wake = on_wake
        self._running = {"the loop": True}
        self._awaited: list[Callable[[], bool]] = []
        """What each thread that waits is waiting for."""
        self._failure: BaseException | None = None

    def start(self, name: str, thread: Coroutine[Any, Any, None]) -> None:
        """See ports.Threads."""
        self._running[name] = True
        threading.Thread(target=self._drive, args=(name, thread), name=name, daemon=True).start()

    def _drive(self, name: str, thread: Coroutine[Any, Any, None]) -> None:
        """As ``wall.run_to_the_end``, for a thread that may return."""
        self._on_wake()
        try:
            thread.send(None)
        except StopIteration:
            pass
        except BaseException as error:
            self._failure = self._failure or error
        finally:
            with self._changed:
                del self._running[name]
                self._changed.notify_all()

    def event(self) -> Event:
        """See ports.Threads."""
        return WallEvent(self)

    def channel(self) -> Channel:
        """See ports.Threads."""
        return ThreadChannel(self)

    def tell(self, happen: Callable[[], None]) -> None:
        """Let something happen that others may wait for."""
        with self._changed:
            happen()
            self._changed.notify_all()

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Block until ``happened``. Raises what another thread has raised, and Deadlock when all of them wait."""
        with self._changed:
            if happened():
                return
            self._awaited.append(happened)
            try:
                while not happened():
                    self._check()
                    self._changed.wait()
            finally:
                self._awaited.remove(happened)
        self._on_wake()

    def _check(self) -> None:
        all_wait = len(self._awaited) == len(self._running)
        if self._failure is None and all_wait and not any(happened() for happened in self._awaited):
            self._failure = Deadlock(f"each waits for another: {', '.join(self._running)}")
            self._changed.notify_all()
        if self._failure is not None:
            raise self._failure


class WallEvent:
    """See ports.Event."""

    def __init__(self, threads: WallThreads) -> None:
        self._threads = threads
        self._has_happened = False

    def _happen(self) -> None:
        self._has_happened = True

    def set(self) -> None:
        """See ports.Event."""
        self._threads.tell(self._happen)

    async def wait(self) -> None:
        """See ports.Event. Raises what another thread has raised, and Deadlock."""
        self._threads.wait_for(lambda: self._has_happened)


class ThreadChannel:
    """See ports.Channel: the queue from one thread of a loop to another."""

    def __init__(self, threads: WallThreads) -> None:
        self._threads = threads
        self._items: deque[Any] = deque()

    def send(self, item: object) -> None:
        """See ports.Channel."""
        self._threads.tell(lambda: self._items.append(item))

    async def recv(self) -> Any:
        """See ports.Channel. Raises what another thread has raised, and Deadlock."""
        self._threads.wait_for(lambda: bool(self._items))
        return self._items.popleft()


class ThreadedWallRuntime(WallRuntime):
    """The ports of a loop that starts threads. Spans of one thread follow one another; those of two overlap only where
    the interpreter's lock lets them."""

    def __init__(self, **parts: Any) -> None:
        """See WallRuntime."""
        self._of_thread = threading.local()
        self._interpreter = threading.Lock()
        self._interpreter_free_ns = 0
        super().__init__(**parts)
        self.threads = WallThreads(self._begin_span)

    def _begin_span(self) -> None:
        self._mark_ns = self.now_ns()

    @property
    def _mark_ns(self) -> int:
        """Where this thread's open span began."""
        return getattr(self._of_thread, "mark_ns", 0)

    @_mark_ns.setter
    def _mark_ns(self, when_ns: int) -> None:
        self._of_thread.mark_ns = when_ns

    def _close_span(self, stage: Stage, least_ns: int) -> None:
        """An injected host has one interpreter too: its work in one thread excludes that in another."""
        with self._interpreter:
            if least_ns:
                self._mark_ns = max(self._mark_ns, self._interpreter_free_ns)
            super()._close_span(stage, least_ns)
            self._interpreter_free_ns = self._mark_ns


def runtime_for(loop: EventLoop) -> type[WallRuntime]:
    """The kind of runtime that ``loop`` needs: one of the user's own may start threads."""
    starts_none = loop in LOOPS.values() and loop is not event_loop_overlap_thread
    return WallRuntime if starts_none else ThreadedWallRuntime
