"""Extend attention against its reference, the reference against softmax written down."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from testbed.kernels.extend_attention import Tile, extend_attention, extend_attention_reference
from tests.kernels.inputs import Numbers, assert_near, dtypes, few, seeds
from tests.kernels.paged import EDGES, Paged, dense_attention, groups, head_dims, page_sizes

Lengths = list[tuple[int, int]]
"""(prefix, new tokens) of each row."""

prefixes = st.just(0) | st.sampled_from(EDGES[:-2]) | st.integers(0, 150)
news = st.sampled_from((1, 2, 16, 33)) | st.integers(1, 70)
lengths_of_rows = st.lists(st.tuples(prefixes, news), min_size=1, max_size=3)
NARROW = Tile(32, 16, 1, 4)
"""So that short rows have several tiles, whole ones and edges."""


class Rows:
    """Prefilling rows: q, k and v are views of one projection, behind the tokens of somebody else."""

    def __init__(
        self, seed: int, lengths: Lengths, kv_heads: int, group: int, head_dim: int, page_size: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        numbers = Numbers(seed, dtype, device="cpu")
        self.lengths = lengths
        self.paged = Paged(numbers, [prefix for prefix, _ in lengths], kv_heads, head_dim, page_size)
        ends = torch.tensor([new for _, new in lengths]).cumsum(0).tolist()
        self.bounds = [2 + end for end in (0, *ends)]
        heads = kv_heads * group
        fused = numbers(self.bounds[-1] + 2, heads + 2 * kv_heads, head_dim)
        fused[:2] = fused[-2:] = torch.nan
        self.q, self.k, self.v = fused.split([heads, kv_heads, kv_heads], dim=1)
        self.scale = head_dim**-0.5

    def arguments(self, device: str) -> tuple[Tensor, ...]:
        paged = self.paged
        starts = torch.tensor(self.bounds, dtype=torch.int32)
        prefix_lens = torch.tensor([prefix for prefix, _ in self.lengths], dtype=torch.int32)
        tensors = (self.q, self.k, self.v, paged.k_cache, paged.v_cache, paged.page_table, paged.slots)
        return tuple(tensor.to(device) for tensor in (*tensors, starts, prefix_lens))

    def options(self) -> dict[str, Any]:
        longest = max(new for _, new in self.lengths)
        return {"page_size": self.paged.page_size, "longest": longest, "scale": self.scale}

    def run(self, device: str, tile: Tile | None = NARROW) -> Tensor:
        """What the kernel gives: beside the rows' tokens nothing may be written."""
        out = torch.full(self.q.shape, torch.nan, dtype=self.q.dtype, device=device)
        extend_attention(*self.arguments(device), tile=tile, out=out, **self.options())
        assert out[:2].isnan().all() and out[-2:].isnan().all()
        return out[2:-2].cpu()

    def reference(self) -> Tensor:
        out = torch.full(self.q.shape, torch.nan, dtype=self.q.dtype)
        extend_attention_reference(*self.arguments("cpu"), out=out, **self.options())
        assert out[:2].isnan().all() and out[-2:].isnan().all()
        return out[2:-2]


@few
@given(seeds, lengths_of_rows, st.integers(1, 2), st.sampled_from([1, 2, 3, 7]), head_dims, page_sizes)
def test_reference_is_softmax(
    seed: int, lengths: Lengths, kv_heads: int, group: int, head_dim: int, page_size: int
) -> None:
    rows = Rows(seed, lengths, kv_heads, group, head_dim, page_size)
    expected = []
    for row, (begin, end) in enumerate(zip(rows.bounds, rows.bounds[1:], strict=False)):
        k, v = torch.cat([rows.paged.k[row], rows.k[begin:end]]), torch.cat([rows.paged.v[row], rows.v[begin:end]])
        expected.append(dense_attention(rows.q[begin:end], k, v, rows.scale))
    assert_near(rows.reference(), torch.cat(expected).float())


@settings(few, max_examples=40)
@given(
    seeds, lengths_of_rows, st.integers(1, 2), groups, head_dims, page_sizes, dtypes,
    st.sampled_from([NARROW, Tile(64, 64, 1, 4), None]),
)  # fmt: skip
@example(1, [(0, 1)], 1, 1, 16, 1, torch.float32, NARROW)
@example(2, [(64, 64), (0, 128), (16, 1)], 2, 4, 32, 16, torch.float32, NARROW)  # tiles end where lengths do
@example(3, [(0, 40)], 1, 5, 16, 16, torch.float32, Tile(16, 16, 1, 4))  # a program's last token alone begins a tile
def test_kernel_is_the_reference(
    device: str, seed: int, lengths: Lengths, kv_heads: int, group: int, head_dim: int, page_size: int,
    dtype: torch.dtype, tile: Tile | None,
) -> None:  # fmt: skip
    rows = Rows(seed, lengths, kv_heads, group, head_dim, page_size, dtype)
    assert_near(rows.run(device, tile), rows.reference())


def test_wide_tiles_with_a_short_row_beside_a_long_one(device: str) -> None:
    """As on a GPU: the long row has tiles of 128 queries, and the short one has whole programs without a token."""
    rows = Rows(3, [(70, 90), (5, 3)], kv_heads=1, group=4, head_dim=64, page_size=16, dtype=torch.float16)
    assert_near(rows.run(device, None), rows.reference())


def test_later_tokens_are_unseen(device: str) -> None:
    """Whatever follows a token changes nothing for it, to the bit."""
    rows = Rows(4, [(20, 50)], kv_heads=1, group=3, head_dim=16, page_size=3)
    before = rows.run(device)
    for tensor in (rows.q, rows.k, rows.v):
        tensor[2 + 31 : -2] = 100.0
    after = rows.run(device)
    assert torch.equal(before[:31], after[:31]) and not torch.equal(before[31:], after[31:])


def test_huge_scores(device: str) -> None:
    """Nothing overflows: weights are relative to the largest score so far."""
    rows = Rows(5, [(40, 40), (0, 3)], kv_heads=1, group=4, head_dim=16, page_size=3)
    rows.q *= 1e4
    out = rows.run(device)
    assert out.isfinite().all()
    assert_near(out, rows.reference(), scale=100.0)  # one unit in the last place of a score of 1e4 is 1e-3
