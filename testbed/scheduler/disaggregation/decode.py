"""The decode half of a pair (specification G.2): it makes room for prompts, takes their KV, and decodes.

A request goes through the prealloc queue (until memory holds its prompt), the transfer queue (until its KV is here),
the queue of the arrived, and the running batch, which it joins without a prefill. KV that memory does not hold any more
is copied to the host and back, never computed again. There is no prefix cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from testbed.batch import Batch, ForwardMode, Prefill, StepResult
from testbed.messages import KvChunk, KvReceived, Message, Pair, RoomAsked, RoomClosed, RoomReserved, chunk_checksum
from testbed.request import NEVER, FinishReason, Request
from testbed.scenario.errors import InputError
from testbed.scheduler.disaggregation.rooms import Ending, Poll, Rooms, Terms

if TYPE_CHECKING:
    from testbed.scheduler.scheduler import Scheduler

RESERVE_MIN_TOKENS = 2
"""The overlap loop launches a second step before the first one's token is known: with room for one only, a request that
is brought back would be retracted again, its token lost, for ever."""


def preallocated_slots(max_running_requests: int) -> int:
    """Slots for prompts on their way, beside those of the running batch (SGLang's ``pre_alloc_size``)."""
    return 2 * max_running_requests if max_running_requests <= 32 else 0


class Receiver:
    """A room on the decode side, until all of its KV is here."""

    __slots__ = (
        *("chunks", "chunks_in_all", "metadata_slot", "peer", "peer_epoch", "request", "reserved_ns", "room"),
        *("spent_ns", "stages", "state", "stopped"),
    )

    def __init__(self, request: Request, pair: Pair) -> None:
        self.request = request
        self.room = pair.room
        self.peer = pair.prefill
        self.peer_epoch = 0
        self.state = Poll.BOOTSTRAPPING
        self.reserved_ns = NEVER
        self.metadata_slot = NEVER
        """Where the metadata will lie; held from the reservation until all is here."""
        self.stages = 1
        """Of the other side: each sends its part."""
        self.chunks: dict[tuple[int, int], int] = {}
        """Tokens of each chunk that has come, by its stage and number."""
        self.stopped = False
        """Whether the first token ends the request."""
        self.spent_ns = 0
        """What the other side has spent on it since the reservation."""
        self.chunks_in_all: dict[int, int] = {}
        """How many they are, by stage: the last one says it."""


class Arrived(NamedTuple):
    """A request whose KV is here and which waits for a seat in the running batch."""

    request: Request
    stopped: bool = False
    """Whether its first token ends it."""


class Aside:
    """Pages of a closed room that the other side may still write to."""

    __slots__ = ("chunks", "sent")

    def __init__(self, chunks: dict[tuple[int, int], int], sent: int | None) -> None:
        self.chunks = chunks
        """Those that have come."""
        self.sent = sent
        """How many were sent, once the other side has said so."""


class DecodeSide:
    """See rooms.Side."""

    def __init__(self, scheduler: Scheduler, terms: Terms) -> None:
        """Raises InputError for a reserve with which a retracted request might never get any further."""
        if terms.reserved_decode_tokens < RESERVE_MIN_TOKENS:
            raise InputError(
                f"{terms.reserved_decode_tokens} reserved tokens do not let a retracted request go on",
                where="disaggregation.reserved_decode_tokens",
                remedy=f"give at least {RESERVE_MIN_TOKENS}",
            )
        self._scheduler = scheduler
        self.rooms = Rooms(scheduler, terms)
        self.asks: dict[int, RoomAsked] = {}
        """What prefill engines asked for requests that are still to come."""
        self.prealloc: dict[int, Receiver] = {}
        """By room, in order of arrival."""
        self.transfer: dict[int, Receiver] = {}
        """Their memory is reserved and their KV not here."""
        self.arrived: list[Arrived] = []
        self.retracted: list[tuple[Request, int]] = []
        """(request whose KV is on the host, its last token, whose KV the next step computes), oldest first."""
        self.joined: list[Request] = []
        """They run, and the device has not been told."""
        self.aside: dict[int, Aside] = {}
        """By room."""
        self.moved_tokens = 0
        """Tokens of KV to be copied between device and host before the next step."""
        self._resumable = False
        """Memory was freed since the last attempt to resume somebody, by this very decision."""
        self._rows: Sequence[Request] | None = None
        self._largest_tokens = 0
        """The most that one of ``_rows`` may come to hold."""
        self.metadata_slots_in_all = 2 * scheduler.config.max_running_requests
        self.metadata_slots = list(range(self.metadata_slots_in_all - 1, -1, -1))
        """The free ones."""
        self._handlers: dict[type, Callable[[Any], None]] = {
            RoomAsked: self._asked,
            KvChunk: self._chunk,
            RoomClosed: self._closed_there,
        }

    # -- requests ---------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """See rooms.Side."""
        return bool(self.arrived) or self._resumable

    @property
    def queued(self) -> int:
        """See rooms.Side."""
        return len(self.prealloc)

    @property
    def holds_memory(self) -> bool:
        """Whether memory is held outside the running batch that others will give back."""
        return bool(self.transfer or self.arrived or self.aside)

    def is_open(self, room: int) -> bool:
        """See rooms.Side."""
        return room in self.prealloc or room in self.transfer

    def add(self, request: Request, pair: Pair) -> None:
        """See rooms.Side."""
        request.room = pair.room
        receiver = self.prealloc[pair.room] = Receiver(request, pair)
        if self.rooms.is_closed(pair.room):
            del self.prealloc[pair.room]
            self._scheduler.end(
                request, Ending(FinishReason.ERROR, "the prefill engine has given this request up", 500)
            )
            return
        self.rooms.lease(pair.room, self.rooms.terms.bootstrap_timeout_ns)
        ask = self.asks.pop(pair.room, None)
        if ask is not None:
            self._shake_hands(receiver, ask)

    def refused(self, pair: Pair, message: str, status: int) -> None:
        """See rooms.Side."""
        if pair.room in self.prealloc or pair.room in self.transfer or self.rooms.is_closed(pair.room):
            return
        ask = self.asks.pop(pair.room, None)
        self.rooms.end_lease(pair.room)
        self.rooms.close(pair.room)
        self.rooms.tell_closed(pair.prefill, pair.room, ask.epoch if ask else 0, message, status)

    def give_up(self, request: Request, ending: Ending, sent: int | None = None) -> None:
        """See rooms.Side. ``sent``: chunks that the other side has sent in all, when it has said so. Pages that it may
        still write to are set aside."""
        room = request.room
        receiver = self.prealloc.pop(room, None) or self.transfer.pop(room, None)
        if receiver is None:
            self._leave(request)
        else:
            receiver.state = Poll.FAILED
            self._scheduler.recorder.count("rooms_failed")
            self.rooms.tell_closed(receiver.peer, room, receiver.peer_epoch, ending.message, ending.status)
            self.rooms.close(room)
            if request.slot == NEVER:
                self.rooms.end_lease(room)
            else:
                self.metadata_slots.append(receiver.metadata_slot)
                self._set_aside(receiver, sent)
        self._scheduler.end(request, ending)

    def _leave(self, request: Request) -> None:
        """A request whose KV had come leaves its queue; one that runs is in none."""
        self.arrived = [arrived for arrived in self.arrived if arrived.request is not request]
        for place, (other, token) in enumerate(self.retracted):
            if other is request:
                request.fill_ids = np.append(request.fill_ids, np.int32(token))
                del self.retracted[place]
                return

    # -- messages ---------------------------------------------------------------------------------------------------

    def handle(self, message: Message) -> None:
        """See rooms.Side."""
        self.rooms.hand_over(message, self._handlers, self._restarted)

    def _restarted(self, engine: str, epoch: int) -> None:
        """What another engine had promised before it restarted will not come."""
        for receiver in [*self.prealloc.values(), *self.transfer.values()]:
            if receiver.peer == engine and 0 < receiver.peer_epoch < epoch:
                self.give_up(receiver.request, Ending(FinishReason.ERROR, f"{engine} has restarted", 502))

    def _asked(self, message: RoomAsked) -> None:
        """A prefill engine wants to send a prompt's KV."""
        room = message.room
        receiver = self.prealloc.get(room)
        if self.rooms.is_closed(room):
            self.rooms.refuse_closed(message)
        elif receiver is not None and receiver.state is Poll.BOOTSTRAPPING:
            self._shake_hands(receiver, message)
        elif receiver is not None or room in self.transfer or room in self.asks:
            self.rooms.refuse("duplicate")
        else:
            self.asks[room] = message
            self.rooms.lease(room, self.rooms.terms.bootstrap_timeout_ns)

    def _shake_hands(self, receiver: Receiver, ask: RoomAsked) -> None:
        """Both halves of the request are there. Engines whose KV does not look the same cannot serve it."""
        receiver.peer_epoch = ask.epoch
        receiver.stages = ask.stages
        receiver.state = Poll.WAITING_FOR_INPUT
        ours = (receiver.request.prompt_tokens, self._scheduler.config.page_size, self.rooms.terms.kv_bytes_per_token)
        theirs = (ask.prompt_tokens, ask.page_size, ask.kv_bytes_per_token)
        for what, mine, other in zip(("prompt tokens", "page size", "KV bytes a token"), ours, theirs, strict=True):
            if mine != other:
                message = f"{what}: {other} at {receiver.peer}, {mine} at {self.rooms.terms.engine}"
                self.give_up(receiver.request, Ending(FinishReason.ERROR, message, 400))
                return

    def _chunk(self, message: KvChunk) -> None:
        """A part of a prompt's KV. It counts once, and only if it is what it says."""
        room = message.room
        receiver = self.transfer.get(room)
        if message.checksum != chunk_checksum(message):
            self.rooms.refuse("corrupt")
        elif receiver is None:
            self.rooms.refuse("late" if self.rooms.is_closed(room) else "unknown")
            if room in self.aside:
                self.aside[room].chunks[message.stage, message.index] = message.tokens
                self._free_aside(room)
        elif (message.stage, message.index) in receiver.chunks:
            self.rooms.refuse("duplicate")
        elif not np.array_equal(message.pages, self._pages_of(receiver, message)):
            self.rooms.refuse("misplaced")
        else:
            receiver.state = Poll.TRANSFERRING
            receiver.chunks[message.stage, message.index] = message.tokens
            if message.last:
                receiver.chunks_in_all[message.stage] = message.index + 1
                self._keep_metadata(receiver, message)
            self._look_whether_whole(receiver)

    def _pages_of(self, receiver: Receiver, chunk: KvChunk) -> NDArray[np.int32]:
        """Where the chunk belongs."""
        p = self._scheduler.config.page_size
        row: NDArray[np.int32] = self._scheduler.memory.slots.pages[receiver.request.slot]
        return row[chunk.start // p : -(-(chunk.start + chunk.tokens) // p)]

    def _keep_metadata(self, receiver: Receiver, last: KvChunk) -> None:
        """What the last chunk of a stage says; all stages say the same, each of its own time."""
        request = receiver.request
        self._scheduler.memory.slots.outputs[request.slot, 0] = last.token_id
        receiver.stopped = last.stopped
        request.cached_tokens = last.cached_tokens
        receiver.spent_ns = max(receiver.spent_ns, last.spent_ns)

    def _look_whether_whole(self, receiver: Receiver) -> None:
        """Decoding may start when every chunk of every stage is here and they are the prompt."""
        request, expected = receiver.request, receiver.chunks_in_all
        if len(expected) < receiver.stages or len(receiver.chunks) < sum(expected.values()):
            return
        tokens = sum(receiver.chunks.values())
        if tokens != request.prompt_tokens * receiver.stages:
            message = f"{tokens} tokens of KV came, the prompt has {request.prompt_tokens}"
            self.give_up(request, Ending(FinishReason.ERROR, message, 500))
            return
        receiver.state = Poll.SUCCESS
        del self.transfer[receiver.room]
        self.metadata_slots.append(receiver.metadata_slot)
        self.rooms.end_lease(receiver.room)
        self.rooms.close(receiver.room)
        self.rooms.tell(receiver.peer, KvReceived, receiver.room, receiver.peer_epoch)
        request.transfer_ns = max(self.rooms.now_ns - receiver.reserved_ns - receiver.spent_ns, 0)
        self.arrived.append(Arrived(request, receiver.stopped))

    def _closed_there(self, message: RoomClosed) -> None:
        """The other side sends nothing more."""
        room = message.room
        receiver = self.prealloc.get(room) or self.transfer.get(room)
        if room in self.aside:
            self.aside[room].sent = message.chunks
            self._free_aside(room)
        elif receiver is not None:
            receiver.peer_epoch = message.epoch
            why = Ending(FinishReason.ERROR, f"{receiver.peer}: {message.message}", message.status)
            self.give_up(receiver.request, why, message.chunks)
        elif self.rooms.is_closed(room):
            self.rooms.refuse_closed(message)  # it may wait for our word
        else:
            self.asks.pop(room, None)
            self.rooms.end_lease(room)
            self.rooms.close(room)

    # -- pages that the other side may still write to ---------------------------------------------------------------

    def _set_aside(self, receiver: Receiver, sent: int | None) -> None:
        """Keep the pages of a room until every chunk has come, or its lease is over."""
        self._scheduler.memory.set_aside(receiver.request, receiver.room)
        self.aside[receiver.room] = Aside(receiver.chunks, sent)
        if receiver.room in self.rooms.leased:
            self._free_aside(receiver.room)
        else:
            self._take_back(receiver.room)

    def _free_aside(self, room: int) -> None:
        aside = self.aside[room]
        if aside.sent is not None and len(aside.chunks) >= aside.sent:
            self._take_back(room)

    def _take_back(self, room: int) -> None:
        del self.aside[room]
        self.rooms.end_lease(room)
        self._scheduler.memory.allocator.take_back(room)

    # -- an iteration: queues ---------------------------------------------------------------------------------------

    def process_decode_queue(self) -> None:
        """End what is out of time; bring back who was retracted; then reserve memory for prompts, in order of arrival.

        While somebody is retracted nothing is reserved for newcomers. KV that has come is used all the same (SGLang
        lets it wait: pitfall 42).
        """
        for room in self.rooms.expired():
            self._lease_over(room)
        self._resume_retracted()
        if self.prealloc and not self.retracted:
            self._pop_preallocated()

    def _lease_over(self, room: int) -> None:
        """Nothing came in time; what may still be on its way will be refused."""
        receiver = self.prealloc.get(room) or self.transfer.get(room)
        if room in self.aside:
            self._take_back(room)
        elif receiver is not None:
            what = "send the KV" if room in self.transfer else "ask for room"
            self.give_up(receiver.request, Ending(FinishReason.ERROR, f"{receiver.peer} did not {what} in time", 504))
        else:
            ask = self.asks.pop(room)
            self.rooms.close(room)
            self.rooms.tell_closed(ask.sender, room, ask.epoch, "the request has not come", 504)

    def _resume_retracted(self) -> None:
        """Copy KV back from the host while memory holds it, with what is kept free beside everybody."""
        self._resumable = False
        while self.retracted:
            request, token = self.retracted[0]
            tokens = len(request.fill_ids)
            if not self._scheduler.memory.slots.available:
                return
            needed = self._in_pages(tokens + 1) + self.rooms.terms.reserved_decode_tokens
            # What is set aside comes back: with room for one token only, it would be retracted until then.
            if needed > self._allocatable_tokens() and (self.aside or not self._fits_alone(tokens + 1)):
                return
            del self.retracted[0]
            self._take_memory(request, tokens)
            self._scheduler.memory.slots.outputs[request.slot, 0] = token
            self.moved_tokens += tokens
            self.arrived.append(Arrived(request))
            self.arrived.sort(key=lambda arrived: arrived.request.rank)

    def _pop_preallocated(self) -> None:
        """Reserve memory for prompts whose prefill engine has asked, first come, first served."""
        reserved: list[int] = []
        for room, receiver in self.prealloc.items():
            if receiver.state is not Poll.WAITING_FOR_INPUT:
                continue
            if not self._admits(receiver.request):
                break
            self._reserve(receiver)
            reserved.append(room)
        for room in reserved:
            del self.prealloc[room]

    def _reserve(self, receiver: Receiver) -> None:
        """Take memory for a prompt, and tell where. A launched step may still write to the pages if a request of it has
        ended (an extra row of the overlap loop): then the other side hears of them when that step has."""
        scheduler, request = self._scheduler, receiver.request
        receiver.metadata_slot = self.metadata_slots.pop()
        pages = self._take_memory(request, request.prompt_tokens)
        request.first_scheduled_ns = receiver.reserved_ns = self.rooms.now_ns
        self.transfer[receiver.room] = receiver
        self.rooms.lease(receiver.room, self.rooms.terms.transfer_timeout_ns)
        fence = max((step.index for step in scheduler.in_flight if step.extra_rows), default=NEVER)
        self.rooms.tell(receiver.peer, RoomReserved, receiver.room, receiver.peer_epoch, fence=fence, pages=pages)

    def _take_memory(self, request: Request, tokens: int) -> NDArray[np.int32]:
        memory = self._scheduler.memory
        request.last_node = memory.cache.root
        memory.open(request)
        return memory.extend(request, tokens)

    # -- how much may be given away (specification G.2) ---------------------------------------------------------------

    def _admits(self, request: Request) -> bool:
        """Whether a prompt may take its memory: with what is reserved for it, and with its whole output if everybody
        else who runs were retracted."""
        scheduler = self._scheduler
        if not scheduler.memory.slots.available or not self.metadata_slots:
            return False
        prompt = self._in_pages(request.prompt_tokens)
        whole = prompt + min(request.max_new_tokens, scheduler.config.clip_max_new_tokens) - self._retractable_tokens()
        needed = max(prompt + self.rooms.terms.reserved_decode_tokens, whole)
        return needed <= self._allocatable_tokens() or self._fits_alone(request.prompt_tokens)

    def _fits_alone(self, tokens: int) -> bool:
        """With nobody else about, what fits is let in: refusing would block the queue for ever."""
        if self._running_rows() or self.transfer or self.arrived:
            return False
        return self._in_pages(tokens) <= self._scheduler.memory.allocator.available_tokens

    def _allocatable_tokens(self) -> int:
        """Tokens that may be given away: the free ones without what is kept for everybody who is here, or for the
        largest one that runs if it were alone. (SGLang subtracts two terms more: its last prebuilt batch, which runs
        already here, and the retracted, before whom nobody is let in here.)"""
        here = self._running_rows() + len(self.transfer) + len(self.arrived)
        kept = max(self.rooms.terms.reserved_decode_tokens * here, self._need_single_tokens())
        return self._scheduler.memory.allocator.available_tokens - kept

    def _running_rows(self) -> int:
        running = self._scheduler.running
        return len(running.requests) - running.finished_rows

    def _retractable_tokens(self) -> int:
        """Prompts and outputs of all who run, launched steps included."""
        running = self._scheduler.running
        return running.context_tokens() + len(running.requests) if running.requests else 0

    def _need_single_tokens(self) -> int:
        """What the largest running request lacks if all others were retracted."""
        running = self._scheduler.running
        if not running.requests:
            return 0
        if running.requests is not self._rows:
            clip = self._scheduler.config.clip_max_new_tokens
            self._rows = running.requests
            self._largest_tokens = max(min(r.max_new_tokens, clip) + r.prompt_tokens for r in self._rows)
        return self._largest_tokens - self._retractable_tokens()

    def _in_pages(self, tokens: int) -> int:
        p = self._scheduler.config.page_size
        return -(-tokens // p) * p

    # -- an iteration: into the running batch, and out of it ----------------------------------------------------------

    def get_new_prebuilt_batch(self) -> list[Arrived]:
        """Who joins the running batch now: a batch that needs no forward, because its KV is here."""
        if not self.arrived:
            return []
        scheduler = self._scheduler
        scheduler.running.filter_finished()
        seats = max(scheduler.max_running_requests - len(scheduler.running), 0)
        taken, self.arrived = self.arrived[:seats], self.arrived[seats:]
        return taken

    def process_prebuilt(self, taken: list[Arrived]) -> tuple[Batch, StepResult, list[Request]]:
        """Everybody taken joins, but who ends with the first token. Returns the first tokens of those that had none, as
        a batch and its result, and who has ended. Who was retracted goes on where it was."""
        scheduler = self._scheduler
        outputs = scheduler.memory.slots.outputs
        fresh = [arrived for arrived in taken if not arrived.request.sampled]
        tokens = np.array([outputs[arrived.request.slot, 0] for arrived in fresh], dtype=np.int32)
        batch = Batch(ForwardMode.EXTEND, [Prefill(a.request, a.request.kv_tokens, 0, True) for a in fresh])
        ended: list[Request] = []
        for arrived in taken:
            request = arrived.request
            scheduler.end_pause(request, scheduler.now_ns)
            request.sampled = True
            if request.old_outputs + 1 >= request.max_new_tokens:
                scheduler.finish(request, FinishReason.LENGTH, ended)
            elif arrived.stopped:
                scheduler.finish(request, FinishReason.STOP, ended)
        joining = [arrived.request for arrived in taken if arrived.request.finish_reason is None]
        if joining:
            scheduler.running.merge(joining)
            self.joined += joining
        scheduler.fruitless, scheduler.idle_checked = 0, False
        return batch, StepResult(tokens), ended

    def prebuilt_sent(self, batch: Batch, ended: list[Request], sent_ns: int) -> None:
        """Record that the tokens that ``process_prebuilt`` returned, and the ends of ``ended``, were sent."""
        for prefill in batch.prefills:
            if prefill.request.max_new_tokens:
                self._scheduler.token_sent(prefill.request, sent_ns)
        for request in ended:
            self._scheduler.recorder.ended(request, len(request.output_ids), sent_ns)

    def take_joined(self) -> list[Request]:
        """Who runs that the device has not been told of; the next launch tells it."""
        told, self.joined = [request for request in self.joined if request.in_running], []
        return told

    def save(self, request: Request, outputs: NDArray[np.int32]) -> None:
        """A running request was retracted; ``outputs``: int32 [n], its tokens since it joined, n >= 1. Its KV waits on
        the host: that of all tokens but the last."""
        request.fill_ids = np.concatenate((request.fill_ids, outputs[:-1]))
        request.old_outputs += len(outputs) - 1
        self.moved_tokens += len(request.fill_ids)
        self.retracted.append((request, int(outputs[-1])))
        self.retracted.sort(key=lambda saved: saved[0].rank)
        self._resumable = True

    def take_copy_ns(self) -> int:
        """How long the device copies to and from the host for what has been retracted and resumed."""
        size_bytes, self.moved_tokens = self.moved_tokens * self.rooms.terms.kv_bytes_per_token, 0
        return round(size_bytes / self.rooms.terms.host_gb_per_s)

    # -- checks -----------------------------------------------------------------------------------------------------

    def holds(self, request: Request) -> bool:
        """See rooms.Side."""
        return request.room in self.transfer or any(arrived.request is request for arrived in self.arrived)

    def unplaced(self) -> list[int]:
        """See rooms.Side."""
        return [*(r.request.rank for r in self.prealloc.values()), *(request.rank for request, _ in self.retracted)]

    def problem(self) -> str:
        """See rooms.Side."""
        held = [receiver.metadata_slot for receiver in self.transfer.values()]
        if sorted([*held, *self.metadata_slots]) != list(range(self.metadata_slots_in_all)):
            return "a metadata slot is lost, or held twice"
        if sorted(self.rooms.leased) != sorted([*self.asks, *self.prealloc, *self.transfer, *self.aside]):
            return "a room has no lease, or a lease no room"
        return ""
