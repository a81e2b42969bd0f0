"""The decision log: what was decided, step by step, in a form that two runs can compare byte by byte.

Format (version 1; all little-endian; ``docs/decision_log.md`` documents the fields)::

    file   := b"TBDL" u16 version, step*
    step   := u8 mode, u8 flags, u16 prefills, u16 decodes, u16 retracted, u32 pages, u32 evicted_tokens,
              prefills x (u32 request, u32 prefix_tokens, u32 new_tokens),
              [decodes x u32 request, unless flags & SAME_ROWS], retracted x u32 request, pages x i32 page

A request is its rank: the order in which the scheduler received it. flags: SAME_ROWS + 2 * the micro-batch of the
decodes (its lower seven bits). SAME_ROWS: the decode rows are those of the last step with the same such bits. Pages are
those newly allocated, in row order. Times are not decisions and are not here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from struct import Struct

import numpy as np
from numpy.typing import NDArray

from testbed.batch import Batch, ForwardMode
from testbed.request import ADVANCES, Request

VERSION = 1
HEADER = b"TBDL" + VERSION.to_bytes(2, "little")
SEVERAL = b"TBDM" + VERSION.to_bytes(2, "little")
SAME_ROWS = 1
_STEP = Struct("<BBHHHII")


class DecisionLog:
    """Collects the log of one scheduler."""

    def __init__(self) -> None:
        self._data = bytearray(HEADER)
        self._rows: dict[int, Sequence[Request]] = {}
        """The last decode rows, by the flags with which they are logged: micro-batches take turns."""
        self.last = b""
        """What is logged of the last batch."""

    def append(self, batch: Batch) -> None:
        """Log a batch at its launch."""
        prefills, retracted, pages, rows = batch.prefills, batch.retracted, batch.pages, batch.shape.decodes
        flags, logged_rows = (batch.advance // ADVANCES & 127) << 1, b""
        if batch.decodes is self._rows.get(flags):  # the running batch replaces its list when rows change
            flags |= SAME_ROWS
        elif rows:
            self._rows[flags], logged_rows = batch.decodes, batch.ranks.astype("<u4").tobytes()
        if prefills or retracted or len(pages) != 1:
            count, evicted = sum(map(len, pages)), batch.evicted_tokens
            logged = _STEP.pack(batch.mode, flags, len(prefills), rows, len(retracted), count, evicted)
            parts = [(p.request.rank, p.prefix_tokens, p.new_tokens) for p in prefills]
            logged += np.array(parts, dtype="<u4").tobytes() + logged_rows
            logged += np.array([request.rank for request in retracted], dtype="<u4").tobytes()
            logged += b"".join(part.tobytes() for part in pages)
        else:
            logged = _STEP.pack(batch.mode, flags, 0, rows, 0, len(pages[0]), batch.evicted_tokens)
            logged += logged_rows + pages[0].tobytes()
        self.last = logged
        self._data += logged

    def append_decodes(self, rows: int, pages: list[NDArray[np.int32]]) -> None:
        """Log decode steps of the same rows as the last one, by their new pages."""
        data = self._data
        for part in pages:
            data += _STEP.pack(ForwardMode.DECODE, SAME_ROWS, 0, rows, 0, len(part), 0)
            data += part.tobytes()

    def bytes(self) -> bytes:
        """The log so far."""
        return bytes(self._data)


def join_logs(logs: Sequence[bytes]) -> bytes:
    """The logs of a deployment's loops as one: ``b"TBDM" u16 version, loops x (u64 length, log)``; a single one is
    itself."""
    if len(logs) == 1:
        return logs[0]
    return SEVERAL + b"".join(len(log).to_bytes(8, "little") + log for log in logs)


def split_logs(data: bytes) -> list[bytes]:
    """What ``join_logs`` was given. Raises ValueError when it is cut off."""
    if not data.startswith(SEVERAL):
        return [data]
    logs, at = [], len(SEVERAL)
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at : at + 8], "little")
        if end > len(data):
            raise ValueError(f"decision log is cut off at byte {len(data)}")
        logs.append(data[at + 8 : end])
        at = end
    return logs


def digest(log: bytes) -> str:
    """SHA-256 of a log, in hex."""
    return hashlib.sha256(log).hexdigest()


@dataclass(slots=True, frozen=True)
class Decision:
    """One decoded step of a log."""

    mode: ForwardMode
    prefills: list[tuple[int, int, int]]
    decodes: list[int]
    retracted: list[int]
    pages: list[int]
    evicted_tokens: int


def read_decisions(log: bytes) -> Iterator[Decision]:
    """Decode a log. Raises ValueError at a wrong header, an unknown version or a cut-off record."""
    if log[:4] != HEADER[:4]:
        raise ValueError("not a decision log (it does not begin with TBDL)")
    if (version := int.from_bytes(log[4:6], "little")) != VERSION:
        raise ValueError(f"decision log version {version}; this program reads version {VERSION}")
    at = len(HEADER)
    known: dict[int, list[int]] = {}

    def take(count: int) -> list[int]:
        nonlocal at
        at += 4 * count
        if at > len(log):
            raise ValueError(f"decision log is cut off at byte {len(log)}")
        return list(np.frombuffer(log, "<i4", count, at - 4 * count).tolist())

    while at < len(log):
        if at + _STEP.size > len(log):
            raise ValueError(f"decision log is cut off at byte {len(log)}")
        mode, flags, prefills, decodes, retracted, pages, evicted = _STEP.unpack_from(log, at)
        at += _STEP.size
        parts = take(3 * prefills)
        if decodes and not flags & SAME_ROWS:
            known[flags >> 1] = take(decodes)
        rows = known.get(flags >> 1, []) if decodes else []
        victims = take(retracted)
        triples = [(parts[i], parts[i + 1], parts[i + 2]) for i in range(0, len(parts), 3)]
        yield Decision(ForwardMode(mode), triples, rows, victims, take(pages), evicted)


def decision_at(log: bytes, step: int) -> Decision | None:
    """The decision of one step; None where the log has ended before it, or cannot be read so far."""
    try:
        return next(islice(read_decisions(log), step, None), None)
    except ValueError:
        return None


def first_difference(one: bytes, other: bytes) -> tuple[int, Decision | None, Decision | None] | None:
    """The first step in which two logs differ, with both decisions (None where a log has ended); None when equal."""
    a, b = read_decisions(one), read_decisions(other)
    step = 0
    while True:
        left, right = next(a, None), next(b, None)
        if left is None and right is None:
            return None
        if left != right:
            return step, left, right
        step += 1
