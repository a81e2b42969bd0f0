"""Length laws against what they claim, and the fitted table against its trace."""

from __future__ import annotations

import json
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from scipy import stats

from testbed.scenario.errors import InputError
from testbed.scenario.paths import data_root
from testbed.scenario.workload import Distribution, Lengths
from testbed.workload.derive import derive
from testbed.workload.draw import Uniforms, blocks
from testbed.workload.lengths import length_draws, quantiles_of, token_draws
from testbed.workload.traces import read_trace

COUNT = 40_000
LAW: TypeAdapter[Any] = TypeAdapter(Distribution)
LENGTHS: TypeAdapter[Any] = TypeAdapter(Lengths)


def tokens(law: Any, seed: int = 1, count: int = COUNT) -> np.ndarray:
    return np.array(list(islice(token_draws(LAW.validate_python(law), seed, "x", Path(), "prompt_tokens"), count)))


def reals(law: Any, seed: int = 1) -> np.ndarray:
    return quantiles_of(LAW.validate_python(law), Path())(Uniforms(seed, "x").take(COUNT))


def test_uniforms_are_uniform_open_and_independent_of_block_size() -> None:
    draws = Uniforms(3, "a").take(COUNT)
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    assert draws.min() > 0 and draws.max() < 1
    joined = np.concatenate(list(islice(blocks(Uniforms(3, "a")), 9)))
    np.testing.assert_array_equal(joined, draws[: len(joined)])
    assert not np.array_equal(Uniforms(3, "b").take(10), draws[:10])
    assert not np.array_equal(Uniforms(4, "a").take(10), draws[:10])


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        ({"kind": "exponential", "mean": 30}, stats.expon(scale=30)),
        ({"kind": "uniform", "low": 2, "high": 7}, stats.uniform(2, 5)),
        ({"kind": "lognormal", "median": 80, "sigma": 1.2}, stats.lognorm(1.2, scale=80)),
        ({"kind": "lognormal", "mean": 80, "sigma": 0.5}, stats.lognorm(0.5, scale=80 * np.exp(-0.125))),
        ({"kind": "lognormal", "p50": 100, "p95": 900}, stats.lognorm(np.log(9) / stats.norm.ppf(0.95), scale=100)),
    ],
)
def test_draws_follow_their_law(law: dict[str, Any], expected: Any) -> None:
    assert stats.kstest(reals(law), expected.cdf).pvalue > 1e-3


def test_truncation_leaves_tails_out_and_keeps_the_shape_between() -> None:
    law = {"kind": "lognormal", "median": 80, "sigma": 1.2, "min": 20, "max": 400}
    whole, draws = stats.lognorm(1.2, scale=80), reals(law)
    low, high = whole.cdf(20), whole.cdf(400)
    assert draws.min() >= 20 and draws.max() <= 400
    assert stats.kstest(draws, lambda x: (whole.cdf(x) - low) / (high - low)).pvalue > 1e-3
    short = reals({"kind": "exponential", "mean": 30, "min": 10, "max": 60})
    assert short.min() >= 10 and short.max() <= 60


def test_whole_numbers_of_a_uniform_law_are_equally_likely() -> None:
    counts = np.bincount(tokens({"kind": "uniform", "low": 3, "high": 7}))[3:]
    assert len(counts) == 5
    assert stats.chisquare(counts).pvalue > 1e-3


def test_lengths_are_at_least_one_token() -> None:
    assert tokens({"kind": "exponential", "mean": 0.3}).min() == 1
    assert tokens(0, count=2).tolist() == [1, 1]


def test_extreme_laws_stay_integers() -> None:
    draws = tokens({"kind": "lognormal", "median": 1000, "sigma": 40})
    assert draws.min() == 1 and draws.max() == 2**31 - 1


def test_quantile_table_has_its_quantiles() -> None:
    draws = reals({"kind": "empirical", "quantiles": {"p0": 10, "p50": 100, "p90": 400, "p100": 2000}})
    np.testing.assert_allclose(np.quantile(draws, [0.5, 0.9]), [100, 400], rtol=0.03)
    assert draws.min() >= 10 and draws.max() <= 2000


@pytest.mark.parametrize(
    "law",
    [
        {"kind": "lognormal", "mean": 3},
        {"kind": "lognormal", "mean": 3, "median": 3, "sigma": 1},
        {"kind": "lognormal", "mean": 3, "p95": 9},
        {"kind": "lognormal", "p50": 9, "p95": 3},
        {"kind": "uniform", "low": 3, "high": 2},
        {"kind": "exponential", "mean": 3, "min": 9, "max": 4},
        {"kind": "exponential", "mean": 3, "maximum": 4},
        {"kind": "exponential", "mean": float("nan")},
        {"kind": "empirical", "quantiles": {"p10": 3, "p100": 4}},
        {"kind": "empirical", "quantiles": {"p0": 5, "p100": 4}},
        {"kind": "empirical", "quantiles": {}},
        {"kind": "empirical"},
        {"kind": "normal", "mean": 3},
        -1,
    ],
)
def test_wrong_laws_are_refused(law: Any) -> None:
    with pytest.raises(ValidationError):
        LAW.validate_python(law)


def test_pairs_stay_together() -> None:
    law = LENGTHS.validate_python({"kind": "pairs", "pairs": [(10, 1), (20, 2), (30, 3)]})
    drawn = list(islice(length_draws(law, 0, Path()), 3000))
    assert all(prompt == 10 * output for prompt, output in drawn)
    assert stats.chisquare(np.bincount([output for _, output in drawn])[1:]).pvalue > 1e-3


def test_rows_of_a_file_are_drawn_together(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("prompt_tokens,output_tokens\n5,50\n6,60\n7,0\n")
    law = LENGTHS.validate_python({"kind": "pairs", "file": "t.csv"})
    assert {*islice(length_draws(law, 0, tmp_path), 50)} == {(5, 50), (6, 60)}
    empirical = {"kind": "empirical", "file": "t.csv"}
    apart = LENGTHS.validate_python({"prompt_tokens": empirical, "output_tokens": empirical})
    assert {*islice(length_draws(apart, 0, tmp_path), 50)} == {(5, 50), (6, 60), (5, 60), (6, 50)}


def test_an_unknown_table_names_the_known() -> None:
    law = LENGTHS.validate_python("azure-conv-2032")
    with pytest.raises(InputError, match="azure-conv-2023"):
        next(length_draws(law, 0, Path()))


@given(st.floats(1, 1e5), st.floats(0.1, 3), st.integers(0, 2**63))
def test_lengths_do_not_depend_on_anything_but_seed_and_law(median: float, sigma: float, seed: int) -> None:
    law = {"kind": "lognormal", "median": median, "sigma": sigma}
    first = tokens(law, seed, 40)
    np.testing.assert_array_equal(first[:20], tokens(law, seed, 20))
    assert first.min() >= 1


# --- the shipped table against the trace it was fitted to -----------------------------------------------------------


@pytest.fixture(scope="module")
def azure() -> Path:
    root = data_root()
    assert root is not None, "the traces are needed: set TESTBED_DATA"
    return root / "traces" / "azure_llm_2023_conv_first30min.csv"


def test_the_committed_table_is_what_the_script_derives(azure: Path) -> None:
    committed = (files("testbed.workload") / "fitted" / "azure-conv-2023.json").read_text()
    assert json.loads(committed) == derive(azure)
    assert json.loads(committed)["licence"] == "CC-BY-4.0"


def test_the_fitted_table_has_the_moments_and_quantiles_of_its_trace(azure: Path) -> None:
    rows = np.array([(row.prompt_tokens, row.output_tokens) for row in read_trace(azure)], float)
    drawn = np.array(list(islice(length_draws(LENGTHS.validate_python("azure-conv-2023"), 7, Path()), 60_000)), float)
    np.testing.assert_allclose(drawn.mean(0), rows.mean(0), rtol=0.02)
    np.testing.assert_allclose(drawn.std(0), rows.std(0), rtol=0.03)
    probabilities = [0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99]
    np.testing.assert_allclose(
        np.quantile(drawn, probabilities, axis=0), np.quantile(rows, probabilities, axis=0), rtol=0.08
    )
    # The dependence that drawing apart would lose.
    assert stats.spearmanr(*drawn.T).statistic == pytest.approx(stats.spearmanr(*rows.T).statistic, abs=0.03)
    one_column = tokens({"kind": "empirical", "name": "azure-conv-2023", "column": "output_tokens"}, count=60_000)
    assert one_column.mean() == pytest.approx(rows[:, 1].mean(), rel=0.02)
