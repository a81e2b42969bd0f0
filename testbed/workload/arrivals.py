"""When requests come: arrival times in ns, made one by one.

Every random process is a renewal process in *operational time*, the integral of the rate: gaps of mean 1 are drawn
and mapped through phases of constant rate. One phase without end gives Poisson, gamma and Weibull arrivals, phases of
two rates give bursts, a phase a minute gives a fitted day.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import count, cycle, repeat

from testbed.scenario.workload import (
    AllAtOnce,
    BurstArrivals,
    ConstantArrivals,
    FittedArrivals,
    GammaArrivals,
    PoissonArrivals,
    WeibullArrivals,
)
from testbed.workload.draw import Quantiles, Uniforms, exponential, gamma, values, weibull
from testbed.workload.fitted import fitted_table
from testbed.workload.traces.rows import SECOND_NS

TimedArrivals = (
    ConstantArrivals | PoissonArrivals | GammaArrivals | WeibullArrivals | BurstArrivals | AllAtOnce | FittedArrivals
)
"""Arrivals that need neither the end of other requests nor a file."""

MINUTE_S = 60.0


def arrival_times(law: TimedArrivals, seed: int, rate_scale: float) -> Iterator[int]:
    """Endless arrival times in ns, never decreasing; ``rate_scale`` makes them come that much faster."""
    if isinstance(law, AllAtOnce):
        return repeat(round(law.at_s * SECOND_NS))
    if isinstance(law, ConstantArrivals):
        rate = law.rate_per_s * rate_scale
        return (round(index * SECOND_NS / rate) for index in count())
    gaps = values(_unit_gaps(law), Uniforms(seed, "arrivals"))
    if isinstance(law, PoissonArrivals | GammaArrivals | WeibullArrivals):
        return _at_one_rate(gaps, law.rate_per_s * rate_scale)
    return _through_phases(gaps, _phases(law, seed), rate_scale)


def _unit_gaps(law: TimedArrivals) -> Quantiles:
    """The law of the gaps in operational time, of mean 1."""
    if isinstance(law, GammaArrivals):
        return partial(gamma, 1.0, law.cv)
    if isinstance(law, WeibullArrivals):
        return partial(weibull, 1.0, law.cv)
    if isinstance(law, FittedArrivals):
        return partial(gamma, 1.0, fitted_table(law.name).gap_cv)
    return partial(exponential, 1.0)


def _phases(law: BurstArrivals | FittedArrivals, seed: int) -> Iterator[tuple[float, float]]:
    """Endless (seconds, rate per second)."""
    if isinstance(law, FittedArrivals):
        return cycle([(MINUTE_S, rate) for rate in fitted_table(law.name).minute_rates_per_s])
    on_off = cycle([(law.on_s, law.on_rate_per_s), (law.off_s, law.off_rate_per_s)])
    if law.durations == "fixed":
        return on_off
    lengths = values(partial(exponential, 1.0), Uniforms(seed, "phases"))
    return ((length * mean_s, rate) for length, (mean_s, rate) in zip(lengths, on_off, strict=False))


def _at_one_rate(gaps: Iterator[float], rate_per_s: float) -> Iterator[int]:
    # Whole gaps are summed, not seconds: a long run loses no precision.
    now_ns, gap_ns = 0, SECOND_NS / rate_per_s
    for gap in gaps:
        now_ns += round(gap * gap_ns)
        yield now_ns


def _through_phases(gaps: Iterator[float], phases: Iterator[tuple[float, float]], scale: float) -> Iterator[int]:
    """Arrival i is where the integral of the rate reaches the sum of the first i gaps."""
    phase_ns, left, rate_per_ns = 0, 0, 0.0
    now_ns = 0.0  # within the phase
    for gap in gaps:
        while gap > (room := (left - now_ns) * rate_per_ns) or not rate_per_ns:
            gap -= room
            phase_ns += left
            seconds, rate_per_s = next(phases)
            # Only the clock is scaled, so that a phase is passed through that much faster too.
            left, now_ns = round(seconds / scale * SECOND_NS), 0.0
            rate_per_ns = rate_per_s * scale / SECOND_NS
        now_ns += gap / rate_per_ns
        yield phase_ns + round(now_ns)
