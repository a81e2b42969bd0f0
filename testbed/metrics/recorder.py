"""Collects a run's records while it runs: rows of integers into flat arrays, nothing computed that can wait."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.batch import Batch, StepResult
from testbed.metrics.records import Column, Records
from testbed.request import NEVER, Request

_STEP_FIELDS = ["step", "mode", "launch_ns", "start_ns", "end_ns", "rows", "prefill_rows", "new_tokens", "prefix_tokens", "decode_rows", "extra_rows", "context_tokens", "evicted_tokens", "retracted", "graph", "running", "waiting", "free_tokens", "evictable_tokens"]
_SPAN_FIELDS = ("name", "step", "begin_ns", "end_ns")
_REQUEST_FIELDS = ["priority", "queued_ns", "first_scheduled_ns", "first_token_ns", "last_token_ns", "finish_ns", "prompt_tokens", "cached_tokens", "output_tokens", "max_new_tokens", "retractions", "queue_ns", "prefill_ns", "decode_ns", "retracted_ns", "transfer_ns"]
DEVICE_LANE = 1


class Recorder:
    """The records of one scheduler and its loop."""

    def __init__(self, replica: int = 0) -> None:
        self.replica = replica
        self.advance_times = array("q")
        """When the tokens of decode step k were sent: element k - 1 (steps are counted as RunningBatch.advance)."""
        self.counters: dict[str, int] = {}
        self._steps = array("q")
        self._ratios = array("d")
        self._spans = array("q")
        self.span = self._spans.extend
        """``span((stage, step, begin_ns, end_ns))``: a host span (the array's own method: it is called often)."""
        self._ended: dict[str, tuple[Request, int, int]] = {}

    def count(self, name: str, by: int = 1) -> None:
        """Add to a whole-run counter."""
        self.counters[name] = self.counters.get(name, 0) + by

    def step(self, batch: Batch, result: StepResult) -> None:
        """A launched batch whose result has been processed; called in launch order."""
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

    def ended(self, request: Request, outputs: int, sent_ns: int) -> None:
        """A request's end was sent."""
        self._ended[request.rid] = (request, outputs, sent_ns)

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
                for first, count in self._ended[rid][0].segments:
                    piece = advances[first : first + count] if first >= 0 else np.array([-1 - first])
                    pieces.append(piece)
                    total += count
            offsets[i + 1] = offsets[i] + total
        return offsets, np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def _request_columns(
        self, sent: dict[str, tuple[int, str, str]], offsets: NDArray[np.int64], times: NDArray[np.int64]
    ) -> dict[str, Column]:
        rows: list[tuple[int, ...]] = []
        reasons: list[str] = []
        for i, (rid, (arrival, _, _)) in enumerate(sent.items()):
            ended = self._ended.get(rid)
            if ended is None:
                rows.append((NEVER,) * len(_REQUEST_FIELDS))
                reasons.append("")
                continue
            last = int(times[offsets[i + 1] - 1]) if offsets[i + 1] > offsets[i] else NEVER
            rows.append(_request_row(*ended, arrival, last))
            reasons.append(str(ended[0].finish_reason))
        table = np.array(rows, dtype=np.int64).reshape(-1, len(_REQUEST_FIELDS))
        columns: dict[str, Column] = {
            "id": list(sent),
            "session": [session for _, session, _ in sent.values()],
            "tenant": [tenant for _, _, tenant in sent.values()],
            "arrival_ns": np.array([arrival for arrival, _, _ in sent.values()], dtype=np.int64),
            "finish_reason": reasons,
        }
        columns |= {name: table[:, i].copy() for i, name in enumerate(_REQUEST_FIELDS)}
        columns["replica"] = np.full(len(table), self.replica, dtype=np.int64)
        return columns


def _request_row(request: Request, outputs: int, sent_ns: int, arrival_ns: int, last_token_ns: int) -> tuple[int, ...]:
    """The values of _REQUEST_FIELDS. The five durations sum to finish - arrival exactly."""
    scheduled = request.first_scheduled_ns if request.first_scheduled_ns != NEVER else sent_ns
    first = request.first_token_ns if request.first_token_ns != NEVER else sent_ns
    early = request.retracted_before_first_ns
    return (
        NEVER if request.priority is None else request.priority,
        request.queued_ns,
        request.first_scheduled_ns,
        request.first_token_ns,
        last_token_ns,
        sent_ns,
        request.prompt_tokens,
        max(request.cached_tokens, 0),
        outputs,
        request.max_new_tokens,
        request.retractions,
        scheduled - arrival_ns,
        first - scheduled - early,
        sent_ns - first - (request.retracted_ns - early),
        request.retracted_ns,
        0,
    )
