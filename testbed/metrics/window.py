"""The measure window: which part of a run the aggregates speak of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from testbed.metrics.columns import NS_PER_S, Bools, Ints, ints
from testbed.metrics.records import Records
from testbed.scenario.errors import InputError


class EmptyWindow(InputError):
    """The measure window holds no time: a run has records, but no figures."""


class Window(NamedTuple):
    """Times from ``start_ns`` up to, not including, ``end_ns``; the end of a drained run belongs to it."""

    start_ns: int
    end_ns: int

    @property
    def duration_ns(self) -> int:
        """Length of the window."""
        return self.end_ns - self.start_ns

    def holds(self, times_ns: Ints) -> Bools:
        """Which times lie in the window; its last instant counts, so that a drained run holds its last finish."""
        return (times_ns >= self.start_ns) & (times_ns <= self.end_ns)


def run_end_ns(records: Records) -> int:
    """When the last request ended; for a run that was cut short, the last time stamp in its records."""
    finish = ints(records.requests, "finish_ns")
    if len(finish) and finish.min() >= 0:
        return int(finish.max())
    stamps = [finish, ints(records.requests, "arrival_ns"), ints(records.steps, "end_ns"), records.token_times_ns]
    return int(max((column.max() for column in stamps if len(column)), default=0))


def measure_window(records: Records, measure: Mapping[str, Any] | None = None) -> Window:
    """The window that a scenario's ``measure`` describes.

    ``skip_s`` seconds at the start are left out; it ends when the run has ``drained`` (the last finish), at the
    ``last_arrival``, or at ``{seconds: s}`` on the run's clock, but not after the run itself.

    Raises:
        EmptyWindow: the window holds no time although the run has requests.
    """
    measure = measure or {}
    start = round(float(measure.get("skip_s", 0.0)) * NS_PER_S)
    until = measure.get("until", "drained")
    end = run_end_ns(records)
    if until == "last_arrival":
        arrivals = ints(records.requests, "arrival_ns")
        end = int(arrivals.max()) if len(arrivals) else 0
    elif isinstance(until, Mapping):
        end = min(end, round(float(until["seconds"]) * NS_PER_S))
    elif until != "drained":
        raise InputError(
            f"unknown end of the measure window: {until!r}",
            where="measure.until",
            remedy="Write drained, last_arrival or {seconds: NUMBER}.",
        )
    if end <= start and len(ints(records.requests, "arrival_ns")) and run_end_ns(records) > 0:
        raise EmptyWindow(
            f"the measure window is empty: it starts at {start / NS_PER_S:g} s and ends at {end / NS_PER_S:g} s",
            where="measure",
            remedy=f"The run ended at {run_end_ns(records) / NS_PER_S:g} s: lower skip_s, or measure until drained.",
        )
    return Window(start, max(end, start))


def unfinished_until(finish_ns: Ints, end_ns: int) -> Ints:
    """Finish times with those that never came replaced by ``end_ns``: int64 [requests]."""
    return np.where(finish_ns < 0, end_ns, finish_ns)
