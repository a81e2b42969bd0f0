"""Virtual time, shared by every loop of a deployment: SimPy's clock and events, and the loops that wait for them.

The only ``yield`` of a loop's coroutine is ``wait``.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import simpy
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

    def now_ns(self) -> int:
        """SimPy's time: no loop is behind it."""
        return int(self.env.now)

    def at(self, when_ns: int, action: Callable[[], None]) -> None:
        """Call ``action`` at ``when_ns`` (now, if that is past), before any loop wakes at that instant."""
        self._call(when_ns, lambda _: action())

    def start(self, name: str, loop: Coroutine[Any, Any, None], *, may_return: bool = False) -> None:
        """A loop begins at this instant. ``may_return``: it is a thread of one, which ends before the world does."""
        self._loops.append((name, loop))

        def go_on(event: simpy.Event) -> None:
            """What the loop waited for has happened: let it run until it waits again. (A SimPy process does no more,
            takes longer, and re-makes exceptions; here the loop's own ends the world as it is.)"""
            try:
                while event.callbacks is None:
                    event = loop.send(event._value)
                    if not isinstance(event, simpy.Event):
                        raise NoPort
                event.callbacks.append(go_on)
            except StopIteration:
                if not may_return:
                    raise LoopReturned from None

        self._call(self.now_ns(), go_on)

    def _call(self, when_ns: int, callback: Callable[[simpy.Event], None]) -> None:
        event = simpy.Event(self.env)
        event._ok, event._value = True, None
        event.callbacks = [callback]
        self.env.schedule(event, priority=URGENT, delay=max(when_ns - self.env.now, 0))

    def run(self) -> None:
        """Run until nothing can happen any more. Raises a loop's own exception as it was, LoopReturned, NoPort, and
        Deadlock when requests are open but no event is left."""
        try:
            self.env.run()
            if count := self.open_requests():
                waiting = "; ".join(f"{name} waits in {where_it_waits(loop)}" for name, loop in self._loops)
                message = f"at {self.env.now} ns nothing can happen any more and {count} requests are open; {waiting}"
                raise Deadlock(message)
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
