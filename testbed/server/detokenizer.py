"""The detokenizer's process: tokens of all requests come in, text for each worker goes out.

``python -m testbed.server.detokenizer FD``
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import zmq
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer

from testbed.messages import AbortRequest, TextOptions
from testbed.server import wire
from testbed.server.detokenize import TextStream, Vocabulary, shown_ids
from testbed.server.part import Part, run_part
from testbed.server.protocol.metrics import ServerMetrics
from testbed.server.wire import Answer, Begin, Delta, Deltas, Ended, Finished, Ready, StepTokens, Times

AT_ONCE = 64
"""Messages that are read before what came of them is sent: more only while they wait already."""
REPLIES_AHEAD = 10_000
"""Messages that a worker may be behind before the detokenizer, and with it the scheduler, waits: nothing is dropped."""


class Stream:
    """A request whose tokens become text."""

    __slots__ = ("_held", "_text", "options", "pushed", "wanted")

    def __init__(self, vocabulary: Vocabulary, begin: Begin) -> None:
        self._text = TextStream(vocabulary, wire.unpack_ids(begin.prompt_tail), begin.text)
        self.options = begin.text
        self.wanted = begin.stream
        """Whether the client takes text as it comes."""
        self._held = ""
        """What a client that does not will get at the end."""
        self.pushed = 0
        """Tokens that count: none behind a stop string."""

    @property
    def stopped(self) -> str | None:
        """The stop string that has ended the text."""
        return self._text.stopped

    def push(self, token: int) -> str:
        """One more token; the text to be sent now."""
        self.pushed += 1
        text = self._text.push((token,))
        if self.wanted:
            return text
        self._held += text
        return ""

    def finish(self, shown: list[int], output_tokens: int) -> str:
        """The rest of the text: ``shown`` are all outputs that have one, of ``output_tokens``."""
        text = self._held
        if self.options.stop:
            for token in shown[self.pushed :]:
                if self.stopped is None:
                    self.pushed += 1
                    text += self._text.push((token,))
        else:
            text += self._text.push(shown[self.pushed :])
        if self.stopped is None:
            text += self._text.finish()
            self.pushed = output_tokens
        return text


class Detokenizer:
    """Answers of the scheduler become answers for workers. State is kept of requests that the scheduler has begun and
    not ended, no more."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._streams: dict[str, Stream] = {}

    def tokens(self, step: StepTokens) -> tuple[list[Delta], list[str]]:
        """(text for workers, requests that are over because a stop string was found)."""
        for begin in step.begins:
            self._streams[begin.rid] = Stream(self._vocabulary, begin)
        deltas: list[Delta] = []
        found: list[str] = []
        for place, (rid, token) in enumerate(zip(step.rids, wire.unpack_ids(step.token_ids), strict=True)):
            stream = self._streams[rid]
            if stream.stopped is not None:
                continue
            text = stream.push(token)
            if stream.stopped is not None:
                found.append(rid)
            if stream.wanted:
                deltas.append(Delta(rid, text, [token], [step.logprobs[place]] if place in step.logprobs else None))
        return deltas, found

    def ended(self, end: Ended) -> Delta:
        """The rest of a request. One that a stop string ended is told here too, when the scheduler has let it go."""
        stream = self._streams.pop(end.rid, None)
        if stream is None:
            stream = Stream(self._vocabulary, Begin(end.rid, end.prompt_tail, end.text or TextOptions(), False))
        sent = stream.pushed if stream.wanted else 0
        ids = wire.unpack_ids(end.output_ids)
        by_token = end.reason == "stop"
        text = ""
        if stream.stopped is None or not stream.wanted:
            text = stream.finish(shown_ids(ids, by_token, stream.options), len(ids))
        count, matched = stream.pushed, stream.stopped
        finished = Finished(
            reason="stop" if matched is not None else end.reason,
            matched=ids[-1] if by_token and matched is None and ids else matched,
            message="" if matched is not None else end.message,
            status=200 if matched is not None else end.status,
            prompt_tokens=end.prompt_tokens,
            cached_tokens=end.cached_tokens,
            output_tokens=count,
            prompt_logprobs=end.prompt_logprobs,
        )
        return Delta(end.rid, text, ids[sent:count], end.logprobs and end.logprobs[sent:count], finished)


def serve(part: Part) -> None:
    """Answer until the parent asks to end, or is gone."""
    options, folder = part.start.options, part.start.folder
    tokenizer = Tokenizer.from_file(str(Path(options.tokenizer) / "tokenizer.json"))
    detokenizer = Detokenizer(Vocabulary(tokenizer))
    context = zmq.Context()
    outputs, requests = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    outputs.bind(wire.outputs_address(folder))
    requests.sndhwm = 0  # one abort a request at most; and here to wait for the scheduler could be to wait for ever
    requests.connect(wire.requests_address(folder))
    replies = [context.socket(zmq.PUSH) for _ in range(options.workers)]
    for worker, socket in enumerate(replies):
        socket.sndhwm = REPLIES_AHEAD
        socket.connect(wire.replies_address(folder, worker))
    metrics = ServerMetrics(CollectorRegistry(), options.names[0])
    part.watch(lambda: os._exit(0))  # the scheduler has ended: there is nothing left to say
    part.tell(Ready())
    while True:
        deltas: list[list[Delta]] = [[] for _ in replies]
        ends: list[tuple[Ended, Delta]] = []
        answers: list[Answer] = []
        for message in _arrived(outputs):
            made: list[Delta] = []
            if isinstance(message, Answer):
                answers.append(message)
            elif isinstance(message, StepTokens):
                made, found = detokenizer.tokens(message)
                for rid in found:
                    requests.send(wire.asked(wire.worker_of(rid), 0, AbortRequest(rid)))
            else:
                made = [detokenizer.ended(message)]
                ends.append((message, made[0]))
            for delta in made:
                deltas[wire.worker_of(delta.rid)].append(delta)
        for socket, some in zip(replies, deltas, strict=True):
            if some:
                socket.send(wire.encode(Deltas(some)))
        for end, delta in ends:  # counted once the text is on its way, and before anybody is told the counts
            _count(metrics, end, delta)
        for answer in answers:
            replies[answer.worker].send(wire.encode(_with_metrics(answer, metrics)))


def _with_metrics(answer: Answer, metrics: ServerMetrics) -> Answer:
    if not answer.state:
        return answer
    metrics.state(answer.state)
    return msgspec.structs.replace(answer, metrics=metrics.page())


def _count(metrics: ServerMetrics, end: Ended, delta: Delta) -> None:
    """Times are the scheduler's, so that they are the same for replies in one piece and streams."""
    times, finished = end.times, delta.finished
    assert finished is not None
    if times is None:  # refused
        times = Times(-1, -1, 0)
    if times.first_token_ns >= 0:
        metrics.first_token(times.first_token_ns * 1e-9)
        metrics.later_tokens((times.ended_ns - times.first_token_ns) * 1e-9, finished.output_tokens - 1)
    queue_s = times.scheduled_ns * 1e-9 if times.scheduled_ns >= 0 else None
    cached, latency_s = end.cached_tokens, times.ended_ns * 1e-9
    metrics.ended(finished.reason, end.prompt_tokens, cached, finished.output_tokens, latency_s, queue_s, end.grammar)


def _arrived(outputs: zmq.Socket[bytes]) -> Iterator[wire.FromScheduler]:
    """Wait for a message; it and those that are there already."""
    yield wire.decode_from_scheduler(outputs.recv())
    for _ in range(AT_ONCE):
        if not int(outputs.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            return
        yield wire.decode_from_scheduler(outputs.recv(zmq.NOBLOCK))


if __name__ == "__main__":
    run_part(serve)
