"""The journal of a run: everything that entered its scheduler, so that every decision can be made again.

A scheduler decides from three things: the stamp and the messages of each ``recv``, and the result of each step
(architecture: time is an input). The journal holds them in order, with the settings that no scenario states. It is
filled by the runtime that drives the loop, and read by ``testbed.runtime.replay``.

As a file: ``b"TBJL"``, a u16 version, then one msgpack document (``_Document``). Nothing in it is code.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from testbed.batch import StepLogprobs, StepResult
from testbed.messages import Message, decode_message, encode_message

VERSION = 1
HEADER = b"TBJL" + VERSION.to_bytes(2, "little")
LAST_NS = 1 << 62
"""No time is later: sums of two fit into 64 bits."""

_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 62)]
_Index = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the scheduler was made with beside the scenario: found on the device and in the model that were there."""

    loop: str
    """The loop's resolved name."""
    vocab_size: _Count
    kv_tokens: _Count
    """Capacity of the KV pool."""
    context_length: _Count
    seed: Annotated[int, msgspec.Meta(ge=0)]


class Journal:
    """What entered the scheduler of one run."""

    def __init__(self, setting: Setting | None = None, *, keeps_tokens: bool = False) -> None:
        """``keeps_tokens``: write down each step's token ids; else they are the oracle's, a function of request and
        position, and are made again when they are wanted."""
        self.setting = setting
        self.keeps_tokens = keeps_tokens
        self.stamps = array("q")
        """What each ``recv`` said the time was (ns)."""
        self.stamp = self.stamps.append
        self.arrivals: list[tuple[int, Message]] = []
        """(index of the ``recv``, message) in order."""
        self.sent = array("q")
        """When each step's tokens were sent (ns), in order of launch."""
        self.tokens: list[NDArray[np.int32]] = []
        """With ``keeps_tokens``: int32 [rows] of each step."""
        self.stopped: dict[int, tuple[int, ...]] = {}
        """Rows that ended early, by step, where there are any."""
        self.invalid: dict[int, tuple[int, ...]] = {}
        """Rows without a token, by step."""
        self.logprobs: dict[int, StepLogprobs] = {}

    def received(self, now_ns: int, messages: Sequence[Message]) -> None:
        """A ``recv`` returned this."""
        index = len(self.stamps)
        self.stamps.append(now_ns)
        self.arrivals.extend((index, message) for message in messages)

    def stepped(self, result: StepResult, sent_ns: int) -> None:
        """The next step's result was applied, its tokens sent."""
        step = len(self.sent)
        self.sent.append(sent_ns)
        if self.keeps_tokens:
            self.tokens.append(result.token_ids)
        if result.stopped:
            self.stopped[step] = result.stopped
        if result.invalid:
            self.invalid[step] = result.invalid
        if result.logprobs is not None:
            self.logprobs[step] = result.logprobs

    def deliveries(self) -> Iterator[tuple[int, list[Message]]]:
        """What each ``recv`` returned, in order."""
        place = 0
        for index, now_ns in enumerate(self.stamps):
            begin = place
            while place < len(self.arrivals) and self.arrivals[place][0] == index:
                place += 1
            yield now_ns, [message for _, message in self.arrivals[begin:place]]

    def to_bytes(self) -> bytes:
        """The file. Raises ValueError for a journal without a setting."""
        if self.setting is None:
            raise ValueError("a journal without a setting cannot be replayed")
        counts = np.array([len(tokens) for tokens in self.tokens], dtype=np.int64)
        document = _Document(
            setting=self.setting,
            keeps_tokens=self.keeps_tokens,
            stamps=_pack(self.stamps),
            arrivals=[(index, encode_message(message)) for index, message in self.arrivals],
            sent=_pack(self.sent),
            counts=_pack(counts),
            tokens=b"".join(tokens.astype("<i4").tobytes() for tokens in self.tokens),
            stopped=list(self.stopped.items()),
            invalid=list(self.invalid.items()),
            logprobs=[(step, _logprobs_out(found)) for step, found in self.logprobs.items()],
        )
        return HEADER + msgspec.msgpack.encode(document)

    @classmethod
    def from_bytes(cls, data: bytes) -> Journal:
        """Read a file. Raises ValueError, in words, for anything that is not a whole journal of this version."""
        if data[:4] != HEADER[:4]:
            raise ValueError("not a journal (it does not begin with TBJL)")
        if (version := int.from_bytes(data[4:6], "little")) != VERSION:
            raise ValueError(f"journal version {version}; this program reads version {VERSION}")
        document = _decoder.decode(data[len(HEADER) :])
        journal = cls(document.setting, keeps_tokens=document.keeps_tokens)
        journal.stamps.extend(_unpack(document.stamps).tolist())
        journal.sent.extend(_unpack(document.sent).tolist())
        journal.arrivals = [(index, decode_message(message)) for index, message in document.arrivals]
        journal.tokens = _cut(document)
        journal.stopped, journal.invalid = dict(document.stopped), dict(document.invalid)
        journal.logprobs = {step: _logprobs_in(found) for step, found in document.logprobs}
        journal._check()
        return journal

    def _check(self) -> None:
        """Raise ValueError where the parts do not belong together."""
        if not _rises(self.stamps, LAST_NS) or not _rises(self.sent, LAST_NS):
            raise ValueError("its times go back, or lie outside of 62 bits")
        if not _rises((index for index, _ in self.arrivals), len(self.stamps)):
            raise ValueError("messages do not belong to the iterations")
        if len(self.tokens) != (len(self.sent) if self.keeps_tokens else 0):
            raise ValueError(f"tokens of {len(self.tokens)} steps, but {len(self.sent)} were sent")
        if not all(_rises(rows, len(self.sent)) for rows in (self.stopped, self.invalid, self.logprobs)):
            raise ValueError("a result belongs to no step")


def _rises(values: Iterable[int], end: int) -> bool:
    """Whether no value is less than the one before it, and all lie in [0, end)."""
    found = np.fromiter(values, dtype=np.int64)
    return not len(found) or bool(found[0] >= 0 and found[-1] < end and (found[1:] >= found[:-1]).all())


_Rows = tuple[_Index, tuple[_Index, ...]]
_Part = tuple[tuple[_Index, ...], bytes]
"""Shape and content of an array."""


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    setting: Setting
    keeps_tokens: bool
    stamps: bytes
    """int64 little-endian, as ``sent`` and ``counts``."""
    arrivals: list[tuple[_Index, bytes]]
    sent: bytes
    counts: bytes
    """Tokens of each step."""
    tokens: bytes
    """int32 little-endian, all steps."""
    stopped: list[_Rows]
    invalid: list[_Rows]
    logprobs: list[tuple[_Index, tuple[_Part, _Part, _Part, _Part]]]


_decoder = msgspec.msgpack.Decoder(_Document)


def _pack(values: Any) -> bytes:
    return np.asarray(values, dtype="<i8").tobytes()


def _unpack(data: bytes) -> NDArray[np.int64]:
    return np.frombuffer(data, "<i8")


def _cut(document: _Document) -> list[NDArray[np.int32]]:
    counts, tokens = _unpack(document.counts), np.frombuffer(document.tokens, "<i4").astype(np.int32)
    if ((counts < 0) | (counts > len(tokens))).any() or int(counts.sum()) != len(tokens):
        raise ValueError(f"its {len(tokens)} tokens are not what the steps have together")
    return np.split(tokens, np.cumsum(counts)[:-1]) if len(counts) else []


_LOGPROB_TYPES = ("<f4", "<i4", "<f4", "<f4")


def _logprobs_out(found: StepLogprobs) -> tuple[_Part, _Part, _Part, _Part]:
    parts = [(part.shape, part.astype(kind).tobytes()) for part, kind in zip(found, _LOGPROB_TYPES, strict=True)]
    return parts[0], parts[1], parts[2], parts[3]


def _logprobs_in(parts: Sequence[_Part]) -> StepLogprobs:
    arrays = [
        np.frombuffer(data, kind).reshape(shape) for (shape, data), kind in zip(parts, _LOGPROB_TYPES, strict=True)
    ]
    return StepLogprobs(*arrays)
