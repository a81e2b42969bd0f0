"""Runs side by side: every figure, its difference to a baseline, and whether that difference is more than noise.

Runs of the same requests (same ids, same arrivals) are *paired*: their bootstraps draw the same blocks of requests, so
what the workload does to both cancels. Other runs are compared with independent draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from testbed.metrics.aggregate import LATENCIES
from testbed.metrics.bootstrap import interval
from testbed.metrics.columns import ints
from testbed.metrics.run import Run
from testbed.scenario.errors import InputError

Interval = tuple[float, float]

_RATES = ("request_throughput", "request_goodput", "output_throughput")
_SHARES = (
    "mean_queue_ms",
    "device_busy_percent",
    "bubble_host_percent",
    "bubble_transfer_percent",
    "mfu_percent",
    "kv_use_mean_percent",
    "cache_hit_rate",
    "mean_batch_size",
    "extra_rows",
    "retractions",
)


def headline(percentiles: Sequence[float]) -> tuple[str, ...]:
    """Keys of the figures in a comparison's table, where a run has them."""
    which = ["mean", *(f"p{percentile:g}" for percentile in percentiles)]
    return (*_RATES, *(f"{one}_{name}_ms" for name in LATENCIES for one in which), *_SHARES)


def shared_percentiles(runs: Sequence[Run]) -> tuple[float, ...]:
    """The percentiles that any of the runs asks for, ascending."""
    return tuple(np.unique([percentile for run in runs for percentile in run.percentiles]).tolist())


@dataclass(frozen=True)
class Figure:
    """One figure of one run beside the baseline's."""

    run: str
    metric: str
    """Key of the aggregate."""
    value: float
    interval: Interval | None
    """95 % interval of the value; None where none is made (counts, shares, rates)."""
    difference: float
    """Value minus the baseline's value."""
    difference_interval: Interval | None
    ratio: float
    """Value over the baseline's; NaN where that is 0."""
    paired: bool
    is_baseline: bool

    @property
    def verdict(self) -> str:
        """``baseline``, ``same``, ``within noise`` (the interval holds 0), ``better``, ``worse``, ``differs``, ``-``.

        Better and worse are said only of latencies whose interval excludes 0; ``differs``: the figure has no interval;
        ``-``: one of the runs does not have the figure.
        """
        if self.is_baseline:
            return "baseline"
        if np.isnan(self.difference):
            return "-"
        if self.difference == 0:
            return "same"
        if self.difference_interval is None:
            return "differs"
        low, high = self.difference_interval
        return "within noise" if low <= 0 <= high else "better" if high < 0 else "worse"


def same_requests(one: Run, other: Run) -> bool:
    """Whether both runs had the same requests at the same times, so that their differences are paired."""
    left, right = one.records.requests, other.records.requests
    return (
        list(left["id"]) == list(right["id"])
        and np.array_equal(ints(left, "arrival_ns"), ints(right, "arrival_ns"))
        and _cohort(one) == _cohort(other)
    )


def _cohort(run: Run) -> tuple[int, int]:
    """First arrival and number of arrivals in the measure window; a later end of the run may not change it."""
    inside = np.flatnonzero(run.window().holds(ints(run.records.requests, "arrival_ns")))
    return (int(inside[0]), len(inside)) if len(inside) else (0, 0)


def differences(runs: Sequence[Run], baseline: int = 0) -> list[Figure]:
    """Every figure of every run beside the baseline's, figure by figure, runs in the order given.

    Raises:
        InputError: fewer than one run, or ``baseline`` is none of them.
    """
    if not 0 <= baseline < len(runs):
        raise InputError(f"there is no run number {baseline} to be the baseline", remedy=f"{len(runs)} runs are given.")
    base = runs[baseline]
    names = run_names(runs)
    paired = [same_requests(run, base) for run in runs]
    # Unpaired runs draw with seeds of their own: equal draws of unlike requests would feign a pairing.
    seeds = [base.seed if pair else base.seed + 1 + index for index, pair in enumerate(paired)]
    percentiles = shared_percentiles(runs)
    draws = [run.resampled(percentiles, seed) for run, seed in zip(runs, seeds, strict=True)]
    figures = [run.aggregates(percentiles=percentiles) for run in runs]
    rows = []
    for metric in figures[baseline]:
        for index, name in enumerate(names):
            drawn = metric in draws[index]
            value, before = figures[index][metric], figures[baseline][metric]
            gap = interval(draws[index][metric] - draws[baseline][metric]) if drawn else None
            own = interval(draws[index][metric]) if drawn else None
            ratio = value / before if before else float("nan")
            is_base = index == baseline
            rows.append(
                Figure(
                    name, metric, value, own, value - before, None if is_base else gap, ratio, paired[index], is_base
                )
            )
    return rows


def run_names(runs: Sequence[Run]) -> list[str]:
    """A name for each run, all different: its variant or scenario name, told apart by the fields that differ, then by
    whether it was simulated or paced, then by its loop."""
    names = [str(run.meta.get("variant") or run.name) for run in runs]
    flat = [_flatten(run.scenario) for run in runs]
    keys = list(dict.fromkeys(key for fields in flat for key in fields if key != "name"))
    telling = [key for key in keys if len(frozenset(repr(fields.get(key)) for fields in flat)) > 1]
    full = []
    for fields, name in zip(flat, names, strict=True):
        words = ", ".join(f"{key.rpartition('.')[2]}={fields.get(key)}" for key in telling)
        full.append(f"{name} ({words})" if names.count(name) > 1 and words else name)
    for key in ("label", "loop"):
        told = [str(run.meta.get(key, "")) for run in runs]
        kinds = {name: {word for other, word in zip(full, told, strict=True) if other == name} for name in full}
        full = [
            f"{name} ({word})" if word and len(kinds[name]) > 1 else name for name, word in zip(full, told, strict=True)
        ]
    return [
        f"{name} #{full[:index].count(name) + 1}" if full.count(name) > 1 else name for index, name in enumerate(full)
    ]


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
