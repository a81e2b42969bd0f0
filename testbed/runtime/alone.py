"""The surroundings of a loop that has none: no stage before or behind it, no other engine, no second thread."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from testbed.messages import Message
from testbed.ports import Channel, Event
from testbed.scenario.errors import InputError


class Alone:
    """Neighbours, peers and threads of a single loop. Whoever asks for one is a loop of the wrong kind."""

    stage = 0
    stages = 1

    @property
    def previous(self) -> Channel:
        """Raises InputError."""
        raise _no("stage before it")

    @property
    def next(self) -> Channel:
        """Raises InputError."""
        raise _no("stage behind it")

    def send(self, engine: str, message: Message) -> None:
        """Raises InputError."""
        raise _no(f"engine {engine!r} beside it")

    def transfer(self, engine: str, message: Message, size_bytes: int) -> None:
        """Raises InputError."""
        raise _no(f"engine {engine!r} beside it")

    def start(self, name: str, thread: Coroutine[Any, Any, None]) -> None:
        """Raises InputError."""
        thread.close()
        raise _no(f"thread {name!r} beside its own")

    def event(self) -> Event:
        """Raises InputError."""
        raise _no("second thread")

    def channel(self) -> Channel:
        """Raises InputError."""
        raise _no("second thread")


def _no(what: str) -> InputError:
    return InputError(
        f"the event loop asks for a {what}, and there is none",
        where="engine.loop",
        remedy="use loop: auto, which takes the loop that parallel.pp and disaggregation ask for",
    )
