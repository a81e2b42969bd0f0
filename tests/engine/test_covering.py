"""The covering array: every two levels meet, no row is idle."""

from __future__ import annotations

from itertools import combinations, product

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.covering import covering_array, pairs

FACTORS = st.lists(st.integers(1, 4), min_size=2, max_size=5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(FACTORS)
def test_every_two_levels_meet(levels: list[int]) -> None:
    factors = {f"factor {i}": [f"{i}.{level}" for level in range(count)] for i, count in enumerate(levels)}
    rows = covering_array(factors)
    met = {frozenset(two) for row in rows for two in combinations(row, 2)}
    for one, other in combinations(factors.values(), 2):
        assert all(frozenset(two) in met for two in product(one, other))
    largest = sorted(levels)[-2:]
    assert len(rows) >= largest[0] * largest[1]
    assert all(row[i] in names for row in rows for i, names in enumerate(factors.values()))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(FACTORS)
def test_every_row_brings_a_pair_that_no_row_before_it_had(levels: list[int]) -> None:
    seen: set[tuple[int, int, int, int]] = set()
    for row in covering_array({str(i): range(count) for i, count in enumerate(levels)}):
        assert pairs(row) - seen
        seen |= pairs(row)


def test_it_is_far_smaller_than_the_product() -> None:
    rows = covering_array({str(i): range(4) for i in range(5)})
    assert len(rows) <= 30 < 4**5
