"""The product for few tokens against torch's, torch's against sums by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from testbed.kernels.gemv import MOST_TOKENS, PAYS, gemv_pays, linear_small, linear_small_reference
from tests.kernels.inputs import DEVICE, Numbers, assert_near, dtypes, few, poisoned, seeds


@few
@given(
    tokens=st.integers(1, MOST_TOKENS),
    outputs=st.integers(1, 70),
    inner=st.integers(1, 600),
    gap=st.integers(0, 5),
    bias=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
@example(tokens=1, outputs=5, inner=2500, gap=0, bias=True, dtype=torch.float16, seed=0)
@example(tokens=1, outputs=4100, inner=3, gap=0, bias=True, dtype=torch.float32, seed=0)
@example(tokens=16, outputs=16, inner=512, gap=0, bias=False, dtype=torch.float32, seed=0)
def test_kernel_equals_its_reference(
    tokens: int, outputs: int, inner: int, gap: int, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    numbers = Numbers(seed, dtype)
    x, weight = numbers.rows(tokens, inner, gap), numbers(outputs, inner, scale=inner**-0.5)
    added = numbers(outputs) if bias else None
    with poisoned():
        out = linear_small(x, weight, added)
    assert_near(out, linear_small_reference(x, weight, added))


@few
@given(tokens=st.integers(1, 3), outputs=st.integers(1, 5), inner=st.integers(1, 20), seed=seeds)
def test_reference_is_the_sum(tokens: int, outputs: int, inner: int, seed: int) -> None:
    numbers = Numbers(seed)
    x, weight, bias = numbers(tokens, inner), numbers(outputs, inner), numbers(outputs)
    rows = zip(weight.tolist(), bias.tolist(), strict=True)
    exact = [[sum(a * b for a, b in zip(v, row, strict=True)) + c for v in x.tolist()] for row, c in rows]
    assert_near(linear_small_reference(x, weight, bias), torch.tensor(exact, device=DEVICE).T, scale=inner)


def test_more_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="17 tokens; linear_small takes 16 at most"):
        linear_small(torch.zeros(17, 8), torch.zeros(4, 8))


def test_it_pays_only_where_the_table_says() -> None:
    for most, elements in PAYS:
        assert 1 <= most <= MOST_TOKENS
        assert gemv_pays(most, elements // 1024, 1024)
    assert not gemv_pays(max(most for most, _ in PAYS) + 1, 16, 16)
    assert not gemv_pays(1, max(elements for _, elements in PAYS) + 1, 1)
