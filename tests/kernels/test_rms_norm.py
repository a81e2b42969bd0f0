"""The norm against its reference, the reference against the formula and Hugging Face's module."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from testbed.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from tests.kernels.inputs import DEVICE, Numbers, assert_near, dtypes, few, poisoned, seeds

tokens, widths, gaps = st.integers(1, 12), st.integers(1, 300), st.integers(0, 5)


@few
@given(tokens=tokens, hidden=widths, gap=gaps, dtype=dtypes, seed=seeds)
@example(tokens=2, hidden=2500, gap=1, dtype=torch.float16, seed=0)  # one row a program
def test_norm_equals_its_reference(tokens: int, hidden: int, gap: int, dtype: torch.dtype, seed: int) -> None:
    numbers = Numbers(seed, dtype)
    x, weight = numbers.rows(tokens, hidden, gap), numbers(hidden)
    with poisoned():
        out = rms_norm(x, weight, 1e-5)
    assert_near(out, rms_norm_reference(x, weight, 1e-5))


@few
@given(tokens=tokens, hidden=widths, gap=gaps, dtype=dtypes, seed=seeds)
@example(tokens=2, hidden=2500, gap=1, dtype=torch.float16, seed=0)
def test_added_norm_equals_its_reference(tokens: int, hidden: int, gap: int, dtype: torch.dtype, seed: int) -> None:
    numbers = Numbers(seed, dtype)
    x, weight, wide = numbers(tokens, hidden), numbers(hidden), numbers(tokens, hidden + gap)
    expected_wide = wide.clone()
    expected = add_rms_norm_reference(x, expected_wide[:, :hidden], weight, 1e-5)
    with poisoned():
        out = add_rms_norm(x, wide[:, :hidden], weight, 1e-5)
    assert torch.equal(wide, expected_wide)  # the sum is rounded once, and nothing beside it is touched
    assert torch.equal(out, rms_norm(wide[:, :hidden], weight, 1e-5))  # the norm is that of the rounded sum
    assert_near(out, expected)


@few
@given(tokens=tokens, hidden=widths, seed=seeds)
def test_reference_is_the_formula(tokens: int, hidden: int, seed: int) -> None:
    numbers = Numbers(seed)
    x, weight, eps = numbers(tokens, hidden), numbers(hidden), 0.3
    exact = [[value / (sum(v * v for v in row) / hidden + eps) ** 0.5 for value in row] for row in x.tolist()]
    torch.testing.assert_close(
        rms_norm_reference(x, weight, eps).double(),
        torch.tensor(exact, device=DEVICE, dtype=torch.float64) * weight.double(),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reference_rounds_as_hugging_face(dtype: torch.dtype) -> None:
    numbers = Numbers(1, dtype)
    module = LlamaRMSNorm(96, eps=1e-5).to(DEVICE, dtype)
    module.weight.data = numbers(96)
    x, residual = numbers(7, 96), numbers(7, 96)
    with torch.no_grad():
        assert torch.equal(rms_norm_reference(x, module.weight, 1e-5), module(x))
        expected = module(x + residual)
        assert torch.equal(add_rms_norm_reference(x, residual, module.weight, 1e-5), expected)
