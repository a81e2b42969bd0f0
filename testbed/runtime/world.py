"""Virtual time, shared by every loop of a deployment: SimPy's events, and the loops as its processes.

A coroutine of a loop is a SimPy process; the only ``yield`` is ``wait``.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import simpy
from simpy.core import StopSimulation
from simpy.events import URGENT

from testbed.runtime.modelled import Deadlock, LoopReturned, NoPort


@types.coroutine
def wait(event: simpy.Event) -> Generator[simpy.Event, Any, Any]:
    """The trap: suspend the coroutine until ``event``."""
    return (yield event)


class World:
    """The clock, and the loops that live by it."""

    def __init__(self) -> None:
        self.env = simpy.Environment()
        self.open_requests: Callable[[], int] = lambda: 0
        """Requests that were sent and have not ended."""
        self._loops: list[tuple[str, Coroutine[Any, Any, None]]] = []
        self._failure: BaseException | None = None

    def now_ns(self) -> int:
        """SimPy's time: no loop is behind it."""
        return int(self.env.now)

    def at(self, when_ns: int, action: Callable[[], None]) -> None:
        """Call ``action`` at ``when_ns`` (now, if that is past), before any loop wakes at that instant."""
        event = simpy.Event(self.env)
        event._ok, event._value = True, None
        event.callbacks = [lambda _: action()]
        self.env.schedule(event, priority=URGENT, delay=max(when_ns - self.env.now, 0))

    def start(self, name: str, loop: Coroutine[Any, Any, None], *, may_return: bool = False) -> None:
        """A loop begins at this instant. ``may_return``: it is a thread of one, which ends before the world does."""
        guarded = self._guarded(loop, may_return)
        self._loops.append((name, guarded))
        self.env.process(guarded)  # type: ignore[arg-type]  # SimPy asks for send and throw, which a coroutine has

    async def _guarded(self, loop: Coroutine[Any, Any, None], may_return: bool) -> None:
        """SimPy re-makes exceptions of its processes: the loop's own is kept here, and ends the world."""
        try:
            await loop
            if not may_return:
                raise LoopReturned
        except GeneratorExit:
            raise
        except BaseException as error:
            self._failure = error
            self.at(int(self.env.now), self._stop)

    @staticmethod
    def _stop() -> None:
        raise StopSimulation(None)

    def run(self) -> None:
        """Run until nothing can happen any more. Raises a loop's own exception as it was, LoopReturned, NoPort, and
        Deadlock when requests are open but no event is left."""
        try:
            self.env.run()
            if self._failure is not None:
                raise self._failure
            if count := self.open_requests():
                waiting = "; ".join(f"{name} waits in {where_it_waits(loop)}" for name, loop in self._loops)
                message = f"at {self.env.now} ns nothing can happen any more and {count} requests are open; {waiting}"
                raise Deadlock(message)
        except AttributeError as error:
            if error.name != "gi_frame":
                raise
            raise NoPort from None  # SimPy was given no event, and looks for the frame of a generator to say so
        finally:
            for _, loop in self._loops:
                loop.close()


def where_it_waits(coroutine: Coroutine[Any, Any, Any]) -> str:
    """The chain of functions in which a suspended coroutine waits, for deadlock reports."""
    chain: list[str] = []
    awaited: Any = coroutine
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is not None:
            chain.append(f"{frame.f_code.co_name} (line {frame.f_lineno})")
        awaited = getattr(awaited, "cr_await", None)
    return " > ".join(chain)
