"""The prefill half of a pair (specification G.1): it computes prompts, and sends their KV as it is computed.

A request goes through the bootstrap queue (the other side reserves room), the waiting queue, chunks of prefill, and the
in-flight queue (the last chunk is sent), until the other side has all of it. What SGLang's scheduler polls are messages
here, so a queue is a state of its requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from testbed.batch import Batch, StepResult
from testbed.messages import KvChunk, KvReceived, Message, Pair, RoomAsked, RoomClosed, RoomReserved, chunk_checksum
from testbed.request import NEVER, NO_PAGES, FinishReason, Request
from testbed.scheduler.disaggregation.rooms import Ending, Outgoing, Poll, Rooms, Terms

if TYPE_CHECKING:
    from testbed.scheduler.scheduler import Scheduler


class Sender:
    """A room on the prefill side."""

    __slots__ = (
        *("chunks", "computed_ns", "ending", "metadata_slot", "pages", "peer", "peer_epoch", "request"),
        *("reserved_ns", "room", "sent_tokens", "state"),
    )

    def __init__(self, request: Request, pair: Pair) -> None:
        self.request = request
        self.room = pair.room
        self.peer = pair.decode
        self.peer_epoch = 0
        self.state = Poll.BOOTSTRAPPING
        self.pages = NO_PAGES
        """The other side's, for the whole prompt."""
        self.reserved_ns = NEVER
        self.metadata_slot = NEVER
        """Where the last chunk's metadata lies until it is acknowledged; held from the waiting queue on."""
        self.sent_tokens = 0
        self.chunks = 0
        """Chunks sent, by each stage."""
        self.computed_ns = NEVER
        """When the last chunk's KV was computed; from then on the request is in flight."""
        self.ending: Ending | None = None
        """Why the room ends, while the other side may still take what was sent."""


class PrefillSide:
    """See rooms.Side."""

    ready = False
    """Its queues move by messages and results alone."""

    def __init__(self, scheduler: Scheduler, terms: Terms) -> None:
        self._scheduler = scheduler
        self.rooms = Rooms(scheduler, terms)
        self.senders: dict[int, Sender] = {}
        """Every open room."""
        self.bootstrap: dict[int, Sender] = {}
        """Those that wait for room on the other side, or for a metadata slot, in order of arrival."""
        self._answered: deque[Sender] = deque()
        """Those of them for which there is room, in the order of the answers; some may be closed."""
        self.metadata_slots_in_all = 2 * scheduler.config.max_running_requests
        self.metadata_slots = list(range(self.metadata_slots_in_all - 1, -1, -1))
        """The free ones."""
        self._handlers: dict[type, Callable[[Any], None]] = {
            RoomReserved: self._reserved,
            KvReceived: self._received,
            RoomClosed: self._closed_there,
        }

    # -- requests ---------------------------------------------------------------------------------------------------

    @property
    def queued(self) -> int:
        """See rooms.Side."""
        return len(self.bootstrap)

    def is_open(self, room: int) -> bool:
        """See rooms.Side."""
        return room in self.senders

    def add(self, request: Request, pair: Pair) -> None:
        """See rooms.Side. The request makes one token here, the first."""
        request.room = pair.room
        request.max_new_tokens = min(request.max_new_tokens, 1)
        sender = self.senders[pair.room] = self.bootstrap[pair.room] = Sender(request, pair)
        if self.rooms.is_closed(pair.room):
            self._end(sender, Ending(FinishReason.ERROR, "the decode engine has given this request up", 500))
            return
        self.rooms.lease(pair.room, self.rooms.terms.bootstrap_timeout_ns)
        self.rooms.tell(
            pair.decode,
            RoomAsked,
            pair.room,
            0,
            prompt_tokens=request.prompt_tokens,
            page_size=self._scheduler.config.page_size,
            kv_bytes_per_token=self.rooms.terms.kv_bytes_per_token,
            stages=self.rooms.terms.stages,
        )

    def refused(self, pair: Pair, message: str, status: int) -> None:
        """See rooms.Side."""
        if pair.room not in self.senders and not self.rooms.is_closed(pair.room):
            self.rooms.close(pair.room)
            self.rooms.tell_closed(pair.decode, pair.room, 0, message, status)

    def give_up(self, request: Request, ending: Ending) -> None:
        """See rooms.Side. Where KV is on its way, the request ends when the other side takes no more of it."""
        sender = self.senders[request.room]
        if sender.ending is not None:
            return
        self.rooms.tell_closed(
            sender.peer, sender.room, sender.peer_epoch, ending.message, ending.status, sender.chunks
        )
        if sender.chunks == 0:
            self._end(sender, ending)
            return
        sender.ending = ending
        if request is self._scheduler.chunked:
            self._scheduler.chunked = None

    def _end(self, sender: Sender, ending: Ending) -> None:
        """The room is over: nobody reads its KV any more. A request whose token was made ends with it, also where
        nobody has said that it came: then the other side alone knows what has become of it."""
        scheduler, request = self._scheduler, sender.request
        del self.senders[sender.room]
        self.bootstrap.pop(sender.room, None)
        if sender.metadata_slot != NEVER:
            self.metadata_slots.append(sender.metadata_slot)
            if request.slot == NEVER:
                scheduler.waiting.remove(request)
        if request is scheduler.chunked:
            scheduler.chunked = None
        sender.state = Poll.SUCCESS if ending.reason is FinishReason.LENGTH else Poll.FAILED
        self.rooms.end_lease(sender.room)
        self.rooms.close(sender.room, sender.chunks)
        if sender.state is Poll.FAILED:
            scheduler.recorder.count("rooms_failed")
        if sender.computed_ns != NEVER:
            request.transfer_ns = max(self.rooms.now_ns - sender.computed_ns, 0)
            if request.max_new_tokens:
                scheduler.token_sent(request, self.rooms.now_ns)
        scheduler.end(request, ending)

    # -- messages ---------------------------------------------------------------------------------------------------

    def handle(self, message: Message) -> None:
        """See rooms.Side."""
        self.rooms.hand_over(message, self._handlers, self._restarted)

    def _restarted(self, engine: str, epoch: int) -> None:
        """What another engine had reserved before it restarted is gone."""
        for sender in list(self.senders.values()):
            if sender.peer == engine and 0 < sender.peer_epoch < epoch:
                self._end(sender, sender.ending or Ending(FinishReason.ERROR, f"{engine} has restarted", 502))

    def _reserved(self, message: RoomReserved) -> None:
        """There is room on the other side."""
        sender = self.senders.get(message.room)
        if sender is None:
            self.rooms.refuse_closed(message)
        elif sender.state is not Poll.BOOTSTRAPPING:
            self.rooms.refuse("duplicate")
        elif len(message.pages) != self._scheduler.memory.allocator.pages_for(sender.request.prompt_tokens):
            self.rooms.refuse("corrupt")
        else:
            sender.state = Poll.WAITING_FOR_INPUT
            sender.peer_epoch = message.epoch
            sender.pages = message.pages
            sender.reserved_ns = self.rooms.now_ns
            self.rooms.lease(sender.room, self.rooms.terms.transfer_timeout_ns)
            self._answered.append(sender)

    def _received(self, message: KvReceived) -> None:
        """The other side has everything: the tree may keep the KV, or lose it."""
        sender = self.senders.get(message.room)
        if sender is None or sender.computed_ns == NEVER:
            self.rooms.refuse("late" if self.rooms.is_closed(message.room) else "unknown")
            return
        self._end(sender, sender.ending or Ending(FinishReason.LENGTH, "", 200))

    def _closed_there(self, message: RoomClosed) -> None:
        """The other side takes nothing more."""
        sender = self.senders.get(message.room)
        if sender is None:
            if not self.rooms.is_closed(message.room):
                self.rooms.close(message.room)  # its request is still to come
            return
        if sender.ending is None:
            self.rooms.tell_closed(
                sender.peer, sender.room, message.epoch, message.message, message.status, sender.chunks
            )
        why = Ending(FinishReason.ERROR, f"{sender.peer}: {message.message}", message.status)
        self._end(sender, sender.ending or why)

    # -- an iteration -----------------------------------------------------------------------------------------------

    def pop_bootstrapped(self) -> None:
        """End what is out of time, then let wait for memory who has room on the other side and a metadata slot."""
        for room in self.rooms.expired():
            self._lease_over(self.senders[room])
        while self._answered and self.metadata_slots:
            sender = self._answered.popleft()
            if self.bootstrap.pop(sender.room, None) is sender:
                sender.metadata_slot = self.metadata_slots.pop()
                self._scheduler.waiting.append(sender.request)

    def _lease_over(self, sender: Sender) -> None:
        """Nothing came in time. The other side refuses what may still be on its way."""
        what = "reserve room" if sender.state is Poll.BOOTSTRAPPING else "take the KV"
        why = Ending(FinishReason.ERROR, f"{sender.peer} did not {what} in time", 504)
        if sender.ending is None:
            self.rooms.tell_closed(sender.peer, sender.room, sender.peer_epoch, why.message, why.status, sender.chunks)
        self._end(sender, sender.ending or why)

    def process_prefills(self, batch: Batch, result: StepResult) -> None:
        """A prefill's result: what it has computed is sent. (SGLang's overlap loop has to remember where a chunk ends
        until its result comes, ``tmp_end_idx``; the batch is a snapshot and says it.)"""
        scheduler = self._scheduler
        for row, (request, prefix_tokens, new_tokens, last) in enumerate(batch.prefills):
            request.pending_prefills -= 1
            sender = self.senders.get(request.room)
            if request.finish_reason is not None or sender is None or sender.ending is not None:
                continue
            if last:
                request.sampled = True
                scheduler.memory.slots.outputs[request.slot, 0] = result.token_ids[row]
            rewritten = scheduler.memory.slots.rewritten
            fence, known = NEVER, len(rewritten)
            if last or not scheduler.in_flight:
                # Before it is sent: duplicates of what the tree has are freed. A later launch has done it already.
                scheduler.memory.publish(request)
            if scheduler.in_flight and len(rewritten) > known:
                fence = scheduler.in_flight[-1].index  # what it found there may still be computed (pipelines)
            self._send(sender, prefix_tokens + new_tokens, last, row, result, fence)

    def _send(self, sender: Sender, end: int, last: bool, row: int, result: StepResult, fence: int) -> None:
        """Send KV up to ``end``, in whole pages but for the last chunk, which brings the metadata."""
        scheduler, terms, request = self._scheduler, self.rooms.terms, sender.request
        p, start = scheduler.config.page_size, sender.sent_tokens
        end = end if last else end // p * p
        if end <= start:
            return
        pages = slice(start // p, -(-end // p))
        chunk = KvChunk(
            sender.room,
            terms.engine,
            terms.epoch,
            sender.peer_epoch,
            index=sender.chunks,
            start=start,
            tokens=end - start,
            source_pages=scheduler.memory.slots.pages[request.slot, pages].copy(),
            pages=sender.pages[pages],
            stage=terms.stage,
        )
        if last:
            chunk = replace(
                chunk,
                last=True,
                token_id=int(result.token_ids[row]),
                stopped=row in result.stopped,
                cached_tokens=max(request.cached_tokens, 0),
                spent_ns=result.end_ns - sender.reserved_ns,
            )
            sender.computed_ns = result.end_ns
        sender.state = Poll.TRANSFERRING
        sender.sent_tokens = end
        sender.chunks += 1
        self.rooms.lease(sender.room, terms.transfer_timeout_ns)
        chunk = replace(chunk, checksum=chunk_checksum(chunk))
        bytes_per_token = terms.stage_kv_bytes_per_token
        if bytes_per_token is None:
            bytes_per_token = terms.kv_bytes_per_token
        self.rooms.outgoing.append(Outgoing(sender.peer, chunk, len(chunk.pages) * p * bytes_per_token, fence))

    # -- checks -----------------------------------------------------------------------------------------------------

    def holds(self, request: Request) -> bool:
        """See rooms.Side."""
        sender = self.senders[request.room]
        return request.pending_prefills > 0 or sender.computed_ns != NEVER or sender.ending is not None

    def unplaced(self) -> list[int]:
        """See rooms.Side."""
        return [sender.request.rank for sender in self.bootstrap.values()]

    def problem(self) -> str:
        """See rooms.Side."""
        held = [sender.metadata_slot for sender in self.senders.values() if sender.metadata_slot != NEVER]
        if sorted([*held, *self.metadata_slots]) != list(range(self.metadata_slots_in_all)):
            return "a metadata slot is lost, or held twice"
        if sorted(self.rooms.leased) != sorted(self.senders):
            return "a room has no lease, or a lease no room"
        if sorted(s.request.rank for s in self.senders.values()) != sorted(
            request.rank for request in self._scheduler.requests.values()
        ):
            return "a request has no room, or a room no request"
        return ""
