"""One row of any trace, and the table of formats: which columns a format has and what they mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any, NamedTuple

NO_TIME = -1
"""The arrival of a row in a file that has lengths only."""

SECOND_NS = 1_000_000_000
_LARGEST = 2**62


class TraceRow(NamedTuple):
    """A recorded request."""

    line: int
    """Line of the file (of a Parquet file: row), from 1."""
    arrival_ns: int
    prompt_tokens: int
    output_tokens: int
    """0 only in a row that ``zero_output: drop`` leaves out."""
    id: str = ""
    session: str = ""
    turn: int = -1
    """Place in the session from 0; -1: the order of the file decides."""
    think_ns: int = 0
    priority: int | None = None
    tenant: str = ""
    prefix_id: str = ""
    prefix_tokens: int = 0
    hash_ids: tuple[int, ...] = ()
    """Blocks of the prompt from its start; equal ids are equal tokens behind equal prefixes."""


class BadCell(ValueError):
    """A value that its column does not allow: what is wrong, and what to write instead."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


# --- what a cell may hold -------------------------------------------------------------------------------------------


def whole(value: Any) -> int:
    """An integer, also as text or as a float without a fraction (tables with gaps store those)."""
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = real(value)
    if isinstance(number, float) and real(number).is_integer():
        number = int(number)
    if not isinstance(number, int) or isinstance(number, bool):
        raise BadCell(f"{value!r} is not a whole number", "write digits only, or leave the row out")
    return _bounded(number)


def _bounded(number: int) -> int:
    if abs(number) > _LARGEST:
        raise BadCell("a number of more than 62 bits", "correct the row or leave it out")
    return number


def real(value: Any) -> float:
    """A finite number."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else float("nan")
    except (ValueError, OverflowError):
        number = float("nan")
    if not abs(number) < float("inf"):
        raise BadCell(f"{value!r} is not a number", "write a finite number, or leave the row out")
    return number


def tokens(value: Any) -> int:
    """A length of at least one token."""
    count = whole(value)
    if count < 1:
        raise BadCell(f"{count} tokens", "a length is at least 1: correct the row or leave it out")
    return count


def tokens_or_zero(value: Any) -> int:
    """A length that may be 0 (judged later)."""
    count = whole(value)
    if count < 0:
        raise BadCell(f"{count} tokens", "a length cannot be negative: correct the row or leave it out")
    return count


def nanoseconds(unit_ns: int) -> Callable[[Any], int]:
    """A converter of times and spans in a unit of ``unit_ns``: not negative, rounded to the nanosecond."""

    def convert(value: Any) -> int:
        # The text of an integer number of nanoseconds must not go through a float.
        span_ns = whole(value) if unit_ns == 1 else _bounded(round(min(real(value) * unit_ns, 2.0 * _LARGEST)))
        if span_ns < 0:
            raise BadCell(f"{value!r} is negative", "times count from the start of the trace")
        return span_ns

    return convert


_CLOCK = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[ T](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:Z|([+-])(\d\d):?(\d\d))?", re.ASCII
)


def clock(value: Any) -> int:
    """A date and time, with or without a zone: nanoseconds since 1 January of year 1."""
    remedy = "write 2023-11-16 18:15:46.6805900, with or without a zone as +00:00"
    match = _CLOCK.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise BadCell(f"{value!r} is not a date and time", remedy)
    year, month, day, hour, minute, second = map(int, match.groups()[:6])
    try:
        days = date(year, month, day).toordinal()
    except ValueError as error:
        raise BadCell(f"{value!r}: {error}", remedy) from error
    if hour > 23 or minute > 59 or second > 59:
        raise BadCell(f"{value!r} is not a time of day", remedy)
    fraction, sign, zone_hours, zone_minutes = match.groups()[6:]
    seconds = ((days * 24 + hour) * 60 + minute) * 60 + second
    if sign:
        offset = int(zone_hours) * 3600 + int(zone_minutes) * 60
        seconds -= offset if sign == "+" else -offset
    return seconds * SECOND_NS + int((fraction or "").ljust(9, "0"))


def name(value: Any) -> str:
    """A name: text, or a number as text; empty cells and nulls are no name."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def blocks(value: Any) -> tuple[int, ...]:
    """A list of block ids."""
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise BadCell("not a list of block ids", "write a list of integers from 0 on, [] where there are none")
    return tuple(value)


# --- formats --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """Field of a ``TraceRow`` that a column fills, and how its cells are read."""

    field: str
    read: Callable[[Any], Any]


@dataclass(frozen=True)
class Format:
    """A kind of trace file. Columns that are neither required nor optional are ignored."""

    name: str
    required: Mapping[str, Column]
    optional: Mapping[str, Column]
    markers: tuple[str, ...] = ()
    """Columns that must be there to tell the format but whose content is not used."""
    block_tokens: int = 0
    """Tokens of a block in ``hash_ids``; 0: the format has none."""
    last_block_partial: bool = False
    """Whether the last block may be cut by the end of the prompt, or only full blocks are listed."""
    own_clock: bool = False
    """Times are dates: they count from the first row."""


_PROMPT, _OUTPUT = Column("prompt_tokens", tokens), Column("output_tokens", tokens_or_zero)
_SECONDS, _MS = Column("arrival_ns", nanoseconds(SECOND_NS)), Column("arrival_ns", nanoseconds(1_000_000))
_BLOCKS = Column("hash_ids", blocks)
_MOONCAKE = {"timestamp": _MS, "input_length": _PROMPT, "output_length": _OUTPUT, "hash_ids": _BLOCKS}
_OWN = {"prompt_tokens": _PROMPT, "output_tokens": _OUTPUT}
_OWN_OPTIONAL = {
    "id": Column("id", name),
    "session": Column("session", name),
    "think_s": Column("think_ns", nanoseconds(SECOND_NS)),
    "priority": Column("priority", whole),
    "tenant": Column("tenant", name),
    "prefix_id": Column("prefix_id", name),
    "prefix_tokens": Column("prefix_tokens", tokens_or_zero),
}

FORMATS = (
    Format(
        "agent",
        {**_MOONCAKE, "session_id": Column("session", name), "turn": Column("turn", tokens_or_zero)},
        {},
        block_tokens=16,
    ),
    Format("mooncake", _MOONCAKE, {}, block_tokens=512, last_block_partial=True),
    Format(
        "azure",
        {"TIMESTAMP": Column("arrival_ns", clock), "ContextTokens": _PROMPT, "GeneratedTokens": _OUTPUT},
        {},
        own_clock=True,
    ),
    Format(
        "burstgpt",
        {"Timestamp": _SECONDS, "Request tokens": _PROMPT, "Response tokens": _OUTPUT},
        {},
        markers=("Model", "Total tokens", "Log Type"),
    ),
    Format(
        "servegen",
        {"arrival_s": _SECONDS, "input_tokens": _PROMPT, "output_tokens": _OUTPUT},
        {"client_id": Column("tenant", name)},
    ),
    Format("lengths", {"num_prefill_tokens": _PROMPT, "num_decode_tokens": _OUTPUT}, {}),
    Format("testbed", {"arrival_s": _SECONDS, **_OWN}, _OWN_OPTIONAL),
    Format("testbed", {"arrival_ns": Column("arrival_ns", nanoseconds(1)), **_OWN}, _OWN_OPTIONAL),
    Format("testbed", _OWN, _OWN_OPTIONAL),
)
"""In the order they are tried: what has more columns comes first."""
