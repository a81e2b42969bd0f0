"""Several loops on the wall clock: a thread each, and one more for whatever is due at a time (users, routers, links).

Nothing of a scheduler is touched by any thread but its loop's own: to a loop, all that others do is a message in its
mailbox or an item in its channel. The threads share one interpreter, so their host times contend as those of processes
on fewer cores would.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Any

from testbed.batch import Batch, StepResult
from testbed.messages import ControlOutput, Message, RequestOutput
from testbed.runtime.modelled import Deadlock
from testbed.runtime.users import Users
from testbed.runtime.wall import NAP_NS, LoopEnded, WallClock, WallRuntime, run_to_the_end


class WallWorld:
    """The clock, what is due, and the loops. All waiting is on one condition: so a failure in one loop reaches the
    others, and it shows when each waits for another."""

    def __init__(self, clock: WallClock) -> None:
        self.clock = clock
        self.open_requests: Callable[[], int] = lambda: 0
        """Requests that were sent and have not ended."""
        self._changed = threading.Condition()
        self._due: list[tuple[int, int, Callable[[], None]]] = []
        """Heap of (when, serial, action)."""
        self._serial = 0
        self._loops: dict[str, Coroutine[Any, Any, None]] = {}
        self._endings: dict[str, Callable[[], None]] = {}
        self._waiting: dict[str, tuple[Callable[[], bool], bool]] = {}
        """What each loop that waits is waiting for, and whether a timer will wake it."""
        self._failure: BaseException | None = None
        self._over = False

    # -- for whoever builds a deployment ------------------------------------------------------------------------------

    def now_ns(self) -> int:
        """The clock's time."""
        return self.clock.now_ns()

    def at(self, when_ns: int, action: Callable[[], None]) -> None:
        """Call ``action`` at ``when_ns``, while nothing else happens."""

        with self.at_rest():
            self._serial += 1
            heappush(self._due, (when_ns, self._serial, action))

    def start(self, name: str, loop: Coroutine[Any, Any, None], ended: Callable[[], None] = lambda: None) -> None:
        """A loop to be run; ``ended`` is called behind it, in its thread."""
        self._loops[name], self._endings[name] = loop, ended

    def run(self) -> None:
        """Until no request is open and nothing more is due, or the clock is stopping. Raises a loop's own exception,
        and Deadlock when requests are open and nothing will wake any loop."""
        threads = [threading.Thread(target=self._drive, args=(name,), name=name) for name in list(self._loops)]
        started: list[threading.Thread] = []
        try:
            for thread in threads:
                thread.start()
                started.append(thread)
            self._act()
        except BaseException:
            self.clock.stopping = True
            raise
        finally:
            with self.at_rest():
                self._over = True
                if self._failure is not None:
                    self.clock.stopping = True  # the other loops need not serve what is left
            for thread in started:
                thread.join()
        if self._failure is not None:
            raise self._failure

    # -- threads ------------------------------------------------------------------------------------------------------

    def _drive(self, name: str) -> None:
        try:
            run_to_the_end(self._loops[name])
        except BaseException as error:
            self._failure = self._failure or error
        finally:
            self._endings[name]()
            with self._changed:
                del self._loops[name]
                self._changed.notify_all()

    def _act(self) -> None:
        """Do what is due, until all is over."""
        while True:
            with self._changed:
                while not (self._ended() or (self._due and self._due[0][0] <= self.clock.now_ns())):
                    # In naps, so that a request to stop is seen.
                    ahead_ns = self._due[0][0] - self.clock.now_ns() if self._due else NAP_NS
                    self._changed.wait(max(min(ahead_ns, NAP_NS), 0) * 1e-9)
                if self._ended():
                    return
                heappop(self._due)[2]()
                self._changed.notify_all()

    def _ended(self) -> bool:
        """Nothing more will happen, or nothing more shall."""
        if self._failure is not None or self.clock.stopping:
            return True
        if (
            self._due
            or len(self._waiting) < len(self._loops)
            or any(happened() for happened, _ in self._waiting.values())
        ):
            return False
        if count := self.open_requests():
            if any(timed for _, timed in self._waiting.values()):
                return False
            names = ", ".join(self._waiting)
            self._failure = Deadlock(f"{count} requests are open, and each loop waits for another: {names}")
        return True

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Nothing else happens within the block; what happens there may be waited for."""
        with self._changed:
            yield
            self._changed.notify_all()

    def wait_for(self, name: str, happened: Callable[[], bool], until_ns: int | None = None) -> None:
        """Block loop ``name`` until ``happened`` or ``until_ns``. Raises LoopEnded when all is over."""
        with self._changed, self._noted(name, happened, until_ns is not None):
            while not happened():
                if self._over or self._failure is not None:
                    raise LoopEnded
                left_ns = None if until_ns is None else until_ns - self.clock.now_ns()
                if left_ns is not None and left_ns <= 0:
                    return
                self._changed.notify_all()  # the last to wait shows that nothing moves
                self._changed.wait(None if left_ns is None else min(left_ns * 1e-9, threading.TIMEOUT_MAX))

    @contextmanager
    def _noted(self, name: str, happened: Callable[[], bool], timed: bool) -> Iterator[None]:
        self._waiting[name] = happened, timed
        try:
            yield
        finally:
            del self._waiting[name]


class Mailbox:
    """A loop's inbox: see wall.Clients."""

    def __init__(self, world: WallWorld, name: str, users: Users | None) -> None:
        self._world, self._name, self._users = world, name, users
        self._messages: deque[Message] = deque()

    def deliver(self, message: Message) -> None:
        """From any thread."""
        with self._world.at_rest():
            self._messages.append(message)

    @property
    def tied_to_iterations(self) -> bool:
        """See wall.Clients."""
        return self._users is not None and self._users.tied_to_iterations

    def delivered(self, now_ns: int, iteration: int) -> list[Message]:
        """See wall.Clients."""
        messages: list[Message] = []
        if self.tied_to_iterations:
            assert self._users is not None
            with self._world.at_rest():
                messages.extend(self._users.due(iteration, now_ns))
        while self._messages:
            messages.append(self._messages.popleft())
        return messages

    def wait(self, until_ns: int | None) -> None:
        """See wall.Clients."""
        self._world.wait_for(self._name, lambda: bool(self._messages), until_ns)

    def tokens(self, batch: Batch, result: StepResult) -> None:
        """See wall.Clients: nobody reads them as they come."""

    def hear(self, output: RequestOutput | ControlOutput, now_ns: int) -> None:
        """See wall.Clients."""
        if self._users is not None:
            with self._world.at_rest():
                self._users.hear(output, now_ns)


class WallChannel:
    """From one loop's thread to another's: see ports.Channel."""

    def __init__(self, world: WallWorld, receiver: str, runtime: WallRuntime) -> None:
        """``runtime``: the receiver's, which begins a span where its waiting ends."""
        self._world, self._name, self._runtime = world, receiver, runtime
        self._items: deque[Any] = deque()
        self._closed = False

    def send(self, item: object) -> None:
        """See ports.Channel."""
        with self._world.at_rest():
            self._items.append(item)

    def close(self) -> None:
        """The sender has ended: so does the receiver, behind the last item."""
        with self._world.at_rest():
            self._closed = True

    async def recv(self) -> Any:
        """See ports.Channel. Raises LoopEnded when nothing more will come."""
        self._world.wait_for(self._name, lambda: bool(self._items or self._closed))
        if not self._items:
            raise LoopEnded
        self._runtime.begin_span()
        return self._items.popleft()
