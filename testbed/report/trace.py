"""A run as a trace for Perfetto: host threads and devices by lane, requests by lane, queues and memory as counters.

With the ``perfetto`` package the file is Perfetto's own protobuf, without it the JSON of Chrome's tracer, which the
same viewer opens. A trace is a window of a run: a slice costs 100 bytes, and nobody scrolls through a million steps.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from testbed.batch import ForwardMode
from testbed.metrics.columns import NS_PER_S, ints, seen_inside
from testbed.metrics.laws import DEVICE_LANE, HOST_LANE, LINK_LANE
from testbed.metrics.levels import levels
from testbed.metrics.loops import loops_of
from testbed.metrics.run import Run
from testbed.metrics.window import run_end_ns
from testbed.ports import Stage
from testbed.report.series import spread
from testbed.scenario.errors import InputError

DEFAULT_STEPS = 5000
"""Steps in a trace for which no window is given."""
REQUEST_LANES = 64

_LANES = {HOST_LANE: "host thread", DEVICE_LANE: "device", LINK_LANE: "transfer"}
_STEP_ARGS = ("step", "rows", "prefill_rows", "new_tokens", "prefix_tokens", "decode_rows", "extra_rows",
              "context_tokens", "retracted", "evicted_tokens", "graph")  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """Something that takes time in a lane. ``flow``: a number shared by slices that an arrow joins, 0 for none."""

    lane: str
    name: str
    begin_ns: int
    end_ns: int
    args: Mapping[str, int] = field(default_factory=dict)
    flow: int = 0


@dataclass(frozen=True)
class Count:
    """A value of a counter from a time on."""

    counter: str
    at_ns: int
    value: float


def write_trace(run: Run, path: Path | str, window: tuple[int, int] | None = None) -> Path:
    """Write the part of ``run`` in ``window`` (ns); None: as many steps from the measure window's start as are usual.

    Returns the file's path: ``path``, or, where the ``perfetto`` package is missing, that with ``.json.gz`` in place of
    its ending.

    Raises:
        InputError: the window is empty or lies outside the run.
    """
    path = Path(path)
    begin, end = default_window(run) if window is None else window
    if not 0 <= begin < end or begin > run_end_ns(run.records):
        raise InputError(
            f"the window from {begin / NS_PER_S:g} s to {end / NS_PER_S:g} s holds nothing of the run",
            where="trace window",
            remedy=f"The run lasts from 0 s to {run_end_ns(run.records) / NS_PER_S:g} s.",
        )
    slices = [*_spans(run, begin, end), *_requests(run, begin, end)]
    counts = list(_counters(run, begin, end))
    if find_spec("perfetto") is None:
        path = path.with_suffix(".json.gz")
        path.write_bytes(gzip.compress(_chrome(run, slices, counts), mtime=0))
    else:
        path.write_bytes(_perfetto(run, slices, counts))
    return path


def covered(run: Run, window: tuple[int, int] | None = None) -> tuple[int, int, int]:
    """What part of a run ``write_trace`` covers: from, until, and the run's end, in ns."""
    begin, end = default_window(run) if window is None else window
    whole = run_end_ns(run.records)
    return begin, min(end, whole), whole


def default_window(run: Run) -> tuple[int, int]:
    """The first 5,000 steps from the start of the measure window, in ns."""
    start = run.window().start_ns
    after = ints(run.records.steps, "start_ns")
    after = after[after >= start]
    end = run_end_ns(run.records) + 1
    return start, int(after[DEFAULT_STEPS]) if len(after) > DEFAULT_STEPS else max(end, start + 1)


def _spans(run: Run, begin: int, end: int) -> Iterator[Slice]:
    spans, steps = run.records.spans, run.records.steps
    args = _step_args(steps)
    names = {loop.number: loop.name for loop in loops_of(run.records, run.meta)}
    inside = np.flatnonzero((ints(spans, "begin_ns") < end) & (ints(spans, "end_ns") > begin))
    inside = inside[np.argsort(ints(spans, "begin_ns")[inside], kind="stable")]
    columns = (ints(spans, name)[inside].tolist() for name in ("lane", "name", "step", "begin_ns", "end_ns", "replica"))
    for lane, name, step, since, until, replica in zip(*columns, strict=True):
        at = (replica, step)
        where = f"{names[replica]}: {_LANES.get(lane, f'lane {lane}')}"
        flow = _flow(replica, step) if lane == DEVICE_LANE or (lane == HOST_LANE and name == Stage.LAUNCH) else 0
        known = {} if lane == LINK_LANE else {"step": step}
        own = args.get(at, known) if flow else known
        yield Slice(where, _name(lane, name), since, until, own, flow)


def _step_args(steps: Mapping[str, Any]) -> dict[tuple[int, int], dict[str, int]]:
    columns = [ints(steps, name).tolist() for name in ("replica", *_STEP_ARGS)]
    return {
        (replica, step): dict(zip(_STEP_ARGS, (step, *rest), strict=True))
        for replica, step, *rest in zip(*columns, strict=True)
    }


def _flow(replica: int, step: int) -> int:
    return (replica + 1 << 40) + step + 1


def _name(lane: int, name: int) -> str:
    known: dict[int, type[Stage] | type[ForwardMode]] = {HOST_LANE: Stage, DEVICE_LANE: ForwardMode}
    if lane not in known or name not in frozenset(map(int, known[lane])):
        return _LANES.get(lane, "span")
    return known[lane](name).name.lower()


def _requests(run: Run, begin: int, end: int) -> Iterator[Slice]:
    """Queue, prefill and decode of a sample of the requests in the window, a lane a request."""
    table = run.records.requests
    arrival, scheduled, first, finish = (
        ints(table, name) for name in ("arrival_ns", "first_scheduled_ns", "first_token_ns", "finish_ns")
    )
    last = np.where(finish < 0, end, finish)
    rows = np.flatnonzero((arrival < end) & (last > begin))
    for row in rows[spread(len(rows), REQUEST_LANES)].tolist():
        lane = f"request {table['id'][row]}"
        waiting = "to first token" if scheduled[row] < 0 <= first[row] else "queue"  # from outside they are one
        cuts = [(waiting, arrival[row]), ("prefill", scheduled[row]), ("decode", first[row])]
        happened = [(name, int(at)) for name, at in cuts if at >= 0]
        args = {
            name: int(ints(table, name)[row])
            for name in ("prompt_tokens", "cached_tokens", "output_tokens", "retractions")
        }
        for (name, since), until in zip(happened, [*(at for _, at in happened[1:]), int(last[row])], strict=True):
            if until > begin and since < end:
                yield Slice(lane, name, since, until, args)


def _counters(run: Run, begin: int, end: int) -> Iterator[Count]:
    if not seen_inside(run.records):
        return
    known = {"running": "running requests", "waiting": "waiting requests", "rows": "batch size"}
    known |= {"free_tokens": "KV free (tokens)", "evictable_tokens": "KV cached (tokens)"}
    if run.meta.get("kv_tokens"):
        known["owned_tokens"] = "KV owned (tokens)"
    for loop in loops_of(run.records, run.meta):
        state = levels(run.records, loop)
        mine = (state.since_ns >= begin) & (state.since_ns < end)
        times = state.since_ns[mine].tolist()
        for column, label in known.items():
            for at, value in zip(times, state.values[column][mine].tolist(), strict=True):
                yield Count(f"{loop.name}: {label}", at, value)


def _perfetto(run: Run, slices: list[Slice], counts: list[Count]) -> bytes:
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackEvent
    from perfetto.trace_builder.proto_builder import TraceProtoBuilder

    builder = TraceProtoBuilder()
    root = 1
    packet = builder.add_packet()
    packet.track_descriptor.uuid = root
    packet.track_descriptor.process.pid = 1
    packet.track_descriptor.process.process_name = run.name
    tracks: dict[str, int] = {}

    def track(name: str, counter: bool) -> int:
        if name not in tracks:
            tracks[name] = root + 1 + len(tracks)
            descriptor = builder.add_packet().track_descriptor
            descriptor.uuid, descriptor.parent_uuid, descriptor.name = tracks[name], root, name
            descriptor.sibling_order_rank = len(tracks)
            if counter:
                descriptor.counter.SetInParent()
        return tracks[name]

    def event(kind: int, at: int, on: int) -> Any:
        packet = builder.add_packet()
        packet.timestamp = at
        packet.trusted_packet_sequence_id = 1
        packet.track_event.type = kind
        packet.track_event.track_uuid = on
        return packet.track_event

    for part in slices:
        on = track(part.lane, counter=False)
        start = event(TrackEvent.TYPE_SLICE_BEGIN, part.begin_ns, on)
        start.name = part.name
        if part.flow:
            start.flow_ids.append(part.flow)
        for key, value in part.args.items():
            note = start.debug_annotations.add()
            note.name, note.int_value = key, value
        event(TrackEvent.TYPE_SLICE_END, part.end_ns, on)
    for count in counts:
        event(
            TrackEvent.TYPE_COUNTER, count.at_ns, track(count.counter, counter=True)
        ).double_counter_value = count.value
    return bytes(builder.serialize())


def _chrome(run: Run, slices: list[Slice], counts: list[Count]) -> bytes:
    """The same in the Trace Event Format of Chrome, times in microseconds."""
    lanes = {lane: number for number, lane in enumerate(dict.fromkeys(part.lane for part in slices), start=1)}
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": run.name}}]
    for lane, number in lanes.items():
        events.append({"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": lane}})
    for part in slices:
        place = {"pid": 1, "tid": lanes[part.lane]}
        at, took = part.begin_ns / 1e3, (part.end_ns - part.begin_ns) / 1e3
        events.append({"ph": "X", **place, "name": part.name, "ts": at, "dur": took, "args": dict(part.args)})
        if part.flow:
            arrow = {"ph": "f", "bp": "e"} if part.lane.endswith(_LANES[DEVICE_LANE]) else {"ph": "s"}
            events.append({**arrow, **place, "cat": "launch", "name": "launch", "id": part.flow, "ts": at})
    for count in counts:
        events.append(
            {"ph": "C", "pid": 1, "name": count.counter, "ts": count.at_ns / 1e3, "args": {"value": count.value}}
        )
    return json.dumps({"displayTimeUnit": "ns", "traceEvents": events}).encode()
