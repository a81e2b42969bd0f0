"""What enters and leaves a scheduler. Plain data: a message can be recorded, sent between processes and replayed.

What enters travels as msgpack (``encode_message``, ``decode_message``): typed, never pickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple
from zlib import crc32

import msgspec
import numpy as np
from numpy.typing import NDArray

from testbed.sampling import DEFAULT_SAMPLING, SamplingParams
from testbed.tokens import token_ids


class Segment(NamedTuple):
    """``length`` tokens of stream ``key`` from position ``start`` on (see ``testbed.tokens``)."""

    key: int
    start: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
    length: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class Prompt(msgspec.Struct, eq=False, tag=True, forbid_unknown_fields=True):
    """A prompt that is made when it is first looked at: its length is free, its ids cost memory only while it lives."""

    segments: Sequence[Segment]

    def __len__(self) -> int:
        return sum(segment.length for segment in self.segments)

    def ids(self, vocab_size: int) -> NDArray[np.int32]:
        """The token ids, int32 [length]."""
        parts = [token_ids(*segment, vocab_size) for segment in self.segments]
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, np.int32)


class TokenPrompt(msgspec.Struct, eq=False, tag=True, forbid_unknown_fields=True):
    """A prompt given as ids (from a tokenizer)."""

    tokens: NDArray[np.int32]

    def __post_init__(self) -> None:
        self.tokens = np.asarray(self.tokens, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.tokens)

    def ids(self, vocab_size: int) -> NDArray[np.int32]:
        """The token ids, int32 [length]; ``vocab_size`` is not used."""
        return self.tokens


class _Incoming(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, forbid_unknown_fields=True):
    """Something that a scheduler receives."""


class TextOptions(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How the tokens of a request become text: for whoever detokenises; a scheduler hands it through unread."""

    stop: tuple[str, ...] = ()
    """The text ends before the first of these that it comes to hold."""
    include_stop: bool = False
    """And keeps it."""
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True


class GrammarSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the text of an output has to match."""

    kind: Literal["json_object", "json_schema", "regex", "ebnf"]
    text: str = ""
    """Empty for ``json_object``: any JSON object."""


class Pair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where one request is served in two halves (specification G)."""

    room: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
    """What both engines call the request between them; no two requests ever have the same."""
    prefill: str
    """The name of the engine that computes the prompt's KV."""
    decode: str
    """The name of the engine that it is sent to."""


class GenerateRequest(_Incoming, frozen=True):
    """Generate up to ``max_new_tokens`` after ``prompt``. The true output length is not here: the executor knows it."""

    rid: str
    prompt: Prompt | TokenPrompt
    max_new_tokens: int | None = None
    """None: as many as the context and the pool allow."""
    ignore_eos: bool = True
    priority: int | None = None
    extra_key: str = ""
    """Name space of the prefix cache: requests with different keys never share pages."""
    stream: bool = True
    sampling: SamplingParams = DEFAULT_SAMPLING
    return_logprob: bool = False
    """Log-probabilities of the outputs under the model's own distribution; the fields below say of what else."""
    top_logprobs: int = 0
    """And of this many most likely tokens beside each."""
    logprob_start: int = -1
    """And of the prompt's tokens behind this position; -1: none."""
    text: TextOptions | None = None
    """None: nobody wants text."""
    grammar: GrammarSpec | None = None
    """The request waits until it is compiled. It says where the output ends: ``ignore_eos`` has no effect."""
    data_parallel_rank: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)] | None = None
    """The replica that it should go to, where its session was before; None: the router chooses."""
    pair: Pair | None = None
    """The two engines that serve it together, where prefill and decode are apart."""


class BatchGenerateRequest(_Incoming, frozen=True):
    """Several requests in one message; the same as each of them alone, in order."""

    requests: tuple[GenerateRequest, ...]


class AbortRequest(_Incoming, frozen=True):
    """Abort the request ``rid`` (exactly this id), or every request."""

    rid: str = ""
    abort_all: bool = False


class GrammarReady(_Incoming, frozen=True):
    """A grammar is compiled; with an ``error`` it cannot be, and the request that waits for it ends."""

    rank: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
    """The request's order of arrival: ids are used again."""
    error: str = ""
    status: int = 400
    """HTTP status of the error."""


class FlushCache(_Incoming, frozen=True):
    """Empty the prefix cache; refused, without effect, unless the scheduler is fully idle."""


class GetInternalState(_Incoming, frozen=True):
    """Ask for queue lengths, pool use and the settings in force."""


class SetInternalState(_Incoming, frozen=True):
    """Change settings that may change while running; names outside the list are refused."""

    settings: dict[str, int | float] = {}


class SlowDown(_Incoming, frozen=True):
    """Sleep this long before every launch; 0 or less turns it off."""

    forward_sleep_ns: int


class Timer(_Incoming, frozen=True):
    """A message that a loop posts to itself."""

    name: str


class _BetweenEngines(_Incoming, frozen=True):
    """What a prefill engine and a decode engine tell each other about a request. It may come late, twice or never.

    ``epoch`` is the sender's, which is higher each time that engine starts; ``to_epoch`` the receiver's as the sender
    knows it, 0 where it does not.
    """

    room: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
    sender: str
    epoch: int
    to_epoch: int


class RoomAsked(_BetweenEngines, frozen=True):
    """Prefill to decode: make room for a prompt's KV."""

    prompt_tokens: int
    page_size: int
    kv_bytes_per_token: int
    """Both sides' layouts of KV must be the same."""
    stages: int = 1
    """Each of them sends its own layers' KV."""


class RoomReserved(_BetweenEngines, frozen=True, eq=False):
    """Decode to prefill: there is room."""

    pages: NDArray[np.int32]
    """Pages of the decode engine, one after another: int32 [ceil(prompt tokens / page size)]."""


class KvChunk(_BetweenEngines, frozen=True, eq=False):
    """Prefill to decode: the KV of ``tokens`` prompt tokens from ``start`` on, in whole pages but for the prompt's end.

    The last chunk brings the metadata: what a decode engine needs to go on.
    """

    index: int
    """Number of the chunk in its room, and from its stage, from 0."""
    start: int
    tokens: int
    source_pages: NDArray[np.int32]
    """Where it lies: int32 [ceil(tokens / page size)]."""
    pages: NDArray[np.int32]
    """Where it goes: int32, as many."""
    stage: int = 0
    """Of the prefill engine's pipeline, whose layers' KV this is."""
    last: bool = False
    """Of its stage."""
    token_id: int = -1
    """The first output token."""
    stopped: bool = False
    """Whether that token ends the output."""
    cached_tokens: int = 0
    """Prompt tokens that the prefill engine found cached."""
    spent_ns: int = 0
    """From the reservation's arrival at the prefill engine until this KV was computed, by its own clock."""
    checksum: int = 0
    """See ``chunk_checksum``."""


class KvReceived(_BetweenEngines, frozen=True):
    """Decode to prefill: all KV of the room is here, whole and checked."""


class RoomClosed(_BetweenEngines, frozen=True):
    """The sender has ended its part: a prefill engine will send nothing more, a decode engine will take nothing more.
    Whoever has the room open ends its own part and says so."""

    message: str
    status: int
    """HTTP status of the reason."""
    chunks: int = 0
    """From a prefill engine: how many chunks it has sent, so that the other knows when the last has come."""


Message = (
    GenerateRequest
    | BatchGenerateRequest
    | AbortRequest
    | GrammarReady
    | FlushCache
    | GetInternalState
    | SetInternalState
    | SlowDown
    | Timer
    | RoomAsked
    | RoomReserved
    | KvChunk
    | KvReceived
    | RoomClosed
)


class LoadReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a replica tells its router of itself."""

    running: int
    """Requests that hold memory."""
    waiting: int
    """Requests that wait for it."""
    used_tokens: int
    """KV tokens that requests hold: neither free nor cached for nobody."""
    waiting_tokens: int
    """Prompt tokens whose KV is still to be computed."""
    steps: int
    """Steps whose result has been processed."""
    received: int
    """Requests that have come in since the start, refused ones too: which of them this report covers."""


def _from_array(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        return value.astype("<i4").tobytes()
    raise NotImplementedError(f"{type(value).__name__} is no part of a message")


def _to_array(kind: Any, value: Any) -> NDArray[np.int32]:
    return np.frombuffer(value, "<i4").astype(np.int32)


_encoder = msgspec.msgpack.Encoder(enc_hook=_from_array)
_decoder = msgspec.msgpack.Decoder(Message, dec_hook=_to_array)


def encode_message(message: Message) -> bytes:
    """As msgpack: a map with the class's name under ``type``; defaults are left out, token ids are int32 in bytes."""
    return _encoder.encode(message)


def decode_message(data: bytes) -> Message:
    """The message in ``data``. Raises ValueError for anything that is not exactly one."""
    try:
        decoded: Message = _decoder.decode(data)
    except RecursionError as error:
        raise ValueError("a message is nested without end") from error
    return decoded


def chunk_checksum(chunk: KvChunk) -> int:
    """CRC-32 of all that ``chunk`` says but the checksum itself. (That of the KV is the transport's.)"""
    return crc32(_encoder.encode(msgspec.structs.replace(chunk, checksum=0)))


class Logprobs:
    """Log-probabilities that a request asked for, as they come in (natural logarithm, float32)."""

    __slots__ = ("prompt", "start", "tokens", "top")

    def __init__(self, start: int, prompt_tokens: int) -> None:
        self.start = start
        """Prompt tokens behind this position are wanted; -1: none."""
        self.prompt = np.full(prompt_tokens if start >= 0 else 0, np.nan, dtype=np.float32)
        """float32 [prompt tokens], or empty: element i belongs to prompt token i; NaN up to ``start``."""
        self.tokens: list[float] = []
        """One for each output token."""
        self.top: list[tuple[NDArray[np.int32], NDArray[np.float32]]] = []
        """For each output token: the most likely ones, their log-probabilities. Empty when nobody asked."""


@dataclass(slots=True, frozen=True)
class RequestOutput:
    """The end of a request, sent once."""

    rid: str
    finish_reason: str
    """``length``, ``stop``, ``abort`` or ``error``."""
    message: str
    status: int
    """200, or the HTTP status of an abort or a refusal."""
    prompt_tokens: int
    cached_tokens: int
    output_ids: NDArray[np.int32]
    logprobs: Logprobs | None = None
    """When the request asked for them."""


@dataclass(slots=True, frozen=True)
class ControlOutput:
    """The answer to a control message."""

    request: Message
    success: bool
    message: str = ""
    state: dict[str, int | float | str] = field(default_factory=dict)
