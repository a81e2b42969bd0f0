"""What a trace looks like: how many, how fast, how bursty, how long, how much of it repeats."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np

from testbed.workload.traces.reader import TraceFile, read_trace
from testbed.workload.traces.rows import SECOND_NS, TraceRow

PERCENTILES = (50, 95, 99)


class PrefixMeter:
    """Share of prompt tokens that an infinite prefix cache would hold, requests served in the order given.

    Blocks match from the start of a prompt up to the first that was never seen.
    """

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._seen: set[int] = set()
        self.prompt_tokens = 0
        self.hit_tokens = 0

    def add(self, row: TraceRow) -> None:
        """Count a request, then keep its blocks."""
        blocks = next((i for i, block in enumerate(row.hash_ids) if block not in self._seen), len(row.hash_ids))
        self.hit_tokens += min(blocks * self.block_tokens, row.prompt_tokens)
        self.prompt_tokens += row.prompt_tokens
        self._seen.update(row.hash_ids)


def trace_stats(path: Path | str) -> dict[str, Any]:
    """Describe a trace; reads it once.

    Keys: ``format``, ``rows``, ``duration_s`` (first to last arrival), ``rate_per_s`` (gaps per second), ``gap_cv``
    (population standard deviation of the gaps over their mean), ``prompt_tokens`` and ``output_tokens`` (each with
    mean, p50, p95, p99 by linear interpolation, and max), ``sessions``, ``ideal_prefix_hit``. None where the trace
    cannot tell. Raises InputError at the first row that is wrong.
    """
    trace = read_trace(Path(path))
    arrivals, prompts, outputs = array("q"), array("q"), array("q")
    sessions: set[str] = set()
    meter = PrefixMeter(trace.format.block_tokens)
    for row in trace:
        arrivals.append(row.arrival_ns)
        prompts.append(row.prompt_tokens)
        outputs.append(row.output_tokens)
        if row.session:
            sessions.add(row.session)
        if trace.format.block_tokens:
            meter.add(row)
    return {
        "format": trace.format.name,
        "rows": len(prompts),
        **_pace(trace, np.frombuffer(arrivals, np.int64)),
        "prompt_tokens": _lengths(np.frombuffer(prompts, np.int64)),
        "output_tokens": _lengths(np.frombuffer(outputs, np.int64)),
        "sessions": len(sessions) or None,
        "ideal_prefix_hit": meter.hit_tokens / meter.prompt_tokens if trace.format.block_tokens else None,
    }


def _pace(trace: TraceFile, arrivals_ns: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, float | None]:
    duration_s = float(arrivals_ns[-1] - arrivals_ns[0]) / SECOND_NS
    if not trace.has_arrivals or duration_s == 0:
        return {"duration_s": duration_s if trace.has_arrivals else None, "rate_per_s": None, "gap_cv": None}
    gaps = np.diff(arrivals_ns)
    return {
        "duration_s": duration_s,
        "rate_per_s": len(gaps) / duration_s,
        "gap_cv": float(gaps.std() / gaps.mean()),
    }


def _lengths(tokens: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, float]:
    points = np.percentile(tokens, PERCENTILES).tolist()
    return {
        "mean": float(tokens.mean()),
        **{f"p{percentile}": point for percentile, point in zip(PERCENTILES, points, strict=True)},
        "max": int(tokens.max()),
    }
