"""Reading columns: typed access, requests that count as finished or failed, and the gaps between tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from testbed.metrics.records import Column, Records
from testbed.request import FinishReason

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

NS_PER_MS = 1e6
NS_PER_S = 1e9


def ints(table: Mapping[str, Column], name: str) -> Ints:
    """Column ``name`` as int64 [rows]."""
    return np.asarray(table[name], dtype=np.int64)


def floats(table: Mapping[str, Column], name: str) -> Floats:
    """Column ``name`` as float64 [rows]."""
    return np.asarray(table[name], dtype=np.float64)


def rows(table: Mapping[str, Column]) -> int:
    """Number of rows of a table of columns."""
    return len(next(iter(table.values()))) if table else 0


def seen_inside(records: Records) -> bool:
    """Whether the run knows its steps. Clients do not: their requests are answered without any."""
    return rows(records.steps) > 0 or rows(records.requests) == 0


def completed(records: Records) -> Bools:
    """Requests that ended as they should (``length`` or ``stop``): bool [requests]."""
    return _ended(records, FinishReason.LENGTH, FinishReason.STOP)


def failed(records: Records) -> Bools:
    """Requests that ended in ``abort`` or ``error``: bool [requests]."""
    return _ended(records, FinishReason.ABORT, FinishReason.ERROR)


def _ended(records: Records, *reasons: FinishReason) -> Bools:
    given = np.asarray(records.requests["finish_reason"], dtype=object)
    wanted = np.zeros(len(given), dtype=np.bool_)
    for reason in reasons:
        wanted |= given == reason.value
    return wanted & (ints(records.requests, "finish_ns") >= 0)


def token_owner(records: Records) -> Ints:
    """Index of the request that sent each token: int64 [tokens]."""
    return np.repeat(np.arange(len(records.token_offsets) - 1), np.diff(records.token_offsets))


def token_gaps(records: Records) -> tuple[Ints, Ints]:
    """Every gap between two successive tokens of one request (ns), int64 [gaps], and that request's index."""
    times, offsets = records.token_times_ns, records.token_offsets
    if len(times) < 2:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    within = np.ones(len(times) - 1, dtype=np.bool_)
    borders = offsets[(offsets > 0) & (offsets < len(times))]
    within[borders - 1] = False
    return np.diff(times)[within], token_owner(records)[1:][within]


def request_latencies(records: Records) -> dict[str, Floats]:
    """TTFT, TPOT and E2E latency of every request, in ms: float64 [requests], NaN where undefined.

    TTFT = first token - arrival. TPOT = (last - first token) / (output tokens - 1), undefined for fewer than two
    tokens. E2E (``e2el``, as vLLM's bench names it) = finish - arrival. Failed and unfinished requests have none.
    """
    table = records.requests
    arrival, first, last = ints(table, "arrival_ns"), ints(table, "first_token_ns"), ints(table, "last_token_ns")
    output = ints(table, "output_tokens")
    done = completed(records)
    gaps = np.maximum(output - 1, 1)
    return {
        "ttft": np.where(done & (first >= 0), (first - arrival) / NS_PER_MS, np.nan),
        "tpot": np.where(done & (output >= 2), (last - first) / NS_PER_MS / gaps, np.nan),
        "e2el": np.where(done, (ints(table, "finish_ns") - arrival) / NS_PER_MS, np.nan),
    }
