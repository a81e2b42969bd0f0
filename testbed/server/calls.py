"""What a worker has asked of the scheduler and not heard the end of."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import zmq

from testbed.messages import AbortRequest, GenerateRequest, GetInternalState, Message
from testbed.server import wire
from testbed.server.protocol.errors import ApiError, overloaded
from testbed.server.replies import RETRY_AFTER_S
from testbed.server.wire import Answer, Delta, Deltas

STATE_EVERY_S = 0.02
"""How soon after an answer the scheduler is asked for its state again, whoever wants it: the page of metrics that comes
with it takes the detokenizer a millisecond or more."""


class Gone(Exception):
    """The client has closed its connection, so nobody waits for the reply."""


class Mailbox:
    """What came for one HTTP request, of all its choices, and was not taken yet.

    It holds no more than the output that was asked for: a client that reads slowly slows nobody else.
    """

    def __init__(self) -> None:
        self._deltas: list[Delta] = []
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False

    def put(self, delta: Delta) -> None:
        """More has come."""
        self._deltas.append(delta)
        self._wake()

    def close(self) -> None:
        """Whoever waits hears that the client is gone."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Delta]:
        """All there is, at least one. Raises Gone."""
        while not self._deltas and not self._closed:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._closed:
            raise Gone
        deltas, self._deltas = self._deltas, []
        return deltas


class Calls:
    """Sends requests, hands out what comes of them."""

    def __init__(self, number: int, workers: int, folder: str, max_open: int) -> None:
        """``number``: this worker's, of ``workers``. ``max_open``: requests that it may have open."""
        self.number, self._workers = number, workers
        self._max_open = max_open
        self._open: dict[str, tuple[str, Mailbox]] = {}
        """(name, where replies go) of requests that have not ended, by id; also of those whose clients are gone."""
        self._named: dict[str, dict[str, None]] = {}
        """Their ids, by the names that clients know."""
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._asked = 0
        self._next_state: asyncio.Task[Answer] | None = None
        """The next question for the state, not sent yet."""
        self._asking_state = asyncio.Lock()
        self._context = zmq.Context()
        self._requests, self._replies = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        self._requests.sndhwm = 0  # what is open is bounded by max_open, and an abort or two belong to each
        self._requests.connect(wire.requests_address(folder))
        self._replies.bind(wire.replies_address(folder, number))

    def listen(self) -> None:
        """Take in replies from now on, in the running event loop."""
        asyncio.get_running_loop().add_reader(self._replies.fileno(), self._read)
        self._read()

    def _read(self) -> None:
        """The socket tells once that there is something, however much it is: so all is taken."""
        while int(self._replies.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            reply = wire.decode_to_worker(self._replies.recv(zmq.NOBLOCK))
            if isinstance(reply, Deltas):
                for delta in reply.deltas:
                    self._deliver(delta)
            elif (waiting := self._answers.pop(reply.number, None)) is not None and not waiting.done():
                waiting.set_result(reply)

    def _deliver(self, delta: Delta) -> None:
        found = self._open.get(delta.rid)
        if found is None:
            return
        name, mailbox = found
        if delta.finished is not None:
            del self._open[delta.rid]
            del self._named[name][delta.rid]
            if not self._named[name]:
                del self._named[name]
        mailbox.put(delta)

    @property
    def open(self) -> int:
        """Requests that the scheduler has not ended."""
        return len(self._open)

    def check_room(self, choices: int) -> None:
        """Whether so many more requests may be opened. Raises ApiError."""
        if choices > self._max_open:
            message = f"n times the number of prompts must be at most {self._max_open}: no more are queued here."
            raise ApiError(message, param="n")
        if len(self._open) + choices > self._max_open:
            raise overloaded(RETRY_AFTER_S)

    def rid(self, name: str, choice: int) -> str:
        """The scheduler's id of a choice of the request that its client knows by ``name``."""
        return f"{self.number}:{name}" if choice == 0 else f"{self.number}:{name}:{choice}"

    def send(self, requests: Sequence[tuple[str, GenerateRequest]]) -> Mailbox:
        """Open requests, each under its client's name for it. Raises ApiError when there are too many, or a name is
        taken."""
        self.check_room(len(requests))
        if any(name in self._named or request.rid in self._open for name, request in requests):
            raise ApiError("rid is the id of a request that is being served; choose another.", param="rid")
        mailbox = Mailbox()
        for name, request in requests:
            self._open[request.rid] = name, mailbox
            self._named.setdefault(name, {})[request.rid] = None
            self._say(request)
        return mailbox

    def abandon(self, rids: Iterable[str]) -> None:
        """Nobody wants the rest of these: those that are still open end."""
        for rid in rids:
            if rid in self._open:
                self._say(AbortRequest(rid))

    def abort(self, name: str) -> None:
        """End the request that a client knows by ``name``; no effect when there is none. One that another worker has is
        known by its first choice."""
        if name in self._named:
            self.abandon(list(self._named[name]))
            return
        for worker in range(self._workers):
            if worker != self.number:
                self._say(AbortRequest(f"{worker}:{name}"))

    def abort_all(self) -> None:
        """End every request of every worker."""
        self._say(AbortRequest(abort_all=True))

    def abandon_all(self) -> None:
        """End every request of this worker."""
        self.abandon(list(self._open))

    async def ask(self, message: Message, within_s: float) -> Answer:
        """The scheduler's answer to a control message. Raises TimeoutError."""
        self._asked += 1
        number = self._asked
        waiting = self._answers[number] = asyncio.get_running_loop().create_future()
        self._requests.send(wire.asked(self.number, number, message))
        try:
            async with asyncio.timeout(within_s):
                answer: Answer = await waiting
                return answer
        finally:
            self._answers.pop(number, None)

    async def state(self, within_s: float) -> Answer:
        """The scheduler's state, not older than this call. All who want it while a question is under way share the next
        one. Raises TimeoutError."""
        if self._next_state is None:
            self._next_state = asyncio.create_task(self._ask_state(within_s))
        return await asyncio.shield(self._next_state)

    async def _ask_state(self, within_s: float) -> Answer:
        await self._asking_state.acquire()
        self._next_state = None
        try:
            return await self.ask(GetInternalState(), within_s)
        finally:
            asyncio.get_running_loop().call_later(STATE_EVERY_S, self._asking_state.release)

    def close(self) -> None:
        """Say and hear nothing more."""
        self._context.destroy(0)

    def _say(self, message: Message) -> None:
        self._requests.send(wire.asked(self.number, 0, message))
