"""The gate against its reference, the reference against the formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from testbed.kernels.silu_mul import silu_and_mul, silu_and_mul_reference
from tests.kernels.inputs import DEVICE, Numbers, assert_near, dtypes, few, poisoned, seeds


@few
@given(tokens=st.integers(1, 6), width=st.integers(1, 200), gap=st.integers(0, 5), dtype=dtypes, seed=seeds)
@example(tokens=2, width=1500, gap=0, dtype=torch.float16, seed=0)  # several programs a row
def test_gate_equals_its_reference(tokens: int, width: int, gap: int, dtype: torch.dtype, seed: int) -> None:
    gate_up = Numbers(seed, dtype).rows(tokens, 2 * width, gap) * 4
    with poisoned():
        out = silu_and_mul(gate_up)
    assert_near(out, silu_and_mul_reference(gate_up))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy says so; a GPU does not
def test_large_gates_neither_overflow_nor_vanish() -> None:
    gate_up = torch.tensor([[-1e4, -100.0, -1.0, 0.0, 100.0, 1e4, *[2.0] * 6]], device=DEVICE)
    assert_near(silu_and_mul(gate_up), silu_and_mul_reference(gate_up))


@few
@given(values=st.lists(st.tuples(st.floats(-30, 30), st.floats(-3, 3)), min_size=1, max_size=20))
def test_reference_is_the_formula(values: list[tuple[float, float]]) -> None:
    gate, up = zip(*values, strict=True)
    exact = [g / (1 + math.exp(-g)) * u for g, u in values]
    out = silu_and_mul_reference(torch.tensor([[*gate, *up]]))
    torch.testing.assert_close(out, torch.tensor([exact]), rtol=1e-5, atol=1e-6)
