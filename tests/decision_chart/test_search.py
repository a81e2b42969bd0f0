"""The search for the highest rate finds it on curves that are known, and the table tells what it may."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decision_chart.cells import CLOSE, MOST_RUNS, Cell, Strained, highest_rate
from tests.decision_chart.table import PLACE, best, change, estimate, per_device


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    true_rate=st.floats(0.1, 1000.0), slope=st.floats(0.8, 4.0), off=st.floats(1 / 6, 6.0), floor=st.floats(0.0, 0.5)
)
def test_the_rate_is_found_on_smooth_curves(true_rate: float, slope: float, off: float, floor: float) -> None:
    """Latency is a floor and a power of the rate."""
    found = highest_rate(
        lambda rate: Strained(rate, floor + (1 - floor) * (rate / true_rate) ** slope, 0.0, 0.0), true_rate * off
    )
    assert found.runs <= MOST_RUNS
    assert found.rate_per_s == pytest.approx(true_rate, rel=2 * CLOSE)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(true_rate=st.floats(0.1, 1000.0), off=st.floats(0.3, 3.0))
def test_the_rate_is_found_where_a_queue_blows_up(true_rate: float, off: float) -> None:
    """Just below the limit, and far beyond it from there on."""
    found = highest_rate(
        lambda rate: Strained(rate, 0.7 if rate < true_rate else 5.0 * rate / true_rate, 0.0, 0.0), true_rate * off
    )
    assert found.rate_per_s == pytest.approx(true_rate, rel=0.25)


def test_limits_that_no_rate_keeps() -> None:
    assert highest_rate(lambda rate: Strained(rate, 1.2 + rate, 0.0, 0.0), 10.0).rate_per_s == 0.0


def table(**rates: list[float]) -> pd.Series:
    """Rates by layout, a value a seed."""
    place = Cell("m", "h", "w", "")
    rows = [
        {**place._replace(layout=layout)._asdict(), "seed": seed, "devices": 2, "rate_per_s": 2 * rate}
        for layout, values in rates.items()
        for seed, rate in enumerate(values)
    ]
    assert list(rows[0])[:4] == PLACE
    return per_device(pd.DataFrame(rows)).sort_index()


def test_the_best_is_told_seed_by_seed() -> None:
    """Seeds differ by far more than layouts do: only pairs tell them apart."""
    rates = table(a=[10.0, 20.0, 30.0, 40.0], b=[11.0, 22.1, 33.0, 44.2], c=[11.1, 22.0, 33.2, 43.9])
    assert estimate(rates[("m", "h", "w", "a")]).half > 10
    assert best(rates, ("m", "h", "w"), ["a", "b", "c"]) == ["b", "c"]
    gain = change(rates, ("m", "h", "w"), "b", "a")
    assert gain.mean == pytest.approx(10.25, abs=0.1) and gain.is_settled


def test_an_estimate_is_students() -> None:
    found = estimate(pd.Series([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert found.mean == 3.0
    assert found.half == pytest.approx(2.776445 * 1.5811388 / 5**0.5, rel=1e-6)
