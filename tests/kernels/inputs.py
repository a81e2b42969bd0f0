"""What the tests of the kernels share: random numbers, awkward strides, outputs that nobody may leave unwritten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from testbed.kernels.interpreter import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"

few = settings(max_examples=20, deadline=None, derandomize=True)
dtypes = st.sampled_from([torch.float32, torch.float16])
seeds = st.integers(0, 2**32)


class Numbers:
    """Random tensors, normal ones unless said otherwise, one after the other from a seed; where the kernels run, unless
    a test builds its inputs elsewhere."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.device = device

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=self.generator)).to(self.device, self.dtype)

    def rows(self, rows: int, width: int, gap: int) -> Tensor:
        """[rows, width], a view of wider rows."""
        return self(rows, width + gap)[:, :width]

    def permutation(self, length: int) -> Tensor:
        return torch.randperm(length, generator=self.generator).to(self.device)

    def integers(self, end: int, *shape: int) -> Tensor:
        return torch.randint(end, shape, generator=self.generator).to(self.device)


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are full of NaN, or of a number that no index has."""
    empty = torch.empty

    def poison(*shape: Any, **options: Any) -> Tensor:
        tensor = empty(*shape, **options)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)

    with mock.patch("torch.empty", poison):
        yield


def assert_near(value: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """Equal but for the dtype's rounding: sums of another order, of terms up to about ``scale``. NaN equals NaN."""
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3}[value.dtype]
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=scale * tolerance, equal_nan=True)
