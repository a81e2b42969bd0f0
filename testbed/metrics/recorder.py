"""Collects a run's records while it runs: rows of integers into flat arrays, nothing computed that can wait."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from testbed.batch import Batch, StepResult
from testbed.metrics.journal import Journal
from testbed.metrics.records import REQUEST_COLUMNS, Column, Records
from testbed.request import NEVER, Request

_STEP_FIELDS = (
    *("step", "mode", "launch_ns", "start_ns", "end_ns", "rows", "prefill_rows", "new_tokens", "prefix_tokens"),
    *("decode_rows", "extra_rows", "context_tokens", "evicted_tokens", "retracted", "graph"),
    *("running", "waiting", "free_tokens", "evictable_tokens"),
)
_STEP_PLACES = {name: place for place, name in enumerate(_STEP_FIELDS)}
_SPAN_FIELDS = ("name", "step", "begin_ns", "end_ns")
_REQUEST_FIELDS = (
    *("priority", "queued_ns", "first_scheduled_ns", "first_token_ns", "finish_ns"),
    *("prompt_tokens", "cached_tokens", "output_tokens", "max_new_tokens", "retractions"),
    *("prefill_ns", "decode_ns", "retracted_ns", "transfer_ns"),
)
DEVICE_LANE = 1


class _Ended(NamedTuple):
    """What is kept of a request that has ended."""

    figures: tuple[int, ...]
    """The values of _REQUEST_FIELDS."""
    finish_reason: str
    segments: tuple[tuple[int, int], ...]
    """Its token times: see Request.segments."""


class Recorder:
    """The records of one scheduler and its loop."""

    def __init__(self, replica: int = 0) -> None:
        self.replica = replica
        self.journal = Journal()
        """What entered the scheduler."""
        self.advance_times = array("q")
        """When the tokens of decode step k were sent: element k - 1 (steps are counted as RunningBatch.advance)."""
        self.counters: dict[str, int] = {}
        self._steps = array("q")
        self._ratios = array("d")
        self._spans = array("q")
        self.span = self._spans.extend
        """``span((stage, step, begin_ns, end_ns))``: a host span (the array's own method: it is called often)."""
        self._ended: dict[str, _Ended] = {}

    def count(self, name: str, by: int = 1) -> None:
        """Add to a whole-run counter."""
        self.counters[name] = self.counters.get(name, 0) + by

    def step(self, batch: Batch, result: StepResult, sent_ns: int) -> None:
        """A launched batch whose result has been processed, and its tokens sent; called in launch order."""
        self.journal.stepped(result, sent_ns)
        shape = batch.shape
        self._steps.extend(
            (
                batch.index,
                batch.mode,
                result.launch_ns,
                result.start_ns,
                result.end_ns,
                len(batch.prefills) + shape.decodes,
                len(batch.prefills),
                sum(shape.new_tokens) if batch.prefills else 0,
                sum(shape.prefix_tokens) if batch.prefills else 0,
                shape.decodes,
                batch.extra_rows,
                shape.context_tokens,
                batch.evicted_tokens,
                len(batch.retracted),
                result.graph,
                *batch.decided,
            )
        )
        self._ratios.append(batch.new_token_ratio)

    def steps_at_once(self, columns: Mapping[str, NDArray[np.int64] | int], ratios: list[float], count: int) -> None:
        """The first ``count`` of many steps, by column; a column that is not given is 0."""
        table = np.zeros((count, len(_STEP_FIELDS)), dtype=np.int64)
        for name, values in columns.items():
            table[:, _STEP_PLACES[name]] = values if isinstance(values, int) else values[:count]
        self._steps.frombytes(table.tobytes())
        self._ratios.extend(ratios[:count])

    def spans_at_once(self, spans: NDArray[np.int64]) -> None:
        """Many host spans: int64 [..., 4] of (stage, step, begin_ns, end_ns)."""
        self._spans.frombytes(spans.tobytes())

    def ended(self, request: Request, outputs: int, sent_ns: int) -> None:
        """A request's end was sent. Only figures are kept: the request and its tokens can go."""
        # What never happened lasts no time and lies at the end: the five durations sum to finish - arrival exactly.
        scheduled = request.first_scheduled_ns if request.first_scheduled_ns != NEVER else sent_ns
        first = request.first_token_ns if request.first_token_ns != NEVER else sent_ns
        early = request.retracted_before_first_ns
        figures = (
            NEVER if request.priority is None else request.priority,
            request.queued_ns,
            request.first_scheduled_ns,
            request.first_token_ns,
            sent_ns,
            request.prompt_tokens,
            max(request.cached_tokens, 0),
            outputs,
            request.max_new_tokens,
            request.retractions,
            first - scheduled - early,
            sent_ns - first - (request.retracted_ns - early),
            request.retracted_ns,
            0,
        )
        self._ended[request.rid] = _Ended(figures, str(request.finish_reason), tuple(request.segments))

    # -- columns --------------------------------------------------------------------------------------------------

    def records(self, sent: dict[str, tuple[int, str, str]], decisions: bytes) -> Records:
        """The columns. ``sent``: (arrival_ns, session, tenant) by request id, in order of arrival."""
        steps = self._step_columns()
        offsets, times = self._token_times(sent)
        return Records(
            requests=self._request_columns(sent, offsets, times),
            steps=steps,
            spans=self._span_columns(steps),
            token_offsets=offsets,
            token_times_ns=times,
            decisions=decisions,
            journal=self.journal,
            counters=dict(sorted(self.counters.items())),
        )

    def _step_columns(self) -> dict[str, Any]:
        table = np.frombuffer(self._steps, dtype=np.int64).reshape(-1, len(_STEP_FIELDS))
        columns: dict[str, Any] = {name: table[:, i].copy() for i, name in enumerate(_STEP_FIELDS)}
        columns["gpu_ns"] = columns["end_ns"] - columns["start_ns"]
        columns["new_token_ratio"] = np.array(self._ratios, dtype=np.float64)
        columns["replica"] = np.full(len(table), self.replica, dtype=np.int64)
        return columns

    def _span_columns(self, steps: dict[str, Any]) -> dict[str, Column]:
        """Host spans as they happened, then the device's, one a step."""
        table = np.frombuffer(self._spans, dtype=np.int64).reshape(-1, len(_SPAN_FIELDS))
        device = (steps["mode"], steps["step"], steps["start_ns"], steps["end_ns"])
        columns: dict[str, Column] = {
            name: np.concatenate([table[:, i], device[i]]) for i, name in enumerate(_SPAN_FIELDS)
        }
        lane = np.zeros(len(columns["name"]), dtype=np.int64)
        lane[len(table) :] = DEVICE_LANE
        return {"lane": lane, **columns, "replica": np.full(len(lane), self.replica, dtype=np.int64)}

    def _token_times(self, sent: dict[str, tuple[int, str, str]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Join each request's segments: pieces of the list of advance times, and single prefill tokens."""
        advances = np.frombuffer(self.advance_times, dtype=np.int64) if self.advance_times else np.empty(0, np.int64)
        offsets = np.zeros(len(sent) + 1, dtype=np.int64)
        pieces: list[NDArray[np.int64]] = []
        for i, rid in enumerate(sent):
            total = 0
            if rid in self._ended:
                for first, count in self._ended[rid].segments:
                    piece = advances[first : first + count] if first >= 0 else np.array([-1 - first])
                    pieces.append(piece)
                    total += count
            offsets[i + 1] = offsets[i] + total
        return offsets, np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def _request_columns(
        self, sent: dict[str, tuple[int, str, str]], offsets: NDArray[np.int64], times: NDArray[np.int64]
    ) -> dict[str, Column]:
        never = _Ended((NEVER,) * len(_REQUEST_FIELDS), "", ())
        ended = [self._ended.get(rid, never) for rid in sent]
        table = np.array([request.figures for request in ended], dtype=np.int64).reshape(-1, len(_REQUEST_FIELDS))
        arrival = np.array([when for when, _, _ in sent.values()], dtype=np.int64)
        columns: dict[str, Any] = {name: table[:, i].copy() for i, name in enumerate(_REQUEST_FIELDS)}
        columns["id"] = list(sent)
        columns["session"] = [session for _, session, _ in sent.values()]
        columns["tenant"] = [tenant for _, _, tenant in sent.values()]
        columns["arrival_ns"] = arrival
        columns["finish_reason"] = [request.finish_reason for request in ended]
        columns["replica"] = np.full(len(table), self.replica, dtype=np.int64)
        last = np.full(len(table), NEVER, dtype=np.int64)
        some = offsets[1:] > offsets[:-1]
        last[some] = times[offsets[1:][some] - 1]
        columns["last_token_ns"] = last
        scheduled, finish = columns["first_scheduled_ns"], columns["finish_ns"]
        waited_until = np.where(scheduled == NEVER, finish, scheduled)
        columns["queue_ns"] = np.where(finish == NEVER, NEVER, waited_until - arrival)
        return {name: columns[name] for name in REQUEST_COLUMNS}
