"""Attention of one new token a row over the paged KV cache, split along the KV ("flash decoding").

A plan, made on the device once a step, cuts the rows' contexts into chunks of one length, so many that the programs
fill the device and each has about the same work. Stage 1 takes one chunk of one KV head for all query heads that share
it, stage 2 sums a row's chunks. Grids depend only on the batch size, so a captured CUDA graph serves any lengths.

Softmax is computed with powers of two (``scale`` times log2 e), online over tiles: Dao et al., arXiv 2205.14135; the
split over KV: Dao et al., "Flash-Decoding for long-context inference", 2023.
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

from testbed.kernels.language import tl, triton
from testbed.kernels.measure import (
    AheadOfTime,
    benchmark,
    copy_ceiling,
    gigabytes_per_second,
    median_us,
    print_row,
    share,
)

PROGRAMS_PER_SM = 4
"""Stage-1 programs for each multiprocessor: for head_dim 64 and 128 in bfloat16 three are there at a time (70 KiB of
shared memory each, as compiled), and one more evens out the rows' ends. Unmeasured."""
MIN_CHUNK = 256
"""Tokens: below it a chunk's fixed cost exceeds what one more program gains."""
GRAIN = 64
"""Chunks are multiples of it, so that few tiles are cut."""
TILE_ELEMENTS = {2: 8192, 4: 2048}
"""Of keys, and again of values, in a tile of stage 1, by bytes of an element: float32, which no tensor core multiplies
exactly, spills registers beyond. Unmeasured, as are ``STAGES`` and ``WARPS``."""
STAGES = 3
WARPS = 4
COMBINED = 32
"""Splits that stage 2 takes at once."""
SHARED_BYTES = 227 * 1024
"""What a block of an H100 can have; bounds the tiles that are tried."""
PAGE_SIZE = 16
"""Of the benchmark."""
REFERENCE_BYTES = 1 << 22
"""The reference gathers about so much of keys and values at a time: what a cache holds is gathered fastest."""


class Tile(NamedTuple):
    """How stage 1 walks a chunk."""

    block_n: int
    """Tokens at a time."""
    stages: int
    warps: int


def tiles(head_dim: int, element_bytes: int) -> Tile:
    """Stage 1's tile: enough bytes in flight to hide memory's latency, few enough that programs share an SM."""
    block_n = TILE_ELEMENTS[element_bytes] // padded(head_dim)
    return Tile(min(max(block_n, 16), 128), STAGES, WARPS)


def padded(size: int) -> int:
    """The next size that ``tl.dot`` takes: a power of two, at least 16."""
    return max(16, int(triton.next_power_of_2(size)))


class DecodeScratch:
    """The plan of a step and the partial results of its splits, allocated once, shared by all layers and graphs.

    ``firsts`` int32 [max_batch + 1]: row i's segments are ``firsts[i] .. firsts[i + 1] - 1``; ``rows`` int32
    [segments]: whose each is; ``chunk`` int32 [1]: tokens of a segment. float32 ``peaks`` and ``sums`` [segments,
    heads], ``values`` [segments, heads, d]: largest score (times log2 e), sum of weights, weighted sum of values.
    """

    def __init__(
        self,
        max_batch: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        sms: int,
        min_chunk: int = MIN_CHUNK,
    ) -> None:
        """``sms``: multiprocessors of the device. ``min_chunk``: tokens of a segment at least, if its row has them."""
        self.max_batch = max_batch
        self.min_chunk = min_chunk
        self.wanted = -(-sms * PROGRAMS_PER_SM // kv_heads)
        segments = self.segments(max_batch)
        self.firsts = torch.zeros(max_batch + 1, dtype=torch.int32, device=device)
        self.rows = torch.zeros(segments, dtype=torch.int32, device=device)
        self.chunk = torch.zeros(1, dtype=torch.int32, device=device)
        self.peaks = torch.empty(segments, heads, dtype=torch.float32, device=device)
        self.sums = torch.empty_like(self.peaks)
        self.values = torch.empty(segments, heads, head_dim, dtype=torch.float32, device=device)

    def segments(self, batch: int) -> int:
        """At most so many: a chunk is no shorter than total / wanted, so that sum of ceil(length / chunk) is at most
        wanted + batch."""
        return batch + self.wanted


def plan_splits(seq_lens: Tensor, scratch: DecodeScratch) -> None:
    """Cut the contexts ``seq_lens``, int32 [b], into the segments of ``scratch``: once a step, before its first layer.

    Runs on the device, without the host knowing the lengths. Raises ValueError for more rows than the scratch is for.
    """
    if len(seq_lens) > scratch.max_batch:
        raise ValueError(f"{len(seq_lens)} rows, but the scratch is for {scratch.max_batch}")
    _plan_kernel[(1,)](
        seq_lens, scratch.firsts, scratch.rows, scratch.chunk, len(seq_lens), scratch.wanted, scratch.min_chunk,
        GRAIN=GRAIN, BATCH=triton.next_power_of_2(scratch.max_batch), num_warps=4,
    )  # fmt: skip


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    *,
    page_size: int,
    scale: float,
    scratch: DecodeScratch,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Softmax attention of each row's one query over the first ``seq_lens`` tokens of its slot: [b, h, d].

    q [b, h, d], the stride of a row free, heads and dimensions contiguous, as in ``out``; h a multiple of kvh; caches
    [pages * page_size, kvh, d], contiguous; page_table int32 [slots + 1, pages]; slots, seq_lens int32 [b], lengths at
    least 1. ``scale`` is positive. ``plan_splits`` of the same ``seq_lens`` must have been called before.
    """
    batch, heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    out = torch.empty((batch, heads, head_dim), dtype=q.dtype, device=q.device) if out is None else out
    tile = tile or tiles(head_dim, q.element_size())
    group, block_d = heads // kv_heads, padded(head_dim)
    partials = (scratch.firsts, scratch.peaks, scratch.sums, scratch.values)
    _split_kernel[(kv_heads, scratch.segments(batch))](
        q, k_cache, v_cache, page_table, slots, seq_lens, scratch.rows, scratch.chunk, *partials, out,
        batch, scale * log2(e), q.stride(0), k_cache.stride(0), page_table.stride(0), out.stride(0),
        GROUP=group, HEAD_DIM=head_dim, PAGE_SIZE=page_size,
        BLOCK_H=padded(group), BLOCK_N=tile.block_n, BLOCK_D=block_d, num_stages=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    _combine_kernel[(heads, batch)](
        *partials, out, out.stride(0), HEADS=heads, HEAD_DIM=head_dim, BLOCK_S=COMBINED, BLOCK_D=block_d, num_warps=4
    )
    return out


@triton.jit(do_not_specialize=["batch", "wanted", "min_chunk"])
def _plan_kernel(
    seq_lens_ptr, firsts_ptr, rows_ptr, chunk_ptr, batch, wanted, min_chunk, GRAIN: tl.constexpr, BATCH: tl.constexpr
):  # fmt: skip
    """One program. The chunk is the batch's tokens over the wanted segments, and every row is cut by it."""
    row = tl.arange(0, BATCH)
    seq_lens = tl.load(seq_lens_ptr + row, row < batch, 0)
    total = tl.sum(seq_lens.to(tl.int64), axis=0)
    chunk = tl.maximum(tl.cdiv(total, wanted), min_chunk).to(tl.int32)
    chunk = tl.cdiv(chunk, GRAIN) * GRAIN
    splits = tl.cdiv(seq_lens, chunk)
    ends = tl.cumsum(splits, axis=0)
    tl.store(chunk_ptr, chunk)
    tl.store(firsts_ptr, 0)
    tl.store(firsts_ptr + 1 + row, ends, row < batch)
    most = tl.max(splits, axis=0)
    split = 0
    while split < most:
        tl.store(rows_ptr + ends - splits + split, row, split < splits)
        split += 1


@triton.jit(do_not_specialize=["batch"])
def _split_kernel(
    q_ptr, k_ptr, v_ptr, page_table_ptr, slots_ptr, seq_lens_ptr, rows_ptr, chunk_ptr,
    firsts_ptr, peaks_ptr, sums_ptr, values_ptr, out_ptr,
    batch, log2_scale, q_stride, kv_stride, table_stride, out_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Stage 1: one segment of one KV head, for the ``GROUP`` query heads that share it."""
    kv_head = tl.program_id(0)
    segment = tl.program_id(1)
    if segment >= tl.load(firsts_ptr + batch):
        return
    row = tl.load(rows_ptr + segment)
    first = tl.load(firsts_ptr + row)
    begin = (segment - first) * tl.load(chunk_ptr)
    end = tl.minimum(begin + tl.load(chunk_ptr), tl.load(seq_lens_ptr + row))
    pages = page_table_ptr + tl.load(slots_ptr + row).to(tl.int64) * table_stride

    member = tl.arange(0, BLOCK_H)
    head = kv_head * GROUP + member
    dim = tl.arange(0, BLOCK_D)
    inside = (member < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    within = head[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(q_ptr + row.to(tl.int64) * q_stride + within, inside, 0.0)

    peak = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    values = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    token = begin + tl.arange(0, BLOCK_N)
    page = tl.load(pages + token // PAGE_SIZE, token < end, 0)
    for _ in range(begin, end, BLOCK_N):
        present = token < end  # of the first tile at least one: no row of scores is all -inf
        place = (page.to(tl.int64) * PAGE_SIZE + token % PAGE_SIZE) * kv_stride + kv_head * HEAD_DIM
        at = place[:, None] + dim[None, :]
        token += BLOCK_N
        page = tl.load(pages + token // PAGE_SIZE, token < end, 0)  # a tile ahead: no load waits for another
        exists = present[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + at, exists, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale
        scores = tl.where(present[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(peak - higher)
        v = tl.load(v_ptr + at, exists, 0.0)
        values = tl.dot(weights.to(v.dtype), v, values * fade[:, None], input_precision="ieee")
        total = total * fade + tl.sum(weights, axis=1)
        peak = higher

    if tl.load(firsts_ptr + row + 1) - first == 1:  # the row's only segment: nothing to combine
        out = (values / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row.to(tl.int64) * out_stride + within, out, inside)
    else:
        partial = segment * (tl.num_programs(0) * GROUP) + head
        tl.store(peaks_ptr + partial, peak, member < GROUP)
        tl.store(sums_ptr + partial, total, member < GROUP)
        tl.store(values_ptr + partial.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :], values, inside)


@triton.jit
def _combine_kernel(
    firsts_ptr, peaks_ptr, sums_ptr, values_ptr, out_ptr, out_stride,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Stage 2: one query head of one row; weights of segments are relative to the largest score of all."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    begin = tl.load(firsts_ptr + row)
    end = tl.load(firsts_ptr + row + 1)
    if end - begin == 1:
        return
    dim = tl.arange(0, BLOCK_D)
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    values = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(begin, end, BLOCK_S):
        segment = start + tl.arange(0, BLOCK_S)
        partial = segment * HEADS + head
        peaks = tl.load(peaks_ptr + partial, segment < end, float("-inf"))
        sums = tl.load(sums_ptr + partial, segment < end, 0.0)
        exists = (segment < end)[:, None] & (dim < HEAD_DIM)[None, :]
        parts = tl.load(values_ptr + partial.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :], exists, 0.0)
        higher = tl.maximum(peak, tl.max(peaks, axis=0))
        weights = tl.exp2(peaks - higher)
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.sum(weights * sums, axis=0)
        values = values * fade + tl.sum(weights[:, None] * parts, axis=0)
        peak = higher
    out = (values / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row.to(tl.int64) * out_stride + head * HEAD_DIM + dim, out, dim < HEAD_DIM)


def decode_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
    *,
    page_size: int,
    scale: float,
    scratch: DecodeScratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As ``decode_attention``, in float32; needs no plan. Rows of similar length are computed together."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    token_bytes = 8 * k_cache[0].numel()  # keys and values in float32
    order = seq_lens.argsort(descending=True)
    lengths = seq_lens[order].tolist()
    first = 0
    while first < len(lengths):
        together = order[first : first + max(1, REFERENCE_BYTES // (lengths[first] * token_bytes))]
        pages = page_table[:, : -(-lengths[first] // page_size)][slots[together]]  # a row of the table is long
        tokens = _locations(pages, seq_lens[together], lengths[first], page_size)
        out[together] = _padded_attention(q[together], k_cache, v_cache, tokens, seq_lens[together], scale).to(q.dtype)
        first += len(together)
    return out


def _locations(pages: Tensor, seq_lens: Tensor, longest: int, page_size: int) -> Tensor:
    """Where the rows' tokens are in the cache, int64 [b, longest]; beyond a row's end its last token again."""
    token = torch.arange(longest, device=pages.device).minimum(seq_lens[:, None] - 1)
    return pages.gather(1, token // page_size).long() * page_size + token % page_size


def _padded_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, tokens: Tensor, seq_lens: Tensor, scale: float
) -> Tensor:
    """The query heads that share a KV head stand where several queries of one head would: nothing is repeated."""
    batch, longest = tokens.shape
    kv_heads, head_dim = k_cache.shape[1:]
    grouped = q.float().view(batch, kv_heads, -1, head_dim)
    k, v = (
        cache.index_select(0, tokens.flatten()).float().view(batch, longest, kv_heads, head_dim).transpose(1, 2)
        for cache in (k_cache, v_cache)
    )
    present = torch.arange(longest, device=q.device) < seq_lens[:, None]
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=present[:, None, None], scale=scale)
    return out.reshape(q.shape)


def ahead_of_time() -> AheadOfTime:
    """Variants that must compile without a GPU."""
    plan = dict.fromkeys(("seq_lens_ptr", "firsts_ptr", "rows_ptr", "chunk_ptr"), "*i32:16")
    numbers = {"batch": "i32", "wanted": "i32", "min_chunk": "i32"}
    yield _plan_kernel, {**plan, **numbers}, {"GRAIN": GRAIN, "BATCH": 256}, {"num_warps": 4}
    partials = dict.fromkeys(("peaks_ptr", "sums_ptr", "values_ptr"), "*fp32:16")
    pages = dict.fromkeys(("page_table_ptr", "slots_ptr"), "*i32:16")
    strides = dict.fromkeys(("q_stride", "kv_stride", "table_stride", "out_stride"), "i32:16")
    shapes = [("bf16", 128, 4), ("bf16", 128, 8), ("bf16", 64, 4), ("bf16", 80, 1), ("bf16", 256, 2)]
    shapes += [("fp32", 64, 7), ("fp32", 128, 4)]
    for dtype, head_dim, group in shapes:
        tensors = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}:16")
        signature = {**plan, **partials, **pages, **strides, **tensors, "batch": "i32", "log2_scale": "fp32"}
        tile = tiles(head_dim, 4 if dtype == "fp32" else 2)
        constants = {"GROUP": group, "HEAD_DIM": head_dim, "PAGE_SIZE": 16, "BLOCK_H": padded(group)}
        blocks = {"BLOCK_N": tile.block_n, "BLOCK_D": padded(head_dim)}
        options = {"num_stages": tile.stages, "num_warps": tile.warps}
        yield _split_kernel, signature, {**constants, **blocks}, options
        signature = {"firsts_ptr": "*i32:16", **partials, "out_ptr": f"*{dtype}:16", "out_stride": "i32:16"}
        constants = {"HEADS": 8 * group, "HEAD_DIM": head_dim, "BLOCK_S": COMBINED, "BLOCK_D": padded(head_dim)}
        yield _combine_kernel, signature, constants, {"num_warps": 4}


class _Case:
    """A batch of a benchmark: random numbers in random pages."""

    def __init__(self, seq_lens: list[int], heads: int, kv_heads: int, head_dim: int, device: str = "cuda") -> None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.label = (len(seq_lens), sum(seq_lens) // len(seq_lens), max(seq_lens), head_dim)
        batch, longest = len(seq_lens), triton.cdiv(max(seq_lens), PAGE_SIZE)
        cache = (batch * longest * PAGE_SIZE, kv_heads, head_dim)
        self.q = torch.randn(batch, heads, head_dim, dtype=dtype, device=device)
        self.k, self.v = (torch.randn(cache, dtype=dtype, device=device) for _ in range(2))
        self.pages = torch.randperm(batch * longest, device=device).int().view(batch, longest)
        self.slots = torch.arange(batch, dtype=torch.int32, device=device)
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
        sms = torch.cuda.get_device_properties(device).multi_processor_count if device == "cuda" else 4
        self.scratch = DecodeScratch(batch, heads, kv_heads, head_dim, device, sms)
        self.moved = 2 * sum(seq_lens) * kv_heads * head_dim * dtype.itemsize + 2 * self.q.nbytes

    def plan(self) -> None:
        plan_splits(self.seq_lens, self.scratch)

    def attend(self, tile: Tile | None = None) -> Tensor:
        """The scratch must hold the plan."""
        return decode_attention(
            self.q, self.k, self.v, self.pages, self.slots, self.seq_lens,
            page_size=PAGE_SIZE, scale=self.q.shape[-1] ** -0.5, scratch=self.scratch, tile=tile,
        )  # fmt: skip


def _cases() -> Iterator[_Case]:
    for batch, context in ((1, 1024), (1, 8192), (1, 32768), (1, 131072), (8, 32768), (16, 4096), (64, 1024),
                           (64, 4096), (64, 16384), (256, 256), (256, 1024), (256, 4096)):  # fmt: skip
        yield _Case([context] * batch, 32, 8, 128)
    yield _Case([65536, *[1024] * 255], 32, 8, 128)  # one long row among short ones
    yield _Case([4096] * 64, 16, 8, 64)


def _table() -> None:
    ceiling = copy_ceiling()
    print(f"copy: {ceiling:.0f} GB/s")
    print_row("rows", "mean context", "longest", "head_dim", "plan us", "us", "GB/s", "of copy")
    for case in _cases():
        planned = median_us(case.plan)
        us = median_us(case.attend)
        rate = gigabytes_per_second(case.moved, us)
        print_row(*case.label, planned, us, rate, share(rate, ceiling))


def _tune() -> None:
    """The three fastest tiles of each case, for ``tiles`` and its constants."""
    print_row("rows", "mean context", "longest", "head_dim", "us", "block_n", "stages", "warps")
    for case in _cases():
        case.plan()
        timed = []
        for tile in map(Tile._make, product((16, 32, 64, 128), (2, 3, 4, 5), (2, 4, 8))):
            if 2 * tile.stages * tile.block_n * padded(case.q.shape[-1]) * case.q.element_size() <= SHARED_BYTES:
                timed.append((median_us(partial(case.attend, tile)), tile))
        for us, tile in sorted(timed)[:3]:
            print_row(*case.label, us, *tile)


def _tiny() -> None:
    case = _Case([300, 1], 4, 2, 16, "cpu")
    case.plan()
    case.attend()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time decode attention against the speed of a copy.")
    parser.add_argument("--tune", action="store_true", help="time stage 1's tiles instead")
    benchmark(_tune if parser.parse_args().tune else _table, _tiny)
