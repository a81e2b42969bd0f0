"""What a loop sees of the world. Every ``await`` in a loop is a call on one of these."""

from __future__ import annotations

from collections.abc import Coroutine
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from testbed.batch import Batch, StepResult
from testbed.messages import ControlOutput, GrammarSpec, LoadReport, Message, RequestOutput


class Stage(IntEnum):
    """Stages of one loop iteration on the host thread, in the order they happen; the names of the host spans."""

    RECEIVE = 0
    SCHEDULE = 1
    PREPARE = 2
    LAUNCH = 3
    SAMPLE = 4
    WAIT = 5
    PROCESS = 6
    SEND = 7
    FINISH = 8
    """The ends of requests are sent; only in steps that have some."""


class Inbox(Protocol):
    """Everything that wakes a scheduler arrives here."""

    async def recv(self, block: bool) -> tuple[int, list[Message]]:
        """The loop's time (ns) and every message delivered by then; with ``block``, waits until there is one."""
        ...

    def post_at(self, when_ns: int, message: Message) -> None:
        """Deliver ``message`` to this inbox at ``when_ns`` (a timer)."""
        ...


class Cpu(Protocol):
    """The host thread: what our own work costs."""

    def charge(
        self,
        stage: Stage,
        rows: int = 0,
        new_tokens: int = 0,
        admitted: int = 0,
        waiting: int = 0,
        matched_tokens: int = 0,
    ) -> None:
        """A stage of the loop ends here. In virtual time its modelled cost is added; on the wall clock a span closes.

        rows: requests in the batch (FINISH: that ended); new_tokens: prefill tokens in it; admitted: requests received
        (RECEIVE), newly scheduled (SCHEDULE) or ended (PROCESS); waiting: length of the waiting queue when it was
        looked at, else 0; matched_tokens: tokens matched in the prefix tree.
        """
        ...

    async def sleep(self, duration_ns: int) -> None:
        """Let time pass on the host thread."""
        ...


class Pending(Protocol):
    """A launched batch."""

    def sample(self, masks: NDArray[np.int32] | None) -> None:
        """Second phase of a launch with ``defer_sampling``. ``masks``: int32 [rows, ceil(vocabulary / 32)]: bit i of
        word w set: token 32 w + i is allowed; None: all are."""
        ...

    async def result(self) -> StepResult:
        """Waits until the device has done the batch."""
        ...

    def activations(self) -> object:
        """What the next stage of a pipeline computes on; known at once, complete when the device has done the batch.
        It goes through a ``Channel`` and into the next stage's ``launch``."""
        ...


class Executor(Protocol):
    """The device: works in launch order."""

    def launch(self, batch: Batch, defer_sampling: bool = False, after: object = None) -> Pending:
        """Give ``batch`` to the device; returns at once. ``after``: activations of the stage before: the device waits
        for them, the host does not."""
        ...


class Channel(Protocol):
    """One direction of the link between neighbouring loops: whatever is sent arrives, whole and in order."""

    def send(self, item: object) -> None:
        """Returns at once."""
        ...

    async def recv(self) -> Any:
        """The next item; waits for it."""
        ...


class Neighbours(Protocol):
    """A stage's place in the ring of a pipeline: the last stage's ``next`` is stage 0."""

    @property
    def stage(self) -> int: ...  # noqa: D102
    @property
    def stages(self) -> int: ...  # noqa: D102
    @property
    def previous(self) -> Channel: ...  # noqa: D102
    @property
    def next(self) -> Channel: ...  # noqa: D102


class Peers(Protocol):
    """Other engines, by name. What goes to them may come late, twice or never."""

    def send(self, engine: str, message: Message) -> None:
        """Into that engine's inbox."""
        ...

    def transfer(self, engine: str, message: Message, size_bytes: int) -> None:
        """As ``send``, behind ``size_bytes`` of KV, which share the link with everybody else's."""
        ...


class Event(Protocol):
    """Something that happens once, and that one thread waits for."""

    def set(self) -> None:
        """It has happened. Returns at once."""
        ...

    async def wait(self) -> None:
        """Returns when it has happened."""
        ...


class Threads(Protocol):
    """Threads beside the loop's own, in the same process, under one interpreter lock. They may use the executor, and
    wait for one another; the scheduler is the loop's alone."""

    def start(self, name: str, thread: Coroutine[Any, Any, None]) -> None:
        """A thread begins."""
        ...

    def event(self) -> Event:
        """One that has not happened."""
        ...

    def channel(self) -> Channel:
        """From one thread to another."""
        ...


class Reports(Protocol):
    """Where a replica's router hears of its load."""

    @property
    def every_steps(self) -> int:
        """It wants a report after every so many processed steps, and when the loop finds nothing to do."""
        ...

    def send(self, load: LoadReport) -> None:
        """Returns at once."""
        ...


class Outbox(Protocol):
    """Where outputs go."""

    def send_tokens(self, batch: Batch, result: StepResult) -> int:
        """The tokens of one step (one message for the whole batch); returns the time of sending (ns)."""
        ...

    def send(self, output: RequestOutput | ControlOutput) -> None:
        """The end of a request, or the answer to a control message."""
        ...


class Grammars(Protocol):
    """What outputs have to match, and how far each has come. Requests are named by their order of arrival."""

    def compile(self, rank: int, spec: GrammarSpec) -> None:
        """Prepare a request's grammar; returns at once, a ``GrammarReady`` message comes."""
        ...

    def masks(self, batch: Batch) -> NDArray[np.int32] | None:
        """What may come next in each row of ``batch``: see ``Pending.sample``. A row without a grammar allows
        everything; one whose grammar has failed, nothing. None: there is nothing to forbid."""
        ...

    def accept(self, rank: int, token_id: int) -> None:
        """The request's output has this token now."""
        ...

    def forget(self, rank: int) -> None:
        """The request has ended. No effect for one that is not known."""
        ...


class Ports(Protocol):
    """All of them, as a runtime hands them to a loop."""

    @property
    def inbox(self) -> Inbox: ...  # noqa: D102
    @property
    def cpu(self) -> Cpu: ...  # noqa: D102
    @property
    def executor(self) -> Executor: ...  # noqa: D102
    @property
    def outbox(self) -> Outbox: ...  # noqa: D102
    @property
    def grammars(self) -> Grammars: ...  # noqa: D102
    @property
    def neighbours(self) -> Neighbours: ...  # noqa: D102
    @property
    def peers(self) -> Peers: ...  # noqa: D102
    @property
    def threads(self) -> Threads: ...  # noqa: D102
    @property
    def reports(self) -> Reports | None: ...  # noqa: D102
