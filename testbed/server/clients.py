"""The server's clients as the loop sees them: its own thread reads the sockets, between two steps."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import zmq
from numpy.typing import NDArray

from testbed.batch import Batch, StepLogprobs, StepResult
from testbed.messages import (
    AbortRequest,
    ControlOutput,
    GenerateRequest,
    GrammarReady,
    Logprobs,
    Message,
    RequestOutput,
)
from testbed.request import Request
from testbed.runtime.wall import WallClock
from testbed.scheduler.open_rows import open_rows
from testbed.server import wire
from testbed.server.detokenize import PROMPT_TAIL_TOKENS
from testbed.server.wire import Answer, Begin, Ended, RowLogprobs, StepTokens, Times

NAP_MS = 50
"""A loop without work looks this often whether it is to stop."""
AT_ONCE = 256
"""Messages that one iteration takes in: a flood must not keep the running batch waiting."""

log = logging.getLogger(__name__)


class SocketClients:
    """Requests come over ``requests`` (PULL), tokens and ends leave over ``outputs`` (PUSH): see ``wire``."""

    tied_to_iterations = False

    def __init__(
        self,
        clock: WallClock,
        requests: zmq.Socket[bytes],
        outputs: zmq.Socket[bytes],
        vocab_size: int,
        expect: Callable[[GenerateRequest], None] = lambda request: None,
        forget: Callable[[str], None] = lambda rid: None,
        times_of: Callable[[str], Times | None] = lambda rid: None,
        arrived: Callable[[str, int], None] = lambda rid, sent_ns: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """``expect``, ``forget``: told of every request, and of its end by id (a modelled device wants to know how long
        an output will be). ``times_of``: asked once, at the end. ``arrived``: told of every request's id, and when its
        worker sent it (ns of ``clock``). ``check``: called now and then while there is nothing to do; raises what
        ends the loop."""
        self._clock, self._requests, self._outputs = clock, requests, outputs
        self._vocab_size = vocab_size
        self._expect, self._forget, self._times_of, self._arrived = expect, forget, times_of, arrived
        self._check = check
        self._open: dict[str, GenerateRequest] = {}
        """Requests that have not ended."""
        self._streamed: set[str] = set()
        """Of them, those whose tokens are wanted as they come."""
        self._begun: set[str] = set()
        """Of these, those that have sent some."""
        self._asked: dict[int, tuple[Message, int, int]] = {}
        """Control messages without an answer, by identity: (message, worker, number)."""

    # -- what they send -----------------------------------------------------------------------------------------------

    def delivered(self, now_ns: int, iteration: int) -> list[Message]:
        """See wall.Clients."""
        messages: list[Message] = []
        while len(messages) < AT_ONCE and int(self._requests.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            message = self._taken(self._requests.recv(zmq.NOBLOCK))
            if message is not None:
                messages.append(message)
        return messages

    def _taken(self, data: bytes) -> Message | None:
        try:
            question = wire.decode_asked(data)
            message = wire.message_of(question)
        except ValueError as error:  # our own workers do not send such a thing
            log.error("a message that cannot be read was dropped: %s", error)
            return None
        if isinstance(message, GenerateRequest):
            self._open[message.rid] = message
            if message.text is not None and (message.stream or message.text.stop):
                self._streamed.add(message.rid)
            self._expect(message)
            self._arrived(message.rid, question.sent_ns - self._clock.origin_ns)
        elif not isinstance(message, AbortRequest | GrammarReady):  # what is answered is what they end, if anything
            self._asked[id(message)] = message, question.worker, question.number
        return message

    def wait(self, until_ns: int | None) -> None:
        """See wall.Clients: also returns when the clock is to stop."""
        while not self._clock.stopping:
            nap_ms = NAP_MS
            if until_ns is not None:
                nap_ms = min(NAP_MS, max(-(-(until_ns - self._clock.now_ns()) // 1_000_000), 0))
            if self._requests.poll(nap_ms):
                return
            if until_ns is not None and self._clock.now_ns() >= until_ns:
                return
            self._check()

    # -- what they hear -----------------------------------------------------------------------------------------------

    def tokens(self, batch: Batch, result: StepResult) -> None:
        """See wall.Clients: of requests that stream and go on. An end that follows tells of its token too."""
        if not self._streamed:
            return
        found_rows = [(row, request) for row, request in open_rows(batch) if request.rid in self._streamed]
        if not found_rows:
            return
        rows, requests = zip(*found_rows, strict=True)
        begins = [self._begin(request.rid) for request in requests if request.rid not in self._begun]
        found: dict[int, RowLogprobs] = {}
        if result.logprobs is not None:
            for place, (row, request) in enumerate(zip(rows, requests, strict=True)):
                if request.logprobs is not None:
                    found[place] = _row_logprobs(result.logprobs, row, request)
        rids = [request.rid for request in requests]
        token_ids = wire.pack_ids(result.token_ids[list(rows)])
        self._outputs.send(wire.encode(StepTokens(begins, rids, token_ids, found)))

    def _begin(self, rid: str) -> Begin:
        self._begun.add(rid)
        source = self._open[rid]
        assert source.text is not None
        return Begin(rid, wire.pack_ids(self._tail(source)), source.text, source.stream)

    def _tail(self, source: GenerateRequest) -> NDArray[np.int32]:
        return source.prompt.ids(self._vocab_size)[-PROMPT_TAIL_TOKENS:]

    def hear(self, output: RequestOutput | ControlOutput, now_ns: int) -> None:
        """See wall.Clients."""
        if isinstance(output, ControlOutput):
            _, worker, number = self._asked.pop(id(output.request))
            self._outputs.send(wire.encode(Answer(worker, number, output.success, output.message, output.state)))
            return
        source = self._open.pop(output.rid, None)
        self._forget(output.rid)
        self._streamed.discard(output.rid)
        self._begun.discard(output.rid)
        self._outputs.send(wire.encode(self._ended(output, source)))

    def _ended(self, output: RequestOutput, source: GenerateRequest | None) -> Ended:
        found = output.logprobs
        return Ended(
            rid=output.rid,
            reason=output.finish_reason,
            message=output.message,
            status=output.status,
            prompt_tokens=output.prompt_tokens,
            cached_tokens=output.cached_tokens,
            output_ids=wire.pack_ids(output.output_ids),
            text=None if source is None else source.text,
            prompt_tail=b"" if source is None else wire.pack_ids(self._tail(source)),
            prompt_logprobs=found.prompt.tobytes() if found is not None and len(found.prompt) else None,
            logprobs=None if found is None else _all_logprobs(found),
            times=self._times_of(output.rid),
            grammar=source is not None and source.grammar is not None,
        )


def _row_logprobs(found: StepLogprobs, row: int, request: Request) -> RowLogprobs:
    k = request.top_logprobs
    return RowLogprobs(float(found.tokens[row]), found.top_ids[row, :k].tolist(), found.top[row, :k].tolist())


def _all_logprobs(found: Logprobs) -> list[RowLogprobs]:
    if not found.top:
        return [RowLogprobs(float(token), [], []) for token in found.tokens]
    pairs = zip(found.tokens, found.top, strict=True)
    return [RowLogprobs(float(token), ids.tolist(), values.tolist()) for token, (ids, values) in pairs]
