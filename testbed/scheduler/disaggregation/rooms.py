"""What both halves of a pair know of their rooms. A room is a request between two engines; its life is::

    prefill                                decode
    RoomAsked           ------------->     the request waits until memory holds its prompt
                        <-------------     RoomReserved (its pages)
    KvChunk, ..., KvChunk (last)  --->     each is checked; whole: the request may decode
    the source is free  <-------------     KvReceived

Either may end it with ``RoomClosed`` at any time, and ends it alone when its lease is over, whatever was lost. A closed
room stays closed: what comes for it later is refused and counted. So:

* *source* pages are held until the destination takes nothing more (KvReceived, RoomClosed), or the lease is over;
* *destination* pages are held until every chunk that was ever sent has come, or the lease is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from testbed.messages import GenerateRequest, Message, Pair, RoomClosed
from testbed.request import NEVER, FinishReason, Request

if TYPE_CHECKING:
    from testbed.scheduler.scheduler import Scheduler

BetweenEngines = Any
"""A message of a room: it has ``room``, ``sender``, ``epoch`` and ``to_epoch``."""


class Poll(IntEnum):
    """How far a room has come (SGLang's KVPoll; of several ranks or stages the lowest counts)."""

    FAILED = 0
    BOOTSTRAPPING = 1
    """The other side has not answered yet."""
    WAITING_FOR_INPUT = 2
    """Prefill: there is room on the other side. Decode: the prompt will come."""
    TRANSFERRING = 3
    SUCCESS = 4


class Terms(NamedTuple):
    """What a scheduler has to know to be one half of a pair."""

    role: Literal["prefill", "decode"]
    engine: str
    """Its name, by which others send to it."""
    epoch: int = 1
    """Higher at each start of this engine."""
    kv_bytes_per_token: int = 1
    """Of all layers."""
    stage: int = 0
    stages: int = 1
    """Of a prefill engine's pipeline. All stages decide alike; the first one speaks for them, each sends its own KV."""
    stage_kv_bytes_per_token: int | None = None
    """Of this stage's layers; None: all."""
    bootstrap_timeout_ns: int = 300 * 10**9
    """Until the other side has answered: SGLang's 300 s."""
    transfer_timeout_ns: int = 300 * 10**9
    """From the reservation until all KV has come, and from the last chunk until it is acknowledged."""
    reserved_decode_tokens: int = 512
    """Tokens kept free on the decode side for each request there (SGLang's ``num_reserved_decode_tokens``)."""
    host_gb_per_s: float = 25.0
    """Between a decode device and its host's memory, where retracted KV waits."""


class Ending(NamedTuple):
    """Why a request ends."""

    reason: FinishReason
    message: str
    status: int


class Outgoing(NamedTuple):
    """A message to another engine."""

    engine: str
    message: Message
    size_bytes: int = 0
    """KV that goes before it."""
    fence: int = NEVER
    """The last launch that may still write to pages which the message gives to the other engine."""


class Side(Protocol):
    """What a scheduler asks of its half of a pair. Its ends are sent with ``Scheduler.failed``."""

    rooms: Rooms

    @property
    def ready(self) -> bool:
        """Whether an iteration could do something without another message or result."""
        ...

    @property
    def queued(self) -> int:
        """Requests that wait for the other side."""
        ...

    def is_open(self, room: int) -> bool:
        """Whether the room has a request here and is not done with."""
        ...

    def add(self, request: Request, pair: Pair) -> None:
        """A request was accepted."""
        ...

    def refused(self, pair: Pair, message: str, status: int) -> None:
        """A request was refused: the other half must hear of it."""
        ...

    def give_up(self, request: Request, ending: Ending) -> None:
        """End a request wherever it is, or as soon as its KV is free to go."""
        ...

    def handle(self, message: Message) -> None:
        """A message of the other side."""
        ...

    def holds(self, request: Request) -> bool:
        """Whether the request holds KV here and is rightly in no batch."""
        ...

    def unplaced(self) -> list[int]:
        """Ranks of the requests that hold no slot and do not wait for one."""
        ...

    def problem(self) -> str:
        """What is wrong with the side's own books; empty when nothing is."""
        ...


class Rooms:
    """What both sides keep: leases, closed rooms, the epochs of other engines, and what is to be sent."""

    def __init__(self, scheduler: Scheduler, terms: Terms) -> None:
        self._scheduler = scheduler
        self.terms = terms
        self.outgoing: list[Outgoing] = []
        """In order; the loop sends them."""
        self.epochs: dict[str, int] = {}
        """The highest of each engine that has been heard of."""
        self._until: dict[int, int] = {}
        """When each room's lease is over."""
        self._ends: list[tuple[int, int]] = []
        """Heap of (until, room); an entry that ``_until`` does not confirm is void."""
        self._timer_ns = NEVER
        """When the next timer comes."""
        self._closed: dict[int, tuple[int, int]] = {}
        """(until when it is remembered, chunks that were sent) of each closed room, oldest first."""

    @property
    def now_ns(self) -> int:
        """The stamp that decisions use."""
        return self._scheduler.now_ns

    # -- messages ---------------------------------------------------------------------------------------------------

    def tell(self, engine: str, kind: type, room: int, to_epoch: int, *, fence: int = NEVER, **fields: Any) -> None:
        """Send a message of a room without KV. ``to_epoch``: that of the other engine in this room; 0: not known."""
        if self.terms.stage == 0:
            message = kind(room, self.terms.engine, self.terms.epoch, to_epoch, **fields)
            self.outgoing.append(Outgoing(engine, message, 0, fence))

    def tell_closed(self, engine: str, room: int, to_epoch: int, message: str, status: int, chunks: int = 0) -> None:
        """Say that this side takes part no more; ``chunks``: that each of its stages has sent."""
        chunks *= self.terms.stages
        self.tell(engine, RoomClosed, room, to_epoch, message=message, status=status, chunks=chunks)

    def hand_over(
        self,
        message: BetweenEngines,
        handlers: Mapping[type, Callable[[Any], None]],
        restarted: Callable[[str, int], None],
    ) -> None:
        """Give a message to its handler, if it is of the present life of both engines. ``restarted(engine, epoch)`` is
        called before when the sender has a new one."""
        known = self.epochs.get(message.sender, 0)
        handler = handlers.get(type(message))
        if message.to_epoch not in (0, self.terms.epoch) or message.epoch < known:
            self.refuse("old_epoch")
        elif handler is None:
            self.refuse("misdirected")
        else:
            self.epochs[message.sender] = message.epoch
            if 0 < known < message.epoch:
                restarted(message.sender, message.epoch)
            handler(message)

    def refuse(self, why: str) -> None:
        """A message has no effect: count it."""
        self._scheduler.recorder.count(f"refused_{why}")

    def refuse_closed(self, message: BetweenEngines) -> None:
        """A message for a room that is not open: if it was, its sender has not heard of the end."""
        if message.room not in self._closed:
            self.refuse("unknown")
            return
        self.refuse("late")
        chunks = self._closed[message.room][1]
        self.tell_closed(message.sender, message.room, message.epoch, "the room is closed", 500, chunks)

    # -- leases -----------------------------------------------------------------------------------------------------

    def lease(self, room: int, duration_ns: int) -> None:
        """The room may be held for so long from now on."""
        until = self.now_ns + duration_ns
        self._until[room] = until
        heappush(self._ends, (until, room))
        if self._timer_ns == NEVER or until < self._timer_ns:
            self._timer_ns = until
            self._scheduler.wake_at(until)

    def expired(self) -> list[int]:
        """Rooms whose lease is over by now: they are not leased any more. One timer waits for the next end."""
        found: list[int] = []
        if not self._ends or self._ends[0][0] > self.now_ns:
            return found
        while self._ends and (self._ends[0][0] <= self.now_ns or self._until.get(self._ends[0][1]) != self._ends[0][0]):
            until, room = heappop(self._ends)
            if self._until.get(room) == until:
                del self._until[room]
                found.append(room)
        self._timer_ns = NEVER
        if self._ends:
            self._timer_ns = self._ends[0][0]
            self._scheduler.wake_at(self._timer_ns)
        return found

    # -- ends -------------------------------------------------------------------------------------------------------

    def end_lease(self, room: int) -> None:
        """The room holds nothing any more."""
        self._until.pop(room, None)

    def close(self, room: int, chunks: int = 0) -> None:
        """The room is over here, after ``chunks`` chunks were sent: remembered for as long as anything about it can be
        on its way."""
        self._closed.pop(room, None)
        until = self.now_ns + self.terms.bootstrap_timeout_ns + self.terms.transfer_timeout_ns
        self._closed[room] = until, chunks
        oldest = next(iter(self._closed))
        while self._closed[oldest][0] <= self.now_ns:
            del self._closed[oldest]
            oldest = next(iter(self._closed))

    def is_closed(self, room: int) -> bool:
        """Whether the room is over."""
        return room in self._closed

    @property
    def leased(self) -> dict[int, int]:
        """Rooms and when their lease is over, for checks."""
        return self._until


def wrong_half(side: Side | None, source: GenerateRequest) -> str | None:
    """Why ``source`` is not for this engine, if it is not. ``side``: None for an engine that serves whole requests."""
    pair = source.pair
    if side is None:
        return "this engine serves whole requests" if pair is not None else None
    terms = side.rooms.terms
    if pair is None or terms.engine != (pair.prefill if terms.role == "prefill" else pair.decode):
        return f"{terms.engine} serves the {terms.role} half of requests that a router has paired"
    if side.is_open(pair.room):
        return f"room {pair.room} belongs to another request"
    if source.grammar is not None or source.return_logprob:
        return "grammars and log-probabilities are not available where prefill and decode are apart"
    return None
