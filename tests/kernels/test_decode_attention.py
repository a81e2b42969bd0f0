"""Decode attention against its reference, the reference against softmax written down, the plan against counting."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from testbed.kernels import decode_attention as module
from testbed.kernels.decode_attention import (
    GRAIN,
    DecodeScratch,
    Tile,
    decode_attention,
    decode_attention_reference,
    plan_splits,
)
from tests.kernels.inputs import Numbers, assert_near, dtypes, few, seeds
from tests.kernels.paged import EDGES, Paged, dense_attention, groups, head_dims, page_sizes

lengths_of_rows = st.lists(st.sampled_from(EDGES) | st.integers(1, 300), min_size=1, max_size=4)
NARROW = Tile(16, 1, 4)
"""So that short contexts have several tiles."""


class Rows:
    """A batch of decoding rows."""

    def __init__(
        self, seed: int, lengths: list[int], kv_heads: int, group: int, head_dim: int, page_size: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        numbers = Numbers(seed, dtype, device="cpu")
        self.paged = Paged(numbers, lengths, kv_heads, head_dim, page_size)
        self.q = numbers.rows(len(lengths), kv_heads * group * head_dim, gap=24).view(len(lengths), -1, head_dim)
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32)
        self.scale = head_dim**-0.5
        self.sizes = (kv_heads * group, kv_heads, head_dim)

    def arguments(self, device: str) -> tuple[Tensor, ...]:
        paged = self.paged
        tensors = (self.q, paged.k_cache, paged.v_cache, paged.page_table, paged.slots, self.seq_lens)
        return tuple(tensor.to(device) for tensor in tensors)

    def run(self, device: str, sms: int = 4, tile: Tile | None = NARROW, min_chunk: int = 16) -> tuple[Tensor, int]:
        """What the kernel gives, and the splits of the first row; beside the output nothing may be written."""
        batch = len(self.q)
        arguments = self.arguments(device)
        scratch = DecodeScratch(batch + 1, *self.sizes, device, sms, min_chunk)
        for partial in (scratch.peaks, scratch.sums, scratch.values):
            partial.fill_(torch.nan)
        around = torch.full((batch + 2, *self.q.shape[1:]), torch.nan, dtype=self.q.dtype, device=device)
        plan_splits(arguments[-1], scratch)
        decode_attention(*arguments, scratch=scratch, out=around[1:-1], tile=tile, **self.options())
        assert around[0].isnan().all() and around[-1].isnan().all()
        return around[1:-1].cpu(), int(scratch.firsts[1])

    def reference(self) -> Tensor:
        return decode_attention_reference(*self.arguments("cpu"), **self.options())

    def options(self) -> dict[str, Any]:
        return {"page_size": self.paged.page_size, "scale": self.scale}


@few
@given(seeds, lengths_of_rows, st.integers(1, 3), groups, head_dims, page_sizes, st.booleans())
def test_reference_is_softmax(
    seed: int, lengths: list[int], kv_heads: int, group: int, head_dim: int, page_size: int, apart: bool
) -> None:
    rows = Rows(seed, lengths, kv_heads, group, head_dim, page_size)
    paged = rows.paged
    with mock.patch.object(module, "REFERENCE_BYTES", 1 if apart else 1 << 22):  # one row at a time, or all
        out = rows.reference()
    expected = torch.cat(
        [dense_attention(rows.q[i : i + 1], paged.k[i], paged.v[i], rows.scale) for i in range(len(lengths))]
    )
    assert_near(out, expected.float())


@settings(few, max_examples=40)
@given(
    seeds, lengths_of_rows, st.integers(1, 2), groups, head_dims, page_sizes, dtypes, st.integers(1, 8),
    st.sampled_from([NARROW, Tile(64, 1, 4), None]),
)  # fmt: skip
def test_kernel_is_the_reference(
    device: str, seed: int, lengths: list[int], kv_heads: int, group: int, head_dim: int, page_size: int,
    dtype: torch.dtype, sms: int, tile: Tile | None,
) -> None:  # fmt: skip
    rows = Rows(seed, lengths, kv_heads, group, head_dim, page_size, dtype)
    assert_near(rows.run(device, sms, tile)[0], rows.reference())


def test_splits_do_not_matter(device: str) -> None:
    rows = Rows(5, [700, 64, 1, 65], kv_heads=2, group=3, head_dim=32, page_size=16)
    rows.q *= 5  # uneven weights: a wrong merge of two splits shows
    whole, splits = rows.run(device, sms=1, min_chunk=1024)
    assert splits == 1
    for sms, count in ((1, 2), (2, 3), (64, 11)):
        out, splits = rows.run(device, sms)
        assert splits == count
        assert_near(out, whole)
    assert_near(whole, rows.reference())


def test_more_splits_than_are_combined_at_once(device: str) -> None:
    rows = Rows(6, [60 * GRAIN - 1], kv_heads=2, group=4, head_dim=16, page_size=64)
    rows.q *= 5  # of eight heads some have their largest score late: what was combined before must fade
    out, splits = rows.run(device, sms=64, tile=Tile(64, 1, 4))
    assert splits == 60 > module.COMBINED
    assert_near(out, rows.reference())


def test_a_padding_row_disturbs_nobody(device: str) -> None:
    """It reads page 0, where others write what they like."""
    rows = Rows(7, [100, 30, 1], kv_heads=2, group=2, head_dim=16, page_size=16)
    paged = rows.paged
    alone = rows.run(device)[0]
    paged.page_table[paged.slots[2]] = 0
    paged.k_cache[:16], paged.v_cache[:16] = 1e4, 7.0
    out = rows.run(device)[0]
    assert torch.equal(out[:2], alone[:2]) and (out[2] == 7).all()


def test_huge_scores(device: str) -> None:
    """Nothing overflows: weights are relative to the largest score, across tiles and across splits."""
    rows = Rows(8, [200, 3], kv_heads=1, group=4, head_dim=16, page_size=3)
    rows.q *= 1e4
    out = rows.run(device, sms=16)[0]
    assert out.isfinite().all()
    assert_near(out, rows.reference(), scale=100.0)  # one unit in the last place of a score of 1e4 is 1e-3


@few
@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=20), st.integers(1, 140), st.integers(1, 16),
    st.sampled_from([16, 64, 100, 256]),
)  # fmt: skip
def test_plan_covers_every_token_once(
    device: str, seq_lens: list[int], sms: int, kv_heads: int, min_chunk: int
) -> None:
    scratch = DecodeScratch(24, kv_heads, kv_heads, 16, device, sms, min_chunk)
    plan_splits(torch.tensor(seq_lens, dtype=torch.int32, device=device), scratch)
    chunk = int(scratch.chunk)
    firsts, rows = scratch.firsts.tolist(), scratch.rows.tolist()
    least = max(min_chunk, sum(seq_lens) / scratch.wanted)
    assert chunk % GRAIN == 0 and least <= chunk < least + GRAIN
    covered = [0] * len(seq_lens)
    for segment in range(firsts[len(seq_lens)]):
        row = rows[segment]
        begin = (segment - firsts[row]) * chunk
        assert begin == covered[row] < seq_lens[row]
        covered[row] = min(begin + chunk, seq_lens[row])
    assert covered == seq_lens
    assert firsts[len(seq_lens)] <= scratch.segments(len(seq_lens)) <= len(rows)


def test_scratch_knows_its_batch(device: str) -> None:
    scratch = DecodeScratch(2, 4, 2, 16, device, sms=1)
    with pytest.raises(ValueError, match="3 rows, but the scratch is for 2"):
        plan_splits(torch.ones(3, dtype=torch.int32, device=device), scratch)
