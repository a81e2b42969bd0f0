"""Arrival processes against their laws, at fixed seeds."""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter
from scipy import stats

from testbed.scenario.workload import Arrivals
from testbed.workload.arrivals import arrival_times
from testbed.workload.draw import weibull_shape
from testbed.workload.fitted import fitted_table

from .world import SECOND_NS, build

COUNT = 40_000
LAWS: TypeAdapter[Any] = TypeAdapter(Arrivals)


def gaps_s(law: dict[str, Any] | str, seed: int = 1, rate_scale: float = 1.0, count: int = COUNT) -> np.ndarray:
    times = list(islice(arrival_times(LAWS.validate_python(law), seed, rate_scale), count))
    gaps = np.diff(np.array(times, dtype=np.int64))
    assert (gaps >= 0).all()
    return gaps / SECOND_NS


def weibull_law(rate: float, cv: float) -> Any:
    shape = weibull_shape(cv)
    return stats.weibull_min(shape, scale=1 / rate / stats.weibull_min(shape).mean())


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        ({"kind": "poisson", "rate_per_s": 5}, stats.expon(scale=0.2)),
        ({"kind": "gamma", "rate_per_s": 5, "cv": 3}, stats.gamma(1 / 9, scale=0.2 * 9)),
        ({"kind": "gamma", "rate_per_s": 50, "cv": 0.5}, stats.gamma(4, scale=0.02 / 4)),
        ({"kind": "weibull", "rate_per_s": 5, "cv": 2}, weibull_law(5, 2)),
    ],
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_gaps_follow_their_law(law: dict[str, Any], expected: Any, seed: int) -> None:
    gaps = gaps_s(law, seed)
    # A gap below a nanosecond is 0: a step of the empirical distribution that a continuous law does not have.
    assert (
        stats.kstest(gaps[gaps > 1e-8], lambda x: (expected.cdf(x) - expected.cdf(1e-8)) / expected.sf(1e-8)).pvalue
        > 1e-3
    )
    assert gaps.mean() == pytest.approx(1 / law["rate_per_s"], rel=4 * law.get("cv", 1) / COUNT**0.5)
    assert gaps.std() / gaps.mean() == pytest.approx(law.get("cv", 1), rel=0.05)
    # Renewal: a gap tells nothing about the next.
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 4 / COUNT**0.5


def test_poisson_gaps_are_not_clipped() -> None:
    # Clipping at 3 mean gaps, as one simulator does, raises the rate by 5 %: exp(-3) of the gaps are longer.
    gaps = gaps_s({"kind": "poisson", "rate_per_s": 1})
    assert (gaps > 3).mean() == pytest.approx(np.exp(-3), rel=0.1)
    assert gaps.max() > 8


def test_poisson_counts_have_variance_equal_to_mean() -> None:
    times = np.cumsum(gaps_s({"kind": "poisson", "rate_per_s": 20}))
    counts = np.histogram(times, np.arange(0, times[-1], 1.0))[0]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.12)


def test_constant_gaps_do_not_drift() -> None:
    law = LAWS.validate_python({"kind": "constant", "rate_per_s": 3})
    times = list(islice(arrival_times(law, 0, 1.0), 300_001))
    assert times[0] == 0
    assert times[300_000] == 100_000 * SECOND_NS
    assert set(np.diff(times)) <= {333_333_333, 333_333_334}


def test_bursts_with_fixed_durations_are_a_square_wave() -> None:
    law = {"kind": "bursts", "on_rate_per_s": 50, "on_s": 1, "off_s": 3, "durations": "fixed"}
    times = np.cumsum(gaps_s(law)) + next(arrival_times(LAWS.validate_python(law), 1, 1.0)) / SECOND_NS
    assert (times % 4 <= 1 + 1e-9).all()
    assert len(times) / times[-1] == pytest.approx(50 / 4, rel=0.02)


def test_markov_bursts_have_the_rate_and_the_dispersion_of_the_process() -> None:
    on_rate, off_rate, on_s, off_s = 40.0, 4.0, 2.0, 3.0
    law = {"kind": "bursts", "on_rate_per_s": on_rate, "off_rate_per_s": off_rate, "on_s": on_s, "off_s": off_s}
    times = np.cumsum(gaps_s(law, count=150_000))
    mean_rate = (on_rate * on_s + off_rate * off_s) / (on_s + off_s)
    assert len(times) / times[-1] == pytest.approx(mean_rate, rel=0.05)
    # Limit of var/mean of counts: 1 + 2 (l1-l2)^2 r1 r2 / ((r1+r2)^2 (l1 r2 + l2 r1)), r = 1/mean duration
    # (Heffes and Lucantoni 1986, for a two-state MMPP).
    r1, r2 = 1 / on_s, 1 / off_s
    limit = 1 + 2 * (on_rate - off_rate) ** 2 * r1 * r2 / ((r1 + r2) ** 2 * (on_rate * r2 + off_rate * r1))
    counts = np.histogram(times, np.arange(0, times[-1], 60.0))[0]
    assert counts.var() / counts.mean() == pytest.approx(limit, rel=0.25)


@pytest.mark.parametrize(
    "law",
    [
        {"kind": "poisson", "rate_per_s": 5},
        {"kind": "constant", "rate_per_s": 5},
        {"kind": "bursts", "on_rate_per_s": 5, "off_rate_per_s": 1, "on_s": 3, "off_s": 2},
        "azure-conv-2023",
    ],
)
def test_rate_scale_only_compresses_time(law: Any) -> None:
    slow, fast = gaps_s(law, count=2000), gaps_s(law, rate_scale=4.0, count=2000)
    np.testing.assert_allclose(fast * 4, slow, atol=1e-7)


def test_a_burst_of_tiny_gaps_at_the_start_is_no_division_by_zero() -> None:
    # With a cv of 20 most gamma gaps underflow to 0, also the first, before any phase has begun.
    law = LAWS.validate_python({"kind": "gamma", "rate_per_s": 1, "cv": 40})
    assert len(list(islice(arrival_times(law, 0, 1.0), 100))) == 100


def test_fitted_arrivals_follow_the_minutes() -> None:
    times = np.cumsum(gaps_s("azure-conv-2023", count=60_000))
    rates = fitted_table("azure-conv-2023").minute_rates_per_s
    by_minute = (
        np.histogram(times, np.arange(0, times[-1], 60.0))[0][: 5 * len(rates)].reshape(-1, len(rates)).mean(0) / 60
    )
    assert np.corrcoef(by_minute, rates)[0, 1] > 0.9
    np.testing.assert_allclose(by_minute, rates, rtol=0.25)


def test_at_iteration_ties_requests_to_iterations() -> None:
    lengths = {"prompt_tokens": 4, "output_tokens": 2}
    every = build({"arrivals": {"kind": "at_iteration", "every": 3, "batch": 2}, "lengths": lengths, "count": 5})
    assert [timed.iteration for timed in every.start()] == [0, 0, 3, 3, 6]
    listed = build({"arrivals": {"kind": "at_iteration", "iterations": [0, 0, 7]}, "lengths": lengths})
    assert [(timed.iteration, timed.arrival_ns) for timed in listed.start()] == [(0, 0), (0, 0), (7, 0)]
    assert listed.expected_requests() == 3


def test_all_at_once() -> None:
    law = {"kind": "all_at_once", "at_s": 1.5}
    workload = build({"arrivals": law, "lengths": {"prompt_tokens": 4, "output_tokens": 2}, "count": 3})
    assert [timed.arrival_ns for timed in workload.start()] == [1_500_000_000] * 3


def test_duration_ends_arrivals() -> None:
    draw = partial(build, seed=5)
    law = {"arrivals": {"kind": "poisson", "rate_per_s": 10}, "lengths": {"prompt_tokens": 4, "output_tokens": 2}}
    times = [timed.arrival_ns for timed in draw({**law, "duration_s": 20}).start()]
    assert 150 < len(times) < 250
    assert times[-1] < 20 * SECOND_NS
    assert times == [timed.arrival_ns for timed in draw({**law, "count": len(times)}).start()]
