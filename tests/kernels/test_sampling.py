"""Filters against their definition, draws against the formula in Python, the kernels against their references."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from testbed.kernels.philox import token_bits_reference
from testbed.kernels.sampling import (
    SamplingColumns,
    _gumbel,
    draw,
    draw_reference,
    greedy,
    greedy_reference,
    gumbel_reference,
    lowest_kept,
    lowest_kept_reference,
    scores_reference,
)

MARGIN = 1e-4
Draw = Callable[[Tensor, Tensor, Tensor, SamplingColumns, bool], Tensor]
BOTH_DRAWS = pytest.mark.parametrize("implementation", [draw_reference, draw])
BOTH_FILTERS = pytest.mark.parametrize("lowest", [lowest_kept_reference, lowest_kept])
BOTH_GREEDY = pytest.mark.parametrize("most_likely", [greedy_reference, greedy])


def columns_of(rows: list[tuple[float, int, float, float]], device: str, seed: int = 0) -> SamplingColumns:
    """One slot for each (temperature, top_k, top_p, min_p); its seed is ``seed`` plus its number."""
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    return SamplingColumns(
        temperature=torch.tensor(temperature, dtype=torch.float32, device=device),
        top_k=torch.tensor(top_k, dtype=torch.int32, device=device),
        top_p=torch.tensor(top_p, dtype=torch.float32, device=device),
        min_p=torch.tensor(min_p, dtype=torch.float32, device=device),
        seed=seed + torch.arange(len(rows), device=device),
    )


def int32(values: list[int] | range, device: str) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=device)


def random_logits(seed: int, rows: int, vocab_size: int, ties: bool) -> Tensor:
    """Some tokens are out; with ``ties`` few values occur, as in a narrow dtype."""
    bits = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocab_size, generator=bits)
    logits = logits.round() if ties else logits
    logits[torch.rand(rows, vocab_size, generator=bits) < 0.1] = -math.inf
    return logits


ROWS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 1e-6, 1e-5, 0.3, 1.0, 2.0, 100.0, 1e30]),
        st.sampled_from([1, 2, 5, 40, 1000]),
        st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
        st.sampled_from([0.0, 1e-4, 0.1, 0.7, 1.0]),
    ),
    min_size=1,
    max_size=3,
)


# -- filters ----------------------------------------------------------------------------------------------------------


def kept_by_definition(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The three filters, each on the whole distribution, with ties, in Python's floats."""
    if temperature == 0 or max(logits) == -math.inf:
        return set(range(len(logits)))
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    shares = [weight / math.fsum(weights) for weight in weights]
    descending = sorted(range(len(logits)), key=lambda token: -logits[token])
    reached = [math.fsum(shares[token] for token in descending[: n + 1]) for n in range(len(descending))]
    last_of_top_p = next((n for n, total in enumerate(reached) if total >= top_p), len(logits) - 1)
    lowest = max(logits[descending[min(top_k, len(logits)) - 1]], logits[descending[last_of_top_p]])
    return {
        token
        for token, x in enumerate(logits)
        if (x >= lowest or (top_p >= 1 and x >= logits[descending[min(top_k, len(logits)) - 1]]))
        and shares[token] >= min_p * max(shares)
    }


@BOTH_FILTERS
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "kept"),
    [
        (7, 1.0, 0.0, {0, 1, 2, 3, 4, 5, 6}),
        (1, 1.0, 0.0, {2}),
        (2, 1.0, 0.0, {0, 2, 4}),  # 0 and 4 tie for the second place
        (3, 1.0, 0.0, {0, 2, 4}),
        (4, 1.0, 0.0, {0, 2, 4, 6}),
        (7, 0.39, 0.0, {2}),
        (7, 0.41, 0.0, {0, 2, 4}),
        (7, 0.81, 0.0, {0, 2, 4, 6}),
        (7, 0.95, 0.0, {0, 1, 2, 3, 4, 6}),  # 1 and 3 tie where 0.95 is reached
        (7, 1e-6, 0.0, {2}),
        (7, 1.0, 0.24, {0, 2, 4, 6}),
        (7, 1.0, 0.26, {0, 2, 4}),
        (7, 1.0, 1.0, {2}),
        (4, 0.95, 0.1, {0, 2, 4, 6}),  # the strictest counts: each looks at the whole distribution
        (7, 0.81, 0.3, {0, 2, 4}),
        (3, 0.41, 0.6, {2}),
    ],
)
def test_filters_by_hand(device: str, lowest: Any, top_k: int, top_p: float, min_p: float, kept: set[int]) -> None:
    """Probabilities 0.4, twice 0.2, 0.1, twice 0.05, and none at all."""
    shares = torch.tensor([[0.2, 0.05, 0.4, 0.05, 0.2, 0.0, 0.1]], device=device)
    columns = columns_of([(0.5, top_k, top_p, min_p)], device)
    logits = 0.5 * shares.log() + 3  # temperature one half undoes the factor
    found = logits[0] >= lowest(logits, int32([0], device), columns)[0]
    assert {token for token in range(7) if found[token]} - {5} == kept - {5}  # 5 can never be drawn


@BOTH_FILTERS
@given(seed=st.integers(0, 10**6), rows=ROWS, vocab_size=st.integers(1, 300), ties=st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_filters_as_defined(
    device: str, lowest: Any, seed: int, rows: list[tuple[float, int, float, float]], vocab_size: int, ties: bool
) -> None:
    """Exactly, but for sums and ratios within 1e-5 of a threshold: float32 may decide them either way."""
    logits = random_logits(seed, len(rows), vocab_size, ties)
    found = lowest(logits.to(device), int32(range(len(rows)), device), columns_of(rows, device)).cpu()
    for row, (temperature, top_k, top_p, min_p) in enumerate(rows):
        values = logits[row].tolist()
        kept = {token for token, x in enumerate(values) if x >= found[row]}
        strict, loose = (
            kept_by_definition(values, temperature, top_k, top_p if top_p == 1 else top_p * sign, min_p / sign)
            for sign in (1 - 1e-5, 1 + 1e-5)
        )
        possible = {token for token, x in enumerate(values) if x > -math.inf}
        assert strict & possible <= kept & possible <= loose & possible


@BOTH_FILTERS
def test_filters_over_a_large_vocabulary(device: str, lowest: Any) -> None:
    logits = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0)).to(device)
    for top_k in (1, 50, 19_999):
        found = lowest(logits, int32([0], device), columns_of([(1.0, top_k, 1.0, 0.0)], device))
        assert int((logits >= found[:, None]).sum()) == top_k


# -- draws ------------------------------------------------------------------------------------------------------------


def score_in_python(x: float, peak: float, temperature: float, word: int) -> float:
    return (x - peak) / temperature - math.log(-math.log1p(-(word + 0.5) / 2**32))


@BOTH_DRAWS
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draw_is_the_formula(device: str, implementation: Draw, temperature: float) -> None:
    logits = random_logits(1, 1, 50, ties=False)
    columns = columns_of([(temperature, 50, 1.0, 0.0)], device, seed=2**62 + 12345)
    compared = 0
    for position in range(20):
        words = token_bits_reference(columns.seed.cpu(), torch.tensor([position]), 50)[0].tolist()
        peak = float(logits.max())
        scores = [
            score_in_python(x, peak, temperature, word) for x, word in zip(logits[0].tolist(), words, strict=True)
        ]
        best, second = sorted(scores)[:-3:-1]
        if best - second > MARGIN:
            compared += 1
            token = implementation(logits.to(device), int32([0], device), int32([position], device), columns, False)
            assert token.tolist() == [scores.index(best)]
    assert compared >= 18


@triton.jit
def _gumbel_kernel(bits_ptr, out_ptr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out_ptr + place, _gumbel(tl.load(bits_ptr + place).to(tl.uint32)))


def test_noise_is_finite_and_exact(device: str) -> None:
    """At the ends, around the place where the series takes over, and in between."""
    words = [0, 1, 2, 2**20, 2**23, 2**24 - 9, 2**24, 2**24 + 1, 2**31, 2**32 - 129, 2**32 - 2, 2**32 - 1]
    words += [int(word) for word in torch.randint(0, 2**32, (52,), generator=torch.Generator().manual_seed(0))]
    bits = torch.tensor(words, device=device)
    fused = torch.empty(len(words), device=device)
    _gumbel_kernel[(1,)](bits, fused, BLOCK=len(words))
    reference = gumbel_reference(bits)
    exact = torch.tensor([-math.log(-math.log1p(-(word + 0.5) / 2**32)) for word in words], dtype=torch.float64)
    inner = torch.tensor(words) < 2**32 - 2**15  # nearer to 1, float32 has few values left: those tokens lose anyway
    for found in (reference, fused):
        assert bool(found.isfinite().all())
        torch.testing.assert_close(found.cpu().double()[inner], exact[inner], rtol=1e-5, atol=3e-3)
    torch.testing.assert_close(fused, reference, rtol=2e-5, atol=2e-5)


@given(
    seed=st.integers(0, 10**6),
    rows=ROWS,
    vocab_size=st.integers(1, 700),
    ties=st.booleans(),
    filters=st.booleans(),
    half=st.booleans(),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_kernels_draw_as_their_reference(
    device: str,
    seed: int,
    rows: list[tuple[float, int, float, float]],
    vocab_size: int,
    ties: bool,
    filters: bool,
    half: bool,
) -> None:
    """The token with the best score of those that stay, to rounding. (Who stays is tested above.)"""
    logits = random_logits(seed, len(rows), vocab_size, ties).to(device)
    logits = logits.half() if half else logits
    slots, positions = int32(range(len(rows)), device), int32([(seed + row) % 5000 for row in range(len(rows))], device)
    columns = columns_of(rows, device, seed)
    found = draw(logits, slots, positions, columns, filters)
    scores = scores_reference(logits, slots, positions, columns, filters=False)
    if filters:
        scores[logits < lowest_kept(logits, slots, columns)[:, None]] = -math.inf
    for row, (temperature, *_) in enumerate(rows):
        best = float(scores[row].max())
        if logits[row].max() == -math.inf:
            assert found[row] == -1
        elif temperature == 0:
            assert found[row] == scores[row].argmax()
        else:
            assert float(scores[row, found[row]]) >= best - MARGIN


def test_kernels_draw_as_their_reference_in_large_vocabularies(device: str) -> None:
    """Several blocks a row, strided rows, the last block not full; greedy rows between the others; rows that leave no
    token in most blocks, though a high temperature would favour those."""
    rows = [(1.0, 9000, 1.0, 0.0), (0.0, 1, 1.0, 0.0), (1.3, 9000, 0.8, 0.01), *[(50.0, 2, 1.0, 0.0)] * 5]
    buffer = 3 * torch.randn(len(rows), 9011, generator=torch.Generator().manual_seed(3)).to(device)
    logits, slots, positions = buffer[:, :9001], int32(range(len(rows)), device), int32(range(5, 13), device)
    columns = columns_of(rows, device)
    for filters in (False, True):
        scores = scores_reference(logits, slots, positions, columns, filters).topk(2).values
        assert float((scores[:, 0] - scores[:, 1]).min()) > MARGIN
        expected = draw_reference(logits, slots, positions, columns, filters)
        assert torch.equal(draw(logits, slots, positions, columns, filters), expected)


@BOTH_DRAWS
@pytest.mark.parametrize("filters", [False, True])
def test_rows_without_a_token(device: str, implementation: Draw, filters: bool) -> None:
    """-inf everywhere, a NaN, a +inf: -1, in greedy rows too; the rows beside them are not touched."""
    rows = [(1.0, 5, 0.9, 0.1), (0.0, 1, 1.0, 0.0)]
    good = torch.arange(9.0)
    out, broken, infinite = torch.full((9,), -math.inf), good.clone(), good.clone()
    broken[3], infinite[4] = math.nan, math.inf
    logits = torch.stack((out, broken, infinite, 100 * good)).repeat_interleave(2, 0).to(device)
    slots, positions = int32([0, 1] * 4, device), int32([7] * 8, device)
    tokens = implementation(logits, slots, positions, columns_of(rows, device), filters)
    assert tokens.tolist() == [-1] * 6 + [8, 8]


@BOTH_GREEDY
def test_greedy(device: str, most_likely: Callable[[Tensor], Tensor]) -> None:
    """The first of equal ones, within a block and over blocks; -1 where there is none."""
    logits = torch.zeros(6, 5000, device=device)
    logits[0, [100, 101, 4000]] = 1.0
    logits[1, [3999, 4999]] = 1.0
    logits[2] = -math.inf
    logits[3, 4500] = math.nan
    logits[4, 17] = math.inf
    logits[5, :4999] = -math.inf
    assert most_likely(logits).tolist() == [100, 3999, -1, -1, -1, 4999]


@BOTH_DRAWS
def test_tiny_temperature_draws_among_the_best(device: str, implementation: Draw) -> None:
    """Nothing overflows: of equal logits each is drawn about as often, the others never."""
    logits = torch.tensor([[5.0, -3e4, 90.0, 90.0, 89.9]], device=device).expand(80, 5)
    for temperature in (1e-6, 1e-5):
        columns = columns_of([(temperature, 5, 1.0, 0.0)], device)
        tokens = implementation(logits, int32([0] * 80, device), int32(range(80), device), columns, False)
        assert set(tokens.tolist()) == {2, 3}
        assert 16 < int((tokens == 2).sum()) < 64  # 5.4 standard deviations


@BOTH_DRAWS
def test_huge_temperature_draws_everything(device: str, implementation: Draw) -> None:
    logits = torch.tensor([[5.0, -90.0, 90.0, -math.inf]], device=device).expand(50, 4)
    columns = columns_of([(1e30, 4, 1.0, 0.0)], device)
    tokens = implementation(logits, int32([0] * 50, device), int32(range(50), device), columns, True)
    assert set(tokens.tolist()) == {0, 1, 2}


@BOTH_DRAWS
@pytest.mark.parametrize("filters", [False, True])
def test_seed_and_position_decide_alone(device: str, implementation: Draw, filters: bool) -> None:
    """The same seed and position: the same token in any row, slot or company. Another of either: others."""
    logits = random_logits(5, 1, 300, ties=False).to(device).expand(24, 300)
    rows = [(1.0, 300, 1.0, 0.0)] * 3 + [(0.0, 1, 1.0, 0.0), (0.2, 3, 0.5, 0.5)]
    columns = columns_of(rows, device)
    columns.seed[:3] = torch.tensor([42, 43, 42])
    positions = int32([*range(10), *range(10), *range(4)], device)

    def drawn(slots: list[int]) -> list[int]:
        found: list[int] = implementation(logits, int32(slots, device), positions, columns, filters).tolist()
        return found

    tokens = drawn([0] * 10 + [1] * 10 + [3, 4, 3, 4])
    assert tokens[:10] == drawn([2] * 10 + [4] * 10 + [0, 1, 2, 3])[:10]
    assert tokens[:10] == drawn([1] * 10 + [0] * 10 + [1, 1, 1, 1])[10:20]
    assert tokens[:10] != tokens[10:20] and len(set(tokens[:10])) > 5
    alone = implementation(logits[:1], int32([0], device), int32([7], device), columns, filters)
    assert alone.tolist() == [tokens[7]]
