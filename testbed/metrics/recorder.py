"""Collects a run's records while it runs: rows of integers into flat arrays, nothing computed that can wait."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from testbed.batch import Batch, StepResult
from testbed.metrics.journal import Journal
from testbed.metrics.laws import DEVICE_LANE, HOST_LANE, LINK_LANE, merged
from testbed.metrics.records import REQUEST_COLUMNS, Column, Records
from testbed.request import ADVANCES, NEVER, Request

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
NO_TIMES = np.empty(0, np.int64)


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
        """``replica``: the loop's number in its deployment."""
        self.replica = replica
        self.journal = Journal()
        """What entered the scheduler."""
        self.advance_times = array("q")
        """When the tokens of decode step k were sent: element k - 1 (steps are counted as RunningBatch.advance)."""
        self.keeps_requests = True
        """False on a pipeline's stages behind the first, which tells the users and keeps what there is to say."""
        self._later_times: list[array[int]] = []
        """The same of micro-batches 1, 2, ..."""
        self.counters: dict[str, int] = {}
        self._steps = array("q")
        self._ratios = array("d")
        self._spans = array("q")
        self.span = self._spans.extend
        """``span((stage, step, begin_ns, end_ns))``: a host span (the array's own method: it is called often)."""
        self._transfers: list[tuple[int, int]] = []
        self._ended: dict[str, _Ended] = {}

    def count(self, name: str, by: int = 1) -> None:
        """Add to a whole-run counter."""
        self.counters[name] = self.counters.get(name, 0) + by

    def timeline(self, micro_batch: int) -> array[int]:
        """Where the times of a micro-batch's decode steps are kept: element k - 1 is that of its step k."""
        while len(self._later_times) < micro_batch:
            self._later_times.append(array("q"))
        return self._later_times[micro_batch - 1] if micro_batch else self.advance_times

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

    def received(self, begin_ns: int, end_ns: int) -> None:
        """KV has been on its way to this loop's device. Of transfers that overlap, one span is kept."""
        self._transfers.append((begin_ns, end_ns))

    def ended(self, request: Request, outputs: int, sent_ns: int) -> None:
        """A request's end was sent. Only figures are kept: the request and its tokens can go."""
        if not self.keeps_requests:
            return
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
            first - scheduled - early - request.transfer_ns,
            sent_ns - first - (request.retracted_ns - early),
            request.retracted_ns,
            request.transfer_ns,
        )
        self._ended[request.rid] = _Ended(figures, str(request.finish_reason), tuple(request.segments))

    # -- columns --------------------------------------------------------------------------------------------------

    def records(self, sent: dict[str, tuple[int, str, str]], decisions: bytes) -> Records:
        """The columns. ``sent``: (arrival_ns, session, tenant) by request id, in order of arrival."""
        return records_of([self], sent, decisions)

    def _step_columns(self) -> dict[str, Any]:
        table = np.frombuffer(self._steps, dtype=np.int64).reshape(-1, len(_STEP_FIELDS))
        columns: dict[str, Any] = {name: table[:, i].copy() for i, name in enumerate(_STEP_FIELDS)}
        columns["gpu_ns"] = columns["end_ns"] - columns["start_ns"]
        columns["new_token_ratio"] = np.array(self._ratios, dtype=np.float64)
        columns["replica"] = np.full(len(table), self.replica, dtype=np.int64)
        return columns

    def _span_columns(self, steps: dict[str, Any]) -> dict[str, Column]:
        """Host spans as they happened, then the device's, one a step, then when keys and values came from elsewhere."""
        table = np.frombuffer(self._spans, dtype=np.int64).reshape(-1, len(_SPAN_FIELDS))
        device = (steps["mode"], steps["step"], steps["start_ns"], steps["end_ns"])
        begin, end = merged(*np.array(self._transfers, dtype=np.int64).reshape(-1, 2).T)
        links = (np.zeros(len(begin), dtype=np.int64), np.full(len(begin), NEVER, dtype=np.int64), begin, end)
        columns: dict[str, Column] = {
            name: np.concatenate([table[:, i], device[i], links[i]]) for i, name in enumerate(_SPAN_FIELDS)
        }
        lane = np.repeat([HOST_LANE, DEVICE_LANE, LINK_LANE], [len(table), len(device[0]), len(begin)])
        return {"lane": lane, **columns, "replica": np.full(len(lane), self.replica, dtype=np.int64)}

    def _pieces(self, rid: str) -> list[NDArray[np.int64]]:
        """When an ended request sent its tokens: pieces of timelines, and single prefill tokens."""
        return [self._sent_at(first, count) for first, count in self._ended[rid].segments]

    def _sent_at(self, first: int, count: int) -> NDArray[np.int64]:
        """The times of one of ``Request.segments``: int64 [count]."""
        if first < 0:
            return np.array([-1 - first])
        micro_batch, step = divmod(first, ADVANCES)
        times = self.timeline(micro_batch)
        return np.frombuffer(times, dtype=np.int64)[step : step + count] if times else NO_TIMES


def records_of(recorders: Sequence[Recorder], sent: dict[str, tuple[int, str, str]], decisions: bytes) -> Records:
    """The columns of a run of several loops, whose requests ended each at one of them, or in two halves. ``sent``: as
    in ``Recorder.records``."""
    steps = [recorder._step_columns() for recorder in recorders]
    spans = [recorder._span_columns(table) for recorder, table in zip(recorders, steps, strict=True)]
    owners: dict[str, Recorder] = {}
    for recorder in recorders:
        for rid, ended in recorder._ended.items():
            if rid not in owners or not _answers(owners[rid]._ended[rid], ended):
                owners[rid] = recorder
    offsets, times = _token_times(owners, sent)
    counters: dict[str, int] = {}
    for recorder in recorders:
        for name, count in recorder.counters.items() if recorder.keeps_requests else ():
            counters[name] = counters.get(name, 0) + count
    return Records(
        requests=_request_columns(owners, sent, offsets, times),
        steps=_stacked(steps),
        spans=_stacked(spans),
        token_offsets=offsets,
        token_times_ns=times,
        decisions=decisions,
        journal=recorders[0].journal if len(recorders) == 1 else None,
        counters=dict(sorted(counters.items())),
    )


def _answers(half: _Ended, later: _Ended) -> bool:
    """Whether the end at a prefill engine was the answer: it failed there without a token, no later than at the decode
    engine, which was told to give up."""
    at = _REQUEST_FIELDS.index
    failed = half.finish_reason in ("error", "abort") and not half.figures[at("output_tokens")]
    return failed and half.figures[at("finish_ns")] <= later.figures[at("finish_ns")]


def _stacked(tables: Sequence[dict[str, Any]]) -> dict[str, Column]:
    if len(tables) == 1:
        return tables[0]
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _token_times(owners: Mapping[str, Recorder], sent: Iterable[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    pieces: list[NDArray[np.int64]] = []
    offsets = [0]
    for rid in sent:
        mine = owners[rid]._pieces(rid) if rid in owners else []
        pieces += mine
        offsets.append(offsets[-1] + sum(map(len, mine)))
    return np.array(offsets, dtype=np.int64), np.concatenate(pieces) if pieces else NO_TIMES


def _request_columns(
    owners: Mapping[str, Recorder],
    sent: dict[str, tuple[int, str, str]],
    offsets: NDArray[np.int64],
    times: NDArray[np.int64],
) -> dict[str, Column]:
    never = _Ended((NEVER,) * len(_REQUEST_FIELDS), "", ())
    ended = [owners[rid]._ended[rid] if rid in owners else never for rid in sent]
    table = np.array([request.figures for request in ended], dtype=np.int64).reshape(-1, len(_REQUEST_FIELDS))
    arrival = np.array([when for when, _, _ in sent.values()], dtype=np.int64)
    columns: dict[str, Any] = {name: table[:, i].copy() for i, name in enumerate(_REQUEST_FIELDS)}
    columns["id"] = list(sent)
    columns["session"] = [session for _, session, _ in sent.values()]
    columns["tenant"] = [tenant for _, _, tenant in sent.values()]
    columns["arrival_ns"] = arrival
    columns["finish_reason"] = [request.finish_reason for request in ended]
    columns["replica"] = np.array([owners[rid].replica if rid in owners else 0 for rid in sent], dtype=np.int64)
    last = np.full(len(table), NEVER, dtype=np.int64)
    some = offsets[1:] > offsets[:-1]
    last[some] = times[offsets[1:][some] - 1]
    columns["last_token_ns"] = last
    scheduled, finish = columns["first_scheduled_ns"], columns["finish_ns"]
    waited_until = np.where(scheduled == NEVER, finish, scheduled)
    columns["queue_ns"] = np.where(finish == NEVER, NEVER, waited_until - arrival)
    return {name: columns[name] for name in REQUEST_COLUMNS}
