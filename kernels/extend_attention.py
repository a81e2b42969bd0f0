"""Causal attention of several new tokens a row behind a prefix in the paged KV cache.

The prefix is gathered through the page table, without a mask; the new keys and values are read where the projection
left them, and only the tiles on the diagonal apply the causal mask. A program takes some tokens of one row with all
query heads that share a KV head, token by token: keys and values are loaded once for the group, and a row of few new
tokens still fills the tile.

Softmax is computed with powers of two (``scale`` times log2 e), online over tiles: Dao et al., arXiv 2205.14135.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import product
from math import e, log2
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from testbed.kernels.language import tl, triton
from testbed.kernels.measure import (
    AheadOfTime,
    benchmark,
    matmul_ceiling,
    median_us,
    print_row,
    share,
    teraflops_per_second,
)

SHARED_BYTES = 227 * 1024
"""What a block of an H100 can have; bounds the tiles that are tried."""
PAGE_SIZE = 16
"""Of the benchmark."""


class Tile(NamedTuple):
    """What a program computes at a time."""

    block_m: int
    """Queries: tokens times the heads of a group."""
    block_n: int
    """Tokens of KV."""
    stages: int
    warps: int


def tiles(head_dim: int, element_bytes: int, queries: int) -> Tile:
    """The tile for rows of at most so many ``queries``, new tokens times the heads of a group: the largest that leaves
    the registers unspilled. Unmeasured."""
    block_d = padded(head_dim)
    if element_bytes == 4:  # no tensor cores
        return Tile(32, 16, 2, 8)
    if block_d > 128:
        return Tile(128, 32, 2, 8)
    if queries <= 64:
        return Tile(64, 64, 3, 4)
    return Tile(128, 128 if block_d <= 64 else 64, 3, 8)


def padded(size: int) -> int:
    """The next size that ``tl.dot`` takes: a power of two, at least 16."""
    return max(16, int(triton.next_power_of_2(size)))


def extend_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    starts: Tensor,
    prefix_lens: Tensor,
    *,
    page_size: int,
    longest: int,
    scale: float,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Each new token attends to its row's prefix and to the row's new tokens up to itself: [t, h, d].

    q [t, h, d], k and v [t, kvh, d], the stride of a token free (k's is v's), heads and dimensions contiguous, as in
    ``out``; h a multiple of kvh, at most 32 times it; caches [pages * page_size, kvh, d], contiguous, of which only the
    prefixes are read; page_table int32 [slots + 1, pages]; slots, prefix_lens int32 [n]; starts int32 [n + 1]: row i
    has tokens ``starts[i] .. starts[i + 1] - 1``, at most ``longest``. ``scale`` is positive.
    """
    heads, head_dim = q.shape[1:]
    kv_heads = k.shape[1]
    group = heads // kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    tile = tile or tiles(head_dim, q.element_size(), longest * group)
    blocks = triton.cdiv(longest, tile.block_m // group)
    _extend_kernel[(blocks, kv_heads, len(slots))](
        q, k, v, k_cache, v_cache, page_table, slots, starts, prefix_lens, out,
        scale * log2(e), q.stride(0), k.stride(0), k_cache.stride(0), page_table.stride(0), out.stride(0),
        GROUP=group, HEAD_DIM=head_dim, PAGE_SIZE=page_size,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=padded(head_dim),
        num_stages=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out


@triton.jit
def _extend_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, page_table_ptr, slots_ptr, starts_ptr, prefix_lens_ptr, out_ptr,
    log2_scale, q_stride, kv_stride, cache_stride, table_stride, out_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``BLOCK_M // GROUP`` tokens of one row, all query heads of one KV head; the longest programs start first."""
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS
    kv_head = tl.program_id(1)
    row = tl.program_id(2)
    start = tl.load(starts_ptr + row)
    length = tl.load(starts_ptr + row + 1) - start
    if first >= length:
        return
    prefix = tl.load(prefix_lens_ptr + row)
    pages = page_table_ptr + tl.load(slots_ptr + row).to(tl.int64) * table_stride

    lane = tl.arange(0, BLOCK_M)
    token = first + lane // GROUP
    dim = tl.arange(0, BLOCK_D)
    mine = (lane < TOKENS * GROUP) & (token < length)
    inside = mine[:, None] & (dim < HEAD_DIM)[None, :]
    within = ((kv_head * GROUP + lane % GROUP) * HEAD_DIM)[:, None] + dim[None, :]
    at = (start + token).to(tl.int64)[:, None]
    q = tl.load(q_ptr + at * q_stride + within, inside, 0.0)

    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    values = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    column = kv_head * HEAD_DIM + dim[None, :]
    keys, vals = k_cache_ptr + column, v_cache_ptr + column
    whole = prefix // BLOCK_N * BLOCK_N
    peak, total, values = _attend(
        q, peak, total, values, keys, vals, cache_stride, pages, token, 0, whole, prefix, log2_scale,
        True, False, HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    peak, total, values = _attend(
        q, peak, total, values, keys, vals, cache_stride, pages, token, whole, prefix, prefix, log2_scale,
        True, True, HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    keys = k_ptr + start.to(tl.int64) * kv_stride + column
    vals = v_ptr + start.to(tl.int64) * kv_stride + column
    whole = first // BLOCK_N * BLOCK_N  # tiles that every token of this program sees in full
    end = tl.minimum(first + TOKENS, length)
    peak, total, values = _attend(
        q, peak, total, values, keys, vals, kv_stride, pages, token, 0, whole, length, log2_scale,
        False, False, HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    peak, total, values = _attend(
        q, peak, total, values, keys, vals, kv_stride, pages, token, whole, end, length, log2_scale,
        False, True, HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    out = (values / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at * out_stride + within, out, inside)


@triton.jit
def _attend(
    q, peak, total, values, keys, vals, stride, pages, token, begin, end, length, log2_scale,
    PAGED: tl.constexpr, EDGE: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles of KV from ``begin`` to ``end``. ``keys`` and ``vals`` point to token 0, for
    ``PAGED`` ones of the cache. ``EDGE``: tiles that reach beyond ``length`` or, among the new tokens, beyond the own
    ``token``; the first tile of all has a token for every query, so no peak stays -inf."""
    other = begin + tl.arange(0, BLOCK_N)
    known = tl.arange(0, BLOCK_D) < HEAD_DIM
    if PAGED:
        page = tl.load(pages + other // PAGE_SIZE, other < end, 0)
    for _ in range(begin, end, BLOCK_N):
        present = other < length
        place = other.to(tl.int64)
        if PAGED:
            place = page.to(tl.int64) * PAGE_SIZE + other % PAGE_SIZE
            page = tl.load(pages + (other + BLOCK_N) // PAGE_SIZE, other + BLOCK_N < end, 0)  # a tile ahead
        at = place[:, None] * stride
        if EDGE:
            k = tl.load(keys + at, present[:, None] & known[None, :], 0.0)
            v = tl.load(vals + at, present[:, None] & known[None, :], 0.0)
        elif BLOCK_D == HEAD_DIM:
            k = tl.load(keys + at)
            v = tl.load(vals + at)
        else:
            k = tl.load(keys + at, known[None, :], 0.0)
            v = tl.load(vals + at, known[None, :], 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if EDGE:
            seen = present[None, :] if PAGED else present[None, :] & (other[None, :] <= token[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1) * log2_scale)
        weights = tl.exp2(scores * log2_scale - higher[:, None])
        fade = tl.exp2(peak - higher)
        values = tl.dot(weights.to(v.dtype), v, values * fade[:, None], input_precision="ieee")
        total = total * fade + tl.sum(weights, axis=1)
        peak = higher
        other += BLOCK_N
    return peak, total, values


def extend_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    starts: Tensor,
    prefix_lens: Tensor,
    *,
    page_size: int,
    longest: int,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """As ``extend_attention``, in float32, row by row."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    bounds = starts.tolist()
    for row, (slot, prefix) in enumerate(zip(slots.tolist(), prefix_lens.tolist(), strict=True)):
        new = slice(bounds[row], bounds[row + 1])
        token = torch.arange(prefix, device=q.device)
        place = page_table[slot, token // page_size].long() * page_size + token % page_size
        keys, values = torch.cat([k_cache[place], k[new]]), torch.cat([v_cache[place], v[new]])
        out[new] = _causal_attention(q[new].float(), keys.float(), values.float(), scale).to(q.dtype)
    return out


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [t, h, d] are the last of the tokens of k and v [length, kvh, d]: [t, h, d]."""
    new, heads, head_dim = q.shape
    length, kv_heads = k.shape[:2]
    grouped = q.view(new, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)  # [kvh, group, t, d]
    keys, values = (kv.transpose(0, 1)[:, None].expand(-1, heads // kv_heads, -1, -1) for kv in (k, v))
    seen = None if new == 1 else torch.ones(new, length, dtype=torch.bool, device=q.device).tril(length - new)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen, scale=scale)
    return out.permute(2, 0, 1, 3).reshape(new, heads, head_dim)


def ahead_of_time() -> AheadOfTime:
    """Variants that must compile without a GPU."""
    integers = ("page_table_ptr", "slots_ptr", "starts_ptr", "prefix_lens_ptr")
    strides = ("q_stride", "kv_stride", "cache_stride", "table_stride", "out_stride")
    common = {"log2_scale": "fp32", **dict.fromkeys(integers, "*i32:16"), **dict.fromkeys(strides, "i32:16")}
    variants = [("bf16", 128, 4, 64), ("bf16", 128, 4, 8192), ("bf16", 128, 5, 8192), ("bf16", 64, 8, 8192)]
    variants += [("bf16", 80, 1, 64), ("bf16", 256, 2, 8192), ("fp32", 64, 7, 64), ("fp32", 128, 4, 64)]
    for dtype, head_dim, group, queries in variants:
        pointers = ("q_ptr", "k_ptr", "v_ptr", "k_cache_ptr", "v_cache_ptr", "out_ptr")
        tile = tiles(head_dim, 4 if dtype == "fp32" else 2, queries)
        constants = {"GROUP": group, "HEAD_DIM": head_dim, "PAGE_SIZE": 16, "BLOCK_D": padded(head_dim)}
        blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        options = {"num_stages": tile.stages, "num_warps": tile.warps}
        yield _extend_kernel, {**common, **dict.fromkeys(pointers, f"*{dtype}:16")}, {**constants, **blocks}, options


class _Case:
    """Rows of one length for a benchmark: random numbers, the prefix in random pages, k and v in a fused projection."""

    def __init__(self, rows: int, new: int, prefix: int, sizes: tuple[int, int, int], device: str = "cuda") -> None:
        heads, kv_heads, head_dim = sizes
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        fused = torch.randn(rows * new, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
        self.q, self.k, self.v = torch.split(fused, [heads, kv_heads, kv_heads], dim=1)
        count = triton.cdiv(prefix, PAGE_SIZE) + 1
        cache = (rows * count * PAGE_SIZE, kv_heads, head_dim)
        self.k_cache, self.v_cache = (torch.randn(cache, dtype=dtype, device=device) for _ in range(2))
        self.pages = torch.randperm(rows * count, device=device).int().view(rows, count)
        self.slots = torch.arange(rows, dtype=torch.int32, device=device)
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=device) * new
        self.prefix_lens = torch.full_like(self.slots, prefix)
        self.label, self.longest, self.scale = (rows, new, prefix, head_dim), new, head_dim**-0.5
        self.flops = 4 * heads * head_dim * rows * (new * prefix + new * (new + 1) / 2)
        lengths = (new, prefix + new)
        self.dense = [torch.randn(rows, heads, length, head_dim, dtype=dtype, device=device) for length in lengths]

    def attend(self, tile: Tile | None = None) -> Tensor:
        return extend_attention(
            self.q, self.k, self.v, self.k_cache, self.v_cache, self.pages, self.slots, self.starts, self.prefix_lens,
            page_size=PAGE_SIZE, longest=self.longest, scale=self.scale, tile=tile,
        )  # fmt: skip

    def torch_attend(self) -> Tensor:
        """The same work by torch, on dense tensors with a KV head for each query head."""
        q, kv = self.dense
        mask = causal_lower_right(q.shape[2], kv.shape[2])
        return F.scaled_dot_product_attention(q, kv, kv, attn_mask=mask, scale=self.scale)


def _cases() -> Iterator[_Case]:
    for new, prefix in product((16, 128, 512, 1024, 2048, 4096, 8192), (0, 4096)):
        yield _Case(max(1, 8192 // max(new, 512)), new, prefix, (32, 8, 128))
    yield _Case(2, 4096, 0, (32, 8, 64))


def _table() -> None:
    ceiling = matmul_ceiling()
    print(f"matrix product: {ceiling:.0f} TFLOP/s")
    print_row("rows", "new", "prefix", "head_dim", "us", "TFLOP/s", "of product", "torch us")
    for case in _cases():
        us = median_us(case.attend)
        rate = teraflops_per_second(case.flops, us)
        print_row(*case.label, us, rate, share(rate, ceiling), median_us(case.torch_attend))


def _tune() -> None:
    """The three fastest tiles of each case, for ``tiles``."""
    print_row("rows", "new", "prefix", "head_dim", "us", "block_m", "block_n", "stages", "warps")
    for case in _cases():
        timed = []
        for tile in map(Tile._make, product((64, 128), (32, 64, 128), (2, 3, 4), (4, 8))):
            if 2 * (tile.block_m + 2 * tile.stages * tile.block_n) * padded(case.label[3]) <= SHARED_BYTES:
                timed.append((median_us(partial(case.attend, tile)), tile))
        for us, tile in sorted(timed)[:3]:
            print_row(*case.label, us, *tile)


def _tiny() -> None:
    case = _Case(2, 5, 20, (4, 2, 16), "cpu")
    assert case.attend().shape == (10, 4, 16)
    assert case.torch_attend().shape == (2, 4, 5, 16)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time extend attention against a matrix product and torch.")
    parser.add_argument("--tune", action="store_true", help="time the tiles instead")
    benchmark(_tune if parser.parse_args().tune else _table, _tiny)
