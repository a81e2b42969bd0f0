"""One request as its client saw it: when it was sent, when each chunk came, how it ended."""

from __future__ import annotations

from array import array
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from testbed.request import NEVER, FinishReason
from testbed.study.bench.wire import DONE, Choice, Usage, complaint_of, decode_event
from testbed.workload import TimedRequest


class Failure(StrEnum):
    """Why a request has no answer, or half of one."""

    REFUSED = "refused"
    """HTTP 429 or 503: the server has too much to do."""
    STATUS = "http_status"
    """Any other status than 200."""
    CONNECTION = "connection"
    """None was made, or it was lost before the answer began."""
    BROKEN = "broken_stream"
    """The connection or the stream ended before the answer had."""
    GARBAGE = "not_understood"
    """No HTTP, no stream of events, or no JSON of this API."""
    SERVER = "server_error"
    """The server says in the stream that it failed."""
    ABORTED = "aborted"
    """The server says that it gave the request up."""
    TIMEOUT = "timeout"


class Counted(StrEnum):
    """What told how many tokens a chunk holds."""

    IDS = "ids"
    USAGE = "usage"
    """A running count in every chunk."""
    CHUNKS = "chunks"
    """Nothing: a chunk with text counts as one, until the count at the end tells better."""


class Exchange:
    """A request and its answer. Times are ns of the run's clock."""

    __slots__ = (
        "_ids",
        "_over",
        "_text",
        "chunk_ns",
        "chunk_tokens",
        "counted",
        "failure",
        "finish_ns",
        "finish_reason",
        "message",
        "retry_after_s",
        "sent_ns",
        "status",
        "timed",
        "tokens",
        "usage",
    )

    def __init__(self, timed: TimedRequest) -> None:
        self.timed = timed
        self.sent_ns = NEVER
        """When it was handed to the HTTP client."""
        self.status = 0
        """Of HTTP; 0: no answer."""
        self.finish_ns = NEVER
        self.finish_reason = ""
        self.failure: Failure | None = None
        self.message = ""
        """What the failure says."""
        self.retry_after_s: float | None = None
        self._over = False
        """Nothing that comes now belongs to the answer."""
        self.counted: Counted | None = None
        self.usage: Usage | None = None
        """The last one told."""
        self.chunk_ns = array("q")
        """When each chunk with tokens came."""
        self.chunk_tokens = array("q")
        self.tokens = 0
        """Their sum."""
        self._ids = array("i")
        self._text: list[str] = []

    @property
    def ended(self) -> bool:
        """Whether it has its answer, or will have none."""
        return self.finish_ns != NEVER

    @property
    def started(self) -> bool:
        """Whether its first token has come."""
        return len(self.chunk_ns) > 0

    @property
    def ids(self) -> list[int]:
        """The output's token ids, where the server sent them."""
        return self._ids.tolist()

    @property
    def text(self) -> str:
        """The output's text."""
        return "".join(self._text)

    def forget(self) -> None:
        """Keep figures only: nobody will ask for ids or text."""
        self._ids, self._text = array("i"), []

    def take(self, data: bytes, now_ns: int) -> None:
        """An event of the answer, received at ``now_ns``. Raises ValueError for what is none."""
        self._over |= data == DONE
        if self._over:
            return
        event = decode_event(data)
        if event.error is not None:
            self.fail(Failure.SERVER, complaint_of(event.error), now_ns)
        if event.usage is not None:
            self.usage = event.usage
        if event.choices and not self.ended:
            self._take_choice(event.choices[0], event.usage, now_ns)

    def _take_choice(self, choice: Choice, usage: Usage | None, now_ns: int) -> None:
        told = usage.completion_tokens if usage is not None else None
        if self.counted is None:
            self.counted = _counted_by(choice, told)
        tokens = 0
        if self.counted is Counted.IDS:
            tokens = len(choice.token_ids or ())
        elif self.counted is Counted.USAGE and told is not None:
            tokens = told - self.tokens
        elif self.counted is Counted.CHUNKS:
            tokens = 1 if choice.said else 0
        if tokens > 0:
            self.chunk_ns.append(now_ns)
            self.chunk_tokens.append(tokens)
            self.tokens += tokens
        self._ids.extend(choice.token_ids or ())
        self._text.append(choice.said)
        if choice.finish_reason == FinishReason.ABORT:
            self.fail(Failure.ABORTED, "the server aborted it", now_ns)
        elif choice.finish_reason:
            self.finish_ns = now_ns
            length = choice.finish_reason == FinishReason.LENGTH
            self.finish_reason = FinishReason.LENGTH if length else FinishReason.STOP

    def fail(self, failure: Failure, message: str, now_ns: int) -> None:
        """It ended without a whole answer. An answer that is whole already stays so."""
        if self.ended:
            return
        self.failure, self.message, self.finish_ns = failure, message, now_ns
        self.finish_reason = FinishReason.ABORT if failure is Failure.ABORTED else FinishReason.ERROR

    @property
    def spread(self) -> bool:
        """Whether only the count at the end told that chunks held other numbers of tokens than one each."""
        told = self.usage.completion_tokens if self.usage is not None else None
        return self.counted is Counted.CHUNKS and bool(told) and told != len(self.chunk_ns)

    @property
    def output_tokens(self) -> int:
        """How many tokens came."""
        if self.spread:
            assert self.usage is not None and self.usage.completion_tokens is not None
            return self.usage.completion_tokens
        return self.tokens

    def token_times_ns(self) -> NDArray[np.int64]:
        """When each token came, int64 [tokens]: the arrival of its chunk.

        Tokens that only the count at the end tells of are spread evenly over the chunks; first and last keep theirs.
        """
        times = np.array(self.chunk_ns, dtype=np.int64)
        if self.spread:
            chunks = np.rint(np.linspace(0, len(times) - 1, self.output_tokens))
            return times[chunks.astype(np.int64)]
        return np.repeat(times, np.array(self.chunk_tokens, dtype=np.int64))


def _counted_by(choice: Choice, told: int | None) -> Counted | None:
    """What the first chunk with a token shows; None: it holds none."""
    if choice.token_ids:
        return Counted.IDS
    if told:
        return Counted.USAGE
    return Counted.CHUNKS if choice.said else None
