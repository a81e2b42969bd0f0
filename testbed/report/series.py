"""Long columns made short enough to draw: time bins, and evenly spaced samples. Captions say which."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from testbed.metrics.columns import NS_PER_S, Floats, Ints
from testbed.metrics.laws import Cause, device_time
from testbed.metrics.levels import levels
from testbed.metrics.loops import loops_of
from testbed.metrics.records import Records
from testbed.metrics.run import Run
from testbed.metrics.window import Window, run_end_ns

BINS = 360
POINTS = 1500


class Bins(NamedTuple):
    """Equal time bins over a run."""

    edges_ns: Ints
    """int64 [bins + 1]."""

    @property
    def centres_s(self) -> Floats:
        """Middle of each bin in seconds."""
        return (self.edges_ns[:-1] + self.edges_ns[1:]) / 2 / NS_PER_S

    @property
    def width_s(self) -> float:
        """Width of a bin in seconds."""
        return float(self.edges_ns[-1] - self.edges_ns[0]) / NS_PER_S / len(self.edges_ns[1:])

    def bin_of(self, times_ns: Ints) -> Ints:
        """The bin of each time; times outside fall into the nearest bin."""
        return np.clip(np.searchsorted(self.edges_ns, times_ns, side="right") - 1, 0, len(self.edges_ns) - 2)

    def sums(self, times_ns: Ints, values: Floats | Ints) -> Floats:
        """Sum of the values by bin: float64 [bins]."""
        weights = np.asarray(values, dtype=np.float64)
        return np.bincount(self.bin_of(times_ns), weights=weights, minlength=len(self.edges_ns) - 1).astype(np.float64)


def time_bins(records: Records, bins: int = BINS) -> Bins:
    """Bins from time 0 to the end of the run, no narrower than 1 us."""
    end = max(run_end_ns(records), 1000)
    number = max(1, min(bins, end // 1000))
    return Bins(np.linspace(0, end, number + 1).astype(np.int64))


def held_mean(bins: Bins, since_ns: Ints, values: Floats) -> Floats:
    """Time-weighted mean by bin of a quantity that keeps each value until the next: float64 [bins].

    since_ns: int64 [n] ascending. Before the first value the quantity is 0.
    """
    if not len(since_ns):
        return np.zeros(len(bins.edges_ns) - 1)
    area = np.concatenate([[0.0], np.cumsum(values[:-1] * np.diff(since_ns))])
    index = np.searchsorted(since_ns, bins.edges_ns, side="right") - 1
    at = np.where(index >= 0, area[index] + values[index] * (bins.edges_ns - since_ns[index]), 0.0)
    return np.diff(at) / np.maximum(np.diff(bins.edges_ns), 1)


def level_mean(run: Run, bins: Bins, column: str) -> Floats:
    """Time-weighted mean by bin of a column of ``testbed.metrics.levels``, summed over engines: float64 [bins]."""
    states = [levels(run.records, loop) for loop in loops_of(run.records, run.meta) if not loop.stage]
    parts = [held_mean(bins, state.since_ns, state.values[column]) for state in states]
    return np.asarray(np.sum(parts, axis=0), dtype=np.float64)


def cause_shares(run: Run, bins: Bins) -> dict[Cause, Floats]:
    """Percent of device time by cause in each bin, over all devices: float64 [bins] each."""
    window = Window(0, run_end_ns(run.records))
    devices = [device_time(run.records, window, loop) for loop in loops_of(run.records, run.meta)]
    available = np.diff(bins.edges_ns) * len(devices)
    return {
        cause: 100 * sum(np.diff(device.covered_ns(cause, bins.edges_ns)) for device in devices) / available
        for cause in Cause
    }


def cumulative(values: Floats, points: int = 1000) -> tuple[Floats, Floats]:
    """The empirical distribution as (value, fraction at or below it), at most ``points`` long, dense in both tails."""
    ordered = np.sort(values)
    if len(ordered) > points:
        level = (1 - np.cos(np.linspace(0, np.pi, points))) / 2
        index = np.unique(np.rint(level * (len(ordered) - 1)).astype(np.int64))
    else:
        index = np.arange(len(ordered))
    return ordered[index], (index + 1) / max(len(ordered), 1)


def spread(rows: int, points: int = POINTS) -> Ints:
    """Indices of at most ``points`` rows, evenly spaced."""
    return np.arange(rows) if rows <= points else np.linspace(0, rows - 1, points).astype(np.int64)
