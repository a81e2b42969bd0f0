"""The figures of a run, under the names that users of ``vllm bench serve`` and ``sglang.bench_serving`` parse.

Two rules make a window of a run honest. Latencies are of the requests that *arrived* in the window, whenever they
ended; a cut-off at the end would keep the fast ones. Rates count what *happened* in the window: requests that ended
in it, tokens sent in it. For a whole drained run both are everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from testbed.metrics.bootstrap import Resampler, interval
from testbed.metrics.columns import (
    NS_PER_MS,
    NS_PER_S,
    Bools,
    Floats,
    Ints,
    completed,
    failed,
    floats,
    ints,
    request_latencies,
    seen_inside,
    token_gaps,
    token_owner,
)
from testbed.metrics.laws import HOST_LANE, TIME_PARTS, Cause, device_time, presence, stays
from testbed.metrics.levels import levels
from testbed.metrics.loops import capacities, is_front, loops_of
from testbed.metrics.records import Records
from testbed.metrics.window import Window
from testbed.ports import Stage
from testbed.request import NEVER
from testbed.scenario.errors import InputError

LATENCIES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token",
    "itl": "Inter-Token Latency",
    "e2el": "End-to-End Latency",
}
"""Latency metrics by the short name in keys, in the order of reports."""

NAN = float("nan")


class Sample(NamedTuple):
    """Values of one metric over the requests of a window."""

    values_ms: Floats
    """float64 [n], no NaN."""
    owner: Ints
    """int64 [n]: the request's position among those of the window."""
    undefined: int
    """Completed requests without a value (TPOT of a single token)."""


class SloMark(NamedTuple):
    """One limit of the scenario's ``slo`` and what the run did."""

    key: str
    """Key of the aggregate, such as ``p99_ttft_ms``."""
    limit: float
    value: float
    met: bool
    """False also where the run has no value."""


def latency_samples(records: Records, window: Window) -> dict[str, Sample]:
    """Latency values of the requests that arrived in ``window`` and completed, by short name."""
    cohort = window.holds(ints(records.requests, "arrival_ns"))
    position = np.cumsum(cohort) - 1
    finished = int((cohort & completed(records)).sum())
    samples = {}
    for name, values in request_latencies(records).items():
        known = cohort & ~np.isnan(values)
        samples[name] = Sample(values[known], position[known], finished - int(known.sum()))
    gaps, owner = token_gaps(records)
    measured = (cohort & completed(records))[owner] if len(owner) else np.zeros(0, np.bool_)
    if not measured.all():
        gaps, owner = gaps[measured], owner[measured]
    samples["itl"] = Sample(gaps / NS_PER_MS, position[owner], samples["tpot"].undefined)
    return {name: samples[name] for name in LATENCIES}


def statistic(values: Floats, name: str) -> float:
    """``mean``, ``median``, ``std``, ``max`` or ``pN`` (linear interpolation) of the values; NaN when there are none.

    Raises:
        InputError: ``name`` is none of these.
    """
    functions: dict[str, Callable[[Floats], Any]] = {
        "mean": np.mean,
        "median": np.median,
        "std": np.std,
        "max": np.max,
    }
    if name not in functions and not (name.startswith("p") and name[1:].replace(".", "", 1).isdigit()):
        raise InputError(f"unknown statistic {name!r}", remedy="Write mean, median, std, max or a percentile like p99.")
    if not len(values):
        return NAN
    return float(functions[name](values)) if name in functions else float(np.percentile(values, float(name[1:])))


def slo_limits(slo: Mapping[str, Any] | None) -> list[tuple[str, str, float]]:
    """(latency short name, statistic, limit in ms) for every limit of a scenario's ``slo``.

    Raises:
        InputError: a latency that is not measured.
    """
    limits = []
    for field, by_statistic in (slo or {}).items():
        name = field.removesuffix("_ms")
        if name not in LATENCIES:
            allowed = ", ".join(f"{known}_ms" for known in LATENCIES)
            raise InputError(f"unknown latency {field!r}", where=f"slo.{field}", remedy=f"Allowed: {allowed}.")
        limits += [(name, which, float(limit)) for which, limit in (by_statistic or {}).items()]
    return limits


def slo_marks(samples: Mapping[str, Sample], slo: Mapping[str, Any] | None) -> list[SloMark]:
    """Each limit beside the value of the run."""
    marks = []
    for name, which, limit in slo_limits(slo):
        value = statistic(samples[name].values_ms, which)
        marks.append(SloMark(f"{which}_{name}_ms", limit, value, value <= limit))
    return marks


def good_requests(records: Records, slo: Mapping[str, Any] | None) -> Bools:
    """Requests that completed and meet every limit themselves: bool [requests].

    A request's TTFT, TPOT and E2E latency are held against the limits of whatever statistic; its ITL counts as its
    longest gap. A latency that is undefined for a request does not speak against it.
    """
    good = completed(records)
    values = request_latencies(records)
    for name, _, limit in slo_limits(slo):
        if name == "itl":
            gaps, owner = token_gaps(records)
            good[owner[gaps > limit * NS_PER_MS]] = False
        else:
            good &= ~(values[name] > limit)
    return good


def aggregates(
    records: Records,
    meta: Mapping[str, Any],
    window: Window,
    percentiles: Sequence[float],
    slo: Mapping[str, Any] | None,
) -> dict[str, float]:
    """Every figure of the window by its key; NaN where a figure is undefined or not known."""
    samples = latency_samples(records, window)
    outside = {**_rates(records, window, slo), **_latencies(samples, percentiles), **_send_delays(records, window)}
    inside = _request_times(records, window) | _device(records, meta, window) | _memory(records, meta, window)
    inside |= _loop(records, meta, window)
    return outside | (inside if seen_inside(records) else dict.fromkeys(inside, NAN))


def _rates(records: Records, window: Window, slo: Mapping[str, Any] | None) -> dict[str, float]:
    table = records.requests
    seconds = window.duration_ns / NS_PER_S
    done, ended = completed(records), window.holds(ints(table, "finish_ns"))
    prompt = ints(table, "prompt_tokens")
    input_tokens = int(prompt[done & ended].sum())
    sent = records.token_times_ns[window.holds(records.token_times_ns) & ~failed(records)[token_owner(records)]]
    good = int((good_requests(records, slo) & ended).sum())
    cohort = window.holds(ints(table, "arrival_ns"))
    begin, finish = stays(records)["system"]
    times, present = presence(begin, finish)
    peak = present[window.holds(times)].max(initial=0)
    inside = np.clip(finish, *window) - np.clip(begin, *window)
    cached = ints(table, "cached_tokens")
    known = cohort & done & (cached >= 0)
    found: dict[str, float] = {
        "duration": seconds,
        "requests": int(cohort.sum()),
        "completed": int((done & ended).sum()),
        "failed": int((failed(records) & ended).sum()),
        "total_input_tokens": input_tokens,
        "total_output_tokens": len(sent),
    }
    rates = {
        "request_throughput": found["completed"],
        "request_goodput": good if slo_limits(slo) else NAN,
        "input_throughput": input_tokens,
        "output_throughput": len(sent),
        "total_token_throughput": input_tokens + len(sent),
        "concurrency": float(inside.sum()) / NS_PER_S,
    }
    found |= {name: amount / seconds if seconds else NAN for name, amount in rates.items()}
    attained = (good_requests(records, slo) & cohort).sum() / max(cohort.sum(), 1) if slo_limits(slo) else NAN
    return found | {
        "slo_attainment": float(attained),
        "max_concurrent_requests": int(peak),
        "max_output_tokens_per_s": int(np.bincount((sent - window.start_ns) // int(NS_PER_S)).max())
        if len(sent)
        else 0,
        "cache_hit_rate": float(cached[known].sum() / prompt[known].sum()) if prompt[known].any() else NAN,
    }


def _latencies(samples: Mapping[str, Sample], percentiles: Sequence[float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, sample in samples.items():
        for which in ("mean", "median", "std"):
            found[f"{which}_{name}_ms"] = statistic(sample.values_ms, which)
        ranks = np.percentile(sample.values_ms, percentiles) if len(sample.values_ms) else [NAN] * len(percentiles)
        for percentile, value in zip(percentiles, ranks, strict=True):
            found[f"p{percentile:g}_{name}_ms"] = float(value)
        found[f"max_{name}_ms"] = statistic(sample.values_ms, "max")
    return found | {"undefined_tpot": samples["tpot"].undefined}


def _send_delays(records: Records, window: Window) -> dict[str, float]:
    """How late a client sent what was due: NaN where the schedule itself arrived."""
    table = records.requests
    arrival = ints(table, "arrival_ns")
    sent = ints(table, "sent_ns") if "sent_ns" in table else np.full(len(arrival), NEVER)
    delays = (sent - arrival)[window.holds(arrival) & (sent != NEVER)] / NS_PER_MS
    return {f"{which}_send_delay_ms": statistic(delays, which) for which in ("mean", "p99", "max")}


def _request_times(records: Records, window: Window) -> dict[str, float]:
    chosen = window.holds(ints(records.requests, "arrival_ns")) & completed(records)
    return {
        f"mean_{part.removesuffix('_ns')}_ms": statistic(ints(records.requests, part)[chosen] / NS_PER_MS, "mean")
        for part in TIME_PARTS
    } | {"retractions": int(ints(records.requests, "retractions")[chosen].sum())}


def _device(records: Records, meta: Mapping[str, Any], window: Window) -> dict[str, float]:
    devices = [device_time(records, window, loop) for loop in loops_of(records, meta)]
    available = window.duration_ns * len(devices)
    share = {
        cause: 100 * sum(device.total_ns(cause) for device in devices) / available if available else NAN
        for cause in Cause
    }
    steps = _in_window(records, window)

    def use(column: str, peak: str) -> float:
        done, limit = floats(records.steps, column)[steps].sum(), float(meta.get(peak) or 0)
        known = limit and available and done > 0
        return float(100 * done / (limit * available / NS_PER_S)) if known else NAN

    return {
        "device_busy_percent": share[Cause.BUSY],
        "bubble_percent": share[Cause.HOST] + share[Cause.TRANSFER],
        "bubble_host_percent": share[Cause.HOST],
        "bubble_transfer_percent": share[Cause.TRANSFER],
        "bubble_no_work_percent": share[Cause.NO_WORK],
        "mfu_percent": use("flops", "peak_flops"),
        "bandwidth_percent": use("bytes", "peak_bytes_per_s"),
    }


def _memory(records: Records, meta: Mapping[str, Any], window: Window) -> dict[str, float]:
    steps, loops = _in_window(records, window), loops_of(records, meta)
    capacity = capacities(records, meta)[steps]
    free = floats(records.steps, "free_tokens")[steps]
    evictable = floats(records.steps, "evictable_tokens")[steps]
    owned = 100 * (capacity - free - evictable) / capacity
    states = [levels(records, loop) for loop in loops]
    available = sum(loop.kv_tokens for loop in loops) * window.duration_ns
    evicted = ints(records.steps, "evicted_tokens")[steps & is_front(records, meta)]

    def mean(column: str) -> float:
        area = sum(float((state.values[column] * state.held_ns(*window)).sum()) for state in states)
        return 100 * area / available if len(owned) and available else NAN

    return {
        "kv_tokens": int(loops[0].kv_tokens) or NAN,
        "kv_use_mean_percent": mean("owned_tokens"),
        "kv_use_peak_percent": float(owned.max()) if len(owned) else NAN,
        "kv_cached_mean_percent": mean("evictable_tokens"),
        "evicted_tokens": int(evicted.sum()),
    }


def _loop(records: Records, meta: Mapping[str, Any], window: Window) -> dict[str, float]:
    chosen = _in_window(records, window)
    steps = {name: ints(records.steps, name)[chosen] for name in ("rows", "extra_rows", "new_tokens", "decode_rows")}
    host = ints(records.spans, "lane") == HOST_LANE
    host &= window.holds(ints(records.spans, "begin_ns"))
    took = (ints(records.spans, "end_ns") - ints(records.spans, "begin_ns"))[host]
    by_stage = np.bincount(ints(records.spans, "name")[host], weights=took, minlength=len(Stage))
    number = int(chosen.sum())
    working = by_stage.sum() - by_stage[Stage.WAIT]
    available = window.duration_ns * len(loops_of(records, meta))
    found = {
        "steps": number,
        "mean_batch_size": float(steps["rows"].mean()) if number else NAN,
        "mean_step_tokens": float((steps["new_tokens"] + steps["decode_rows"]).mean()) if number else NAN,
        "extra_steps": int(((steps["extra_rows"] > 0) & (steps["extra_rows"] == steps["rows"])).sum()),
        "extra_rows": int(steps["extra_rows"].sum()),
        "host_busy_percent": float(100 * working / available) if available and len(took) else NAN,
    }
    for stage in Stage:
        mean = by_stage[stage] / number / 1e3 if number and len(took) else NAN
        found[f"host_{stage.name.lower()}_us_per_step"] = float(mean)
    return found


def _in_window(records: Records, window: Window) -> Bools:
    return window.holds(ints(records.steps, "start_ns"))


def resampled(
    samples: Mapping[str, Sample], requests: int, percentiles: Sequence[float], seed: int
) -> dict[str, Floats]:
    """Bootstrap distribution of the mean and percentiles of each latency, by aggregate key: float64 [resamples]."""
    resampler = Resampler(requests, seed)
    return {
        f"{which}_{name}_ms": values
        for name, sample in samples.items()
        for which, values in resampler.statistics(sample.values_ms, sample.owner, percentiles).items()
    }


def intervals(distributions: Mapping[str, Floats], level: float) -> dict[str, tuple[float, float]]:
    """The central interval of each distribution, by key."""
    return {key: interval(values, level) for key, values in distributions.items()}
