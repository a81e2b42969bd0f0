"""What the server's processes say to one another: msgpack over ZMQ, never pickle.

::

    HTTP worker --Asked--> scheduler --StepTokens, Ended, Answer--> detokenizer --Deltas, Answer--> HTTP worker
                              ^---------- Asked (an abort at a stop string) ------------'

Every part tells the parent ``Ready`` once it can take requests. A request's id begins with the number of the worker
that asked, ``WORKER:ID``: the detokenizer knows by it whom to tell.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from testbed.messages import Message, TextOptions, decode_message, encode_message
from testbed.server.options import ServeOptions


class Asked(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A worker: take this message. ``number`` comes back with the answer to a control message."""

    worker: int
    number: int
    message: bytes
    """See ``testbed.messages.encode_message``."""
    sent_ns: int
    """By ``time.perf_counter_ns``, a clock that all processes share."""


class Begin(msgspec.Struct, frozen=True, array_like=True):
    """The request's first tokens follow."""

    rid: str
    prompt_tail: bytes
    """int32: the last prompt tokens, which may join with the first output."""
    text: TextOptions
    stream: bool
    """Whether the client wants text as it comes; else only stop strings are looked for."""


class RowLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Of one token."""

    token: float
    top_ids: list[int]
    top: list[float]


class StepTokens(msgspec.Struct, frozen=True, array_like=True, tag="tokens"):
    """The tokens of a step, of requests whose text is wanted as it comes. The last token of a request is
    not here: it comes with its end, which says whether it has a text."""

    begins: list[Begin]
    rids: list[str]
    token_ids: bytes
    """int32 [rids]"""
    logprobs: dict[int, RowLogprobs] = {}
    """By place in ``rids``, where they are wanted."""


class Times(msgspec.Struct, frozen=True, array_like=True):
    """When things happened to a request, ns since it was queued; -1: never."""

    scheduled_ns: int
    first_token_ns: int
    ended_ns: int


class Ended(msgspec.Struct, frozen=True, array_like=True, tag="ended"):
    """The end of a request, once."""

    rid: str
    reason: str
    """``length``, ``stop``, ``abort`` or ``error``."""
    message: str
    status: int
    prompt_tokens: int
    cached_tokens: int
    output_ids: bytes
    """int32: all of them."""
    text: TextOptions | None
    prompt_tail: bytes = b""
    """int32: see ``Begin``."""
    prompt_logprobs: bytes | None = None
    """float32 [prompt tokens], when the request asked for them."""
    logprobs: list[RowLogprobs] | None = None
    """Of every output token, when the request asked for them."""
    times: Times | None = None
    """None: it was never queued."""
    grammar: bool = False
    """Whether the request had one."""


class Answer(msgspec.Struct, frozen=True, array_like=True, tag="answer"):
    """The answer to a control message."""

    worker: int
    number: int
    success: bool
    message: str
    state: dict[str, int | float | str]
    metrics: bytes = b""
    """The page of ``/metrics``: the detokenizer, which sees every end, adds it to an answer that has a state."""


class Finished(msgspec.Struct, frozen=True, array_like=True):
    """How a request ended."""

    reason: str
    matched: str | int | None
    """The stop string, or the token that ended it."""
    message: str
    status: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    prompt_logprobs: bytes | None = None
    """See ``Ended``."""


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """What came of a request since the last one."""

    rid: str
    text: str
    token_ids: list[int]
    logprobs: list[RowLogprobs] | None = None
    finished: Finished | None = None


class Deltas(msgspec.Struct, frozen=True, array_like=True, tag="deltas"):
    """Of all of a worker's requests in one step."""

    deltas: list[Delta]


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """A part to the parent: it can take requests."""

    max_total_num_tokens: int = 0
    """Of the scheduler: tokens that the KV pool holds."""
    max_req_input_len: int = 0
    """Of the scheduler: a prompt is shorter than this."""
    context_length: int = 0
    """Of the model, or as the engine was told: what ``max_model_len`` says, as in SGLang."""
    context_tokens: int = 0
    """Of the scheduler: prompt and output together are at most this."""
    vocab_size: int = 0
    max_running_requests: int = 0
    device: str = ""
    loop: str = ""
    notes: tuple[str, ...] = ()
    """What whoever reads results must know."""


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """A part to the parent: it was asked for something that cannot be (an InputError); it ends."""

    message: str
    where: str
    remedy: str


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """A part to the parent: a defect; it ends."""

    message: str
    details: str
    """The traceback."""


class Start(msgspec.Struct, frozen=True):
    """The parent to a part, once: what to be."""

    options: ServeOptions
    folder: str
    """Where the sockets are: nobody else's."""
    number: int = 0
    """Of a worker."""
    listener_fd: int = -1
    """Of a worker: the socket that it accepts connections on."""
    scheduler: Ready | None = None
    """Of a worker: what the scheduler said."""


FromScheduler = StepTokens | Ended | Answer
ToWorker = Deltas | Answer
FromPart = Ready | Refused | Failed
DRAIN = b"drain"
"""The parent to a part: end, once nothing is open any more."""

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
decode_asked = msgspec.msgpack.Decoder(Asked).decode
decode_from_scheduler = msgspec.msgpack.Decoder(FromScheduler).decode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_part = msgspec.msgpack.Decoder(FromPart).decode
decode_start = msgspec.msgpack.Decoder(Start).decode


def asked(worker: int, number: int, message: Message) -> bytes:
    """An ``Asked``, encoded."""
    return encode(Asked(worker, number, encode_message(message), time.perf_counter_ns()))


def message_of(question: Asked) -> Message:
    """Its message. Raises ValueError for one that is not of the protocol."""
    return decode_message(question.message)


def pack_ids(token_ids: Sequence[int] | NDArray[np.int32]) -> bytes:
    """int32, little-endian."""
    return np.asarray(token_ids, dtype="<i4").tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """What ``pack_ids`` packed."""
    return [int(token) for token in np.frombuffer(data, "<i4").tolist()]


def requests_address(folder: str) -> str:
    """Where the scheduler listens."""
    return f"ipc://{folder}/requests"


def outputs_address(folder: str) -> str:
    """Where the detokenizer listens."""
    return f"ipc://{folder}/outputs"


def replies_address(folder: str, worker: int) -> str:
    """Where a worker listens."""
    return f"ipc://{folder}/replies-{worker}"


def worker_of(rid: str) -> int:
    """The number of the worker that asked."""
    return int(rid.partition(":")[0])
