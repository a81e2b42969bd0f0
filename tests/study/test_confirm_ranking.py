"""Rankings against brute force."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.study.confirm.ranking import RANKED, rank

values = st.integers(1, 12).map(float)
variants = st.dictionaries(
    st.sampled_from("abcde"), st.tuples(values, st.lists(values, min_size=2, max_size=3)), min_size=2
)


@given(st.sampled_from(sorted(RANKED)), variants)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_every_pair_is_judged_as_defined(figure: str, drawn: dict[str, tuple[float, list[float]]]) -> None:
    more_is_better = figure == "output_throughput"
    found = rank(figure, {k: v[0] for k, v in drawn.items()}, {k: v[1] for k, v in drawn.items()})
    pairs = {frozenset((pair.better, pair.worse)): pair for pair in found.pairs}
    assert len(pairs) == len(found.pairs) == len(drawn) * (len(drawn) - 1) // 2
    verdicts = []
    for one, other in combinations(drawn, 2):
        pair = pairs[frozenset((one, other))]
        means = {name: sum(drawn[name][1]) / len(drawn[name][1]) for name in (one, other)}
        gap = abs(means[one] - means[other])
        noise = max(max(drawn[name][1]) - min(drawn[name][1]) for name in (one, other))
        best = (max if more_is_better else min)((one, other), key=means.__getitem__)
        worst = other if best == one else one
        simulated = drawn[best][0] > drawn[worst][0] if more_is_better else drawn[best][0] < drawn[worst][0]
        expected = "too close to call" if gap <= 2 * noise else "right" if simulated else "wrong"
        assert pair.verdict == expected
        assert (pair.real, pair.noise) == (pytest.approx(gap), noise)
        assert gap == 0 or pair.better == best
        verdicts.append(expected)
    expected = "wrong" if "wrong" in verdicts else "right" if "right" in verdicts else "too close to call"
    assert found.verdict == expected
    sign = -1 if more_is_better else 1
    for order, value in ((found.simulated, lambda n: drawn[n][0]), (found.real, lambda n: float(np.mean(drawn[n][1])))):
        assert sorted(order) == sorted(drawn)
        keys = [sign * value(name) for name in order]
        assert keys == sorted(keys)


def test_a_tie_in_simulation_is_no_order() -> None:
    found = rank("mean_ttft_ms", {"a": 5.0, "b": 5.0}, {"a": [1.0, 1.1], "b": [2.0, 2.1]})
    assert [pair.verdict for pair in found.pairs] == ["wrong"]


def test_a_variant_without_a_value_is_left_out() -> None:
    nan = float("nan")
    found = rank("mean_tpot_ms", {"a": 1.0, "b": nan, "c": 2.0}, {"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [3.0, 3.0]})
    assert found.real == ("a", "c") and found.verdict == "right"
    assert rank("mean_tpot_ms", {"a": 1.0, "b": 2.0}, {"a": [1.0, nan], "b": [2.0, 2.0]}).pairs == ()


def test_a_single_run_tells_no_noise_and_so_no_order() -> None:
    found = rank("mean_ttft_ms", {"a": 1.0, "b": 2.0}, {"a": [1.0], "b": [9.0]})
    assert found.verdict == "too close to call" and np.isnan(found.pairs[0].noise)
