"""Laws that hold exactly, in integer nanoseconds: Little's law, timing closure, utilisation, idle time by cause.

Each side of a law comes from different columns, so that agreement says something about the run.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from testbed.metrics.columns import Bools, Ints, ints
from testbed.metrics.loops import ALONE, Loop, loops_of
from testbed.metrics.records import Records
from testbed.metrics.window import Window, run_end_ns, unfinished_until
from testbed.request import NEVER

HOST_LANE, DEVICE_LANE, LINK_LANE = 0, 1, 2

TIME_PARTS = ("queue_ns", "prefill_ns", "decode_ns", "retracted_ns", "transfer_ns")
"""Columns that split a request's life; they sum to finish - arrival."""


class Little(NamedTuple):
    """Both sides of Little's law over a whole run (J. D. C. Little, Operations Research 9(3), 1961)."""

    area_ns: int
    """Integral over time of the number present."""
    sojourn_ns: int
    """Sum of the times that each one was present."""
    peak: int
    """Largest number present at once."""

    @property
    def holds(self) -> bool:
        """Whether L = lambda W, that is, both sides are equal to the nanosecond."""
        return self.area_ns == self.sojourn_ns


def little(begin_ns: Ints, end_ns: Ints) -> Little:
    """Count those present at each event and integrate; beside it, the sum of sojourns. Inputs int64 [items]."""
    times, present = presence(begin_ns, end_ns)
    area = int((present[:-1] * np.diff(times)).sum()) if len(times) else 0
    return Little(area, int((end_ns - begin_ns).sum()), int(present.max(initial=0)))


def presence(begin_ns: Ints, end_ns: Ints) -> tuple[Ints, Ints]:
    """A step function: distinct event times, ascending, and the number present from each on (int64 [events])."""
    times, where = np.unique(np.concatenate([begin_ns, end_ns]), return_inverse=True)
    change = np.bincount(where[: len(begin_ns)], minlength=len(times)) - np.bincount(
        where[len(begin_ns) :], minlength=len(times)
    )
    return times, np.cumsum(change)


def stays(records: Records) -> dict[str, tuple[Ints, Ints]]:
    """When each request was in the ``system``, ``waiting`` (before its first batch) and ``running`` (since).

    Begin and end, int64 [requests each]; one that did not finish stays until the end of the run. A retracted request
    counts as running: its records tell how long it was out, not when.
    """
    table, end = records.requests, run_end_ns(records)
    arrival, scheduled = ints(table, "arrival_ns"), ints(table, "first_scheduled_ns")
    finish = unfinished_until(ints(table, "finish_ns"), end)
    started = scheduled != NEVER
    return {
        "system": (arrival, finish),
        "waiting": (arrival, np.where(started, scheduled, finish)),
        "running": (scheduled[started], finish[started]),
    }


def closure(records: Records) -> Ints:
    """What a finished request's times leave over: (finish - arrival) - sum of its parts, int64 [finished]. All 0."""
    table = records.requests
    finish = ints(table, "finish_ns")
    left = finish - ints(table, "arrival_ns") - sum(ints(table, part) for part in TIME_PARTS)
    return np.asarray(left[finish >= 0], dtype=np.int64)


class Utilisation(NamedTuple):
    """The utilisation law of one device: busy time is the sum of what its steps took, none at the same time."""

    steps: int
    service_ns: int
    """Sum of the steps' own times (``gpu_ns``)."""
    busy_ns: int
    """Measure of the time in which a step was on the device."""

    @property
    def holds(self) -> bool:
        """U = X S exactly: steps neither overlap nor lose time."""
        return self.service_ns == self.busy_ns


def utilisation(records: Records, replica: int = 0) -> Utilisation:
    """Both sides of the utilisation law for the device of ``replica``."""
    here = ints(records.steps, "replica") == replica
    begin, end = merged(ints(records.steps, "start_ns")[here], ints(records.steps, "end_ns")[here])
    return Utilisation(int(here.sum()), int(ints(records.steps, "gpu_ns")[here].sum()), int((end - begin).sum()))


def merged(begin_ns: Ints, end_ns: Ints) -> tuple[Ints, Ints]:
    """The union of intervals as disjoint ones, ascending; touching ones become one, empty ones vanish."""
    real = end_ns > begin_ns
    begin_ns, end_ns = begin_ns[real], end_ns[real]
    if not len(begin_ns):
        return begin_ns, end_ns
    order = np.argsort(begin_ns, kind="stable")
    begin_ns, reach = begin_ns[order], np.maximum.accumulate(end_ns[order])
    fresh = np.concatenate([[True], begin_ns[1:] > reach[:-1]])
    last = np.concatenate([np.flatnonzero(fresh)[1:] - 1, [len(reach) - 1]])
    return begin_ns[fresh], reach[last]


class Cause(IntEnum):
    """What a device's time went to. Everything but BUSY is idle; NO_WORK is not anybody's fault."""

    BUSY = 0
    HOST = 1
    """There is something to do, and the device waits for the host loop."""
    TRANSFER = 2
    """There is something to do and a KV transfer is under way."""
    NO_WORK = 3
    """There is nothing to do: see ``at_work``."""


class DeviceTime(NamedTuple):
    """A window of one device's time cut into pieces by cause, ascending and without gaps: int64 [pieces] each."""

    begin_ns: Ints
    end_ns: Ints
    cause: Ints

    def total_ns(self, cause: Cause) -> int:
        """Time that went to ``cause``; over all causes it sums to the window, exactly."""
        return int((self.end_ns - self.begin_ns)[self.cause == cause].sum())

    def covered_ns(self, cause: Cause, at_ns: Ints) -> Ints:
        """Time that went to ``cause`` before each of the times ``at_ns``: int64 [times]."""
        mine = self.cause == cause
        begin, end = self.begin_ns[mine], self.end_ns[mine]
        if not len(begin):
            return np.zeros(len(at_ns), np.int64)
        before = np.concatenate([[0], np.cumsum(end - begin)])
        index = np.searchsorted(begin, at_ns, side="right")
        late = np.where(index > 0, np.maximum(end[index - 1] - at_ns, 0), 0)
        return before[index] - late


def at_work(records: Records, loop: Loop) -> tuple[Ints, Ints]:
    """When there was anything to do for each request that ``loop`` serves: begin and end, int64 [served each].

    Where prefill and decode are apart, a request is the one's until its KV is on its way, and the other's from then on.
    """
    here = loop.serves(records)
    arrival, finish = (side[here] for side in stays(records)["system"])
    if loop.role == "null":
        return arrival, finish
    first, transfer = (ints(records.requests, name)[here] for name in ("first_token_ns", "transfer_ns"))
    handed_on = np.where(first == NEVER, finish, first - transfer)
    return (arrival, handed_on) if loop.role == "prefill" else (handed_on, finish)


def device_time(records: Records, window: Window, loop: Loop = ALONE) -> DeviceTime:
    """Split the window of the time of one loop's device by cause; busy + bubbles = window, to the nanosecond.

    Where a transfer is under way and there is anything to do, an idle device counts as waiting for the transfer.
    """
    steps = ints(records.steps, "replica") == loop.number
    links = (ints(records.spans, "lane") == LINK_LANE) & (ints(records.spans, "replica") == loop.number)
    busy = merged(ints(records.steps, "start_ns")[steps], ints(records.steps, "end_ns")[steps])
    live = merged(*at_work(records, loop))
    moving = merged(ints(records.spans, "begin_ns")[links], ints(records.spans, "end_ns")[links])

    cuts = np.concatenate([*busy, *live, *moving, [window.start_ns, window.end_ns]])
    cuts = np.unique(cuts[window.holds(cuts)])
    begin, end = cuts[:-1], cuts[1:]
    cause = np.full(len(begin), Cause.HOST, dtype=np.int64)
    cause[_inside(begin, moving)] = Cause.TRANSFER
    cause[~_inside(begin, live)] = Cause.NO_WORK
    cause[_inside(begin, busy)] = Cause.BUSY
    return DeviceTime(begin, end, cause)


def _inside(times_ns: Ints, intervals: tuple[Ints, Ints]) -> Bools:
    begin, end = intervals
    if not len(begin):
        return np.zeros(len(times_ns), dtype=np.bool_)
    index = np.searchsorted(begin, times_ns, side="right") - 1
    return (index >= 0) & (times_ns < end[index])


def violations(records: Records) -> list[str]:
    """Every law that the records break, in words; empty for a sound run."""
    found = []
    for place, (begin, end) in stays(records).items():
        sides = little(begin, end)
        if not sides.holds or (len(begin) and (end < begin).any()):
            found.append(f"Little's law, {place}: area {sides.area_ns} ns, sojourns {sides.sojourn_ns} ns")
    left = closure(records)
    if left.any():
        found.append(f"timing closure: {int((left != 0).sum())} requests, largest residue {int(np.abs(left).max())} ns")
    window = Window(0, run_end_ns(records))
    for loop in loops_of(records, {}):
        law = utilisation(records, loop.number)
        if not law.holds:
            found.append(f"utilisation of {loop.name}: service {law.service_ns} ns, busy {law.busy_ns} ns")
        split = device_time(records, window, loop)
        total = sum(split.total_ns(cause) for cause in Cause)
        if total != window.duration_ns:
            found.append(f"device time of {loop.name}: parts {total} ns, window {window.duration_ns} ns")
    return found
