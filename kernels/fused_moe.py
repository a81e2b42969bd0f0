"""Mixture of experts without a word from the host: route, sort by expert, two grouped products, combine.

All sizes follow from the number of tokens, so the grids are fixed and a CUDA graph can hold them. A *pair* is a token
and one of its ``top_k`` experts: pair ``p`` belongs to token ``p // top_k``. The rows of a product are pairs sorted by
expert, those of an expert padded to whole blocks, so that a block needs the weights of one expert only. No sum depends
on the order in which programs run.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from testbed.kernels.language import tl, triton
from testbed.kernels.measure import (
    AheadOfTime,
    benchmark,
    copy_ceiling,
    gigabytes_per_second,
    matmul_ceiling,
    median_us,
    print_row,
    share,
    teraflops_per_second,
)
from testbed.kernels.silu_mul import silu_and_mul, silu_and_mul_reference

SORT_BLOCK = 2048
COMBINE_BLOCK = 1024


@triton.jit
def _route_kernel(
    logits_ptr, weights_ptr, experts_ptr, stride,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    rank = tl.arange(0, BLOCK_K)
    logits = tl.load(logits_ptr + token * stride + expert, expert < EXPERTS, float("-inf")).to(tl.float32)
    odds = tl.exp(logits - tl.max(logits, axis=0))
    weights = tl.zeros((BLOCK_K,), tl.float32)
    chosen = tl.zeros((BLOCK_K,), tl.int32)
    left = logits
    for i in tl.static_range(TOP_K):
        best = tl.argmax(left, axis=0)
        weights = tl.where(rank == i, tl.sum(tl.where(expert == best, odds, 0.0), axis=0), weights)
        chosen = tl.where(rank == i, best, chosen)
        left = tl.where(expert == best, float("-inf"), left)
    weights = weights / (tl.sum(weights, axis=0) if RENORMALIZE else tl.sum(odds, axis=0))
    tl.store(weights_ptr + token * TOP_K + rank, weights, rank < TOP_K)
    tl.store(experts_ptr + token * TOP_K + rank, chosen, rank < TOP_K)


def route(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Of router_logits [t, experts] the softmax in float32 and of it the ``top_k`` largest, largest first, the lower
    expert at ties; with ``renormalize`` scaled to sum to one. Weights float32 [t, top_k], experts int32 [t, top_k]."""
    tokens, experts = router_logits.shape
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=router_logits.device)
    chosen = torch.empty((tokens, top_k), dtype=torch.int32, device=router_logits.device)
    _route_kernel[(tokens,)](
        router_logits, weights, chosen, router_logits.stride(0),
        EXPERTS=experts, TOP_K=top_k, RENORMALIZE=renormalize,
        BLOCK_E=triton.next_power_of_2(experts), BLOCK_K=triton.next_power_of_2(top_k), num_warps=1,
    )  # fmt: skip
    return weights, chosen


def route_reference(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """As ``route``."""
    weights = router_logits.float().softmax(dim=-1)
    chosen = router_logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = weights.gather(1, chosen)
    if renormalize:
        weights /= weights.sum(dim=-1, keepdim=True)
    return weights, chosen.to(torch.int32)


@triton.jit(do_not_specialize=["pairs"])
def _sort_kernel(
    experts_ptr, sorted_ptr, block_expert_ptr, used_ptr, pairs,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program an expert: all count all pairs, then each writes its own, in their order, and its blocks."""
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    start = 0
    while start < pairs:
        # Lanes beyond the last pair count for a bin that no expert has.
        counts += tl.histogram(tl.load(experts_ptr + start + lane, start + lane < pairs, EXPERTS), BINS)
        start += BLOCK
    padded = tl.where(bins < EXPERTS, (counts + BLOCK_M - 1) // BLOCK_M * BLOCK_M, 0)
    first = tl.sum(tl.where(bins < expert, padded, 0), axis=0)
    end = first + tl.sum(tl.where(bins == expert, padded, 0), axis=0)
    position = first
    start = 0
    while start < pairs:
        mine = tl.load(experts_ptr + start + lane, start + lane < pairs, EXPERTS) == expert
        rank = tl.cumsum(mine.to(tl.int32), axis=0)
        tl.store(sorted_ptr + position + rank - 1, start + lane, mine)
        position += tl.sum(mine.to(tl.int32), axis=0)
        start += BLOCK
    padding = position + tl.arange(0, BLOCK_M)
    tl.store(sorted_ptr + padding, pairs, padding < end)
    block = first // BLOCK_M
    while block < end // BLOCK_M:
        tl.store(block_expert_ptr + block + lane, expert, block + lane < end // BLOCK_M)
        block += BLOCK
    if expert == EXPERTS - 1:
        tl.store(used_ptr, end // BLOCK_M)


def sort_by_expert(chosen: Tensor, experts: int, block_m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of chosen int32 [t, top_k] by expert, a counting sort on the device.

    Returns the sorted pairs, int32 [blocks * block_m], where padding is the number of pairs; the expert of each block,
    int32 [blocks]; and how many blocks are used, int32 [1]. Beyond those the content is undefined.
    """
    pairs = chosen.numel()
    blocks = (pairs + min(experts, pairs) * (block_m - 1)) // block_m
    ordered = torch.empty(blocks * block_m, dtype=torch.int32, device=chosen.device)
    block_expert = torch.empty(blocks, dtype=torch.int32, device=chosen.device)
    used = torch.empty(1, dtype=torch.int32, device=chosen.device)
    _sort_kernel[(experts,)](
        chosen, ordered, block_expert, used, pairs,
        EXPERTS=experts, BLOCK_M=block_m, BINS=triton.next_power_of_2(experts + 1), BLOCK=SORT_BLOCK, num_warps=8,
    )  # fmt: skip
    return ordered, block_expert, used


def sort_by_expert_reference(chosen: Tensor, experts: int, block_m: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``sort_by_expert``, cut to the used blocks."""
    flat = chosen.flatten()
    runs, owners = [], []
    for expert in range(experts):
        pairs = (flat == expert).nonzero().flatten()
        blocks = triton.cdiv(len(pairs), block_m)
        runs.append(F.pad(pairs, (0, blocks * block_m - len(pairs)), value=len(flat)))
        owners += [expert] * blocks
    return torch.cat(runs).int(), chosen.new_tensor(owners), chosen.new_tensor([len(owners)])


@triton.jit(do_not_specialize=["pairs", "blocks"])
def _grouped_gemm_kernel(
    x_ptr, weight_ptr, out_ptr, sorted_ptr, block_expert_ptr, used_ptr, pairs, blocks, outputs, x_stride,
    INNER: tl.constexpr, SHARED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(outputs, BLOCK_N)
    # Neighbours in time share rows or weights: eight blocks of rows pass together over the columns.
    block, n_block = tl.swizzle2d(tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks, blocks, n_blocks, 8)
    if block >= tl.load(used_ptr):
        return
    pair = tl.load(sorted_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    expert = tl.load(block_expert_ptr + block).to(tl.int64)
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = x_ptr + (pair // SHARED)[:, None] * x_stride
    columns = weight_ptr + (expert * outputs + n)[None, :] * INNER
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, INNER, BLOCK_K):
        at = start + k
        x = tl.load(rows + at[None, :], (pair < pairs)[:, None] & (at < INNER)[None, :], 0.0)
        weight = tl.load(columns + at[:, None], (n < outputs)[None, :] & (at < INNER)[:, None], 0.0)
        total = tl.dot(x, weight, total, input_precision="ieee")
    tl.store(out_ptr + pair[:, None] * outputs + n[None, :], total, (pair < pairs)[:, None] & (n < outputs)[None, :])


def gemm_tiles(block_m: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Tile sizes and launch options of the grouped product; unmeasured."""
    wide = dtype == torch.float32
    tiles = {"BLOCK_M": block_m, "BLOCK_N": 64 if block_m == 16 or wide else 128, "BLOCK_K": 32 if wide else 64}
    return tiles, {"num_warps": 8 if block_m == 128 else 4, "num_stages": 3 if block_m == 128 else 4}


def _grouped_gemm(x: Tensor, weight: Tensor, plan: tuple[Tensor, Tensor, Tensor], pairs: int) -> Tensor:
    """Row ``p`` of the result [pairs, out] is that of its token (or pair) in x times its expert's weight [out, in]."""
    ordered, block_expert, used = plan
    outputs, inner = weight.shape[1:]
    out = torch.empty((pairs, outputs), dtype=x.dtype, device=x.device)
    blocks = len(block_expert)
    tiles, options = gemm_tiles(len(ordered) // blocks, x.dtype)
    _grouped_gemm_kernel[(blocks * triton.cdiv(outputs, tiles["BLOCK_N"]),)](
        x, weight, out, ordered, block_expert, used, pairs, blocks, outputs, x.stride(0),
        INNER=inner, SHARED=pairs // len(x), **tiles, **options,
    )  # fmt: skip
    return out


@triton.jit
def _combine_kernel(y_ptr, weights_ptr, out_ptr, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(TOP_K):
        y = tl.load(y_ptr + (token * TOP_K + i) * hidden + column, column < hidden, 0.0)
        total += tl.load(weights_ptr + token * TOP_K + i) * y.to(tl.float32)
    tl.store(out_ptr + token * hidden + column, total, column < hidden)


def rows_of_a_block(pairs: int, experts: int) -> int:
    """Rows of a block of the grouped products: what an expert gets on average, between what matrix units take and what
    still fits into registers."""
    return min(max(16, triton.next_power_of_2(pairs // experts)), 128)


def fused_moe(x: Tensor, router_logits: Tensor, gate_up: Tensor, down: Tensor, top_k: int, renormalize: bool) -> Tensor:
    """Mixture of SwiGLU experts: x [t, hidden], rows contiguous, router_logits [t, experts], gate_up [experts, 2 *
    width, hidden], down [experts, hidden, width]. Result [t, hidden]; weights and their sum in float32."""
    tokens, hidden = x.shape
    experts, pairs = len(gate_up), tokens * top_k
    weights, chosen = route(router_logits, top_k, renormalize)
    plan = sort_by_expert(chosen, experts, rows_of_a_block(pairs, experts))
    y = _grouped_gemm(silu_and_mul(_grouped_gemm(x, gate_up, plan, pairs)), down, plan, pairs)
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    grid = (tokens, triton.cdiv(hidden, COMBINE_BLOCK))
    _combine_kernel[grid](y, weights, out, hidden, TOP_K=top_k, BLOCK=COMBINE_BLOCK)
    return out


def fused_moe_reference(
    x: Tensor, router_logits: Tensor, gate_up: Tensor, down: Tensor, top_k: int, renormalize: bool
) -> Tensor:
    """As ``fused_moe``, one expert after the other."""
    weights, chosen = route_reference(router_logits, top_k, renormalize)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in chosen.unique().tolist():
        token, rank = (chosen == expert).nonzero(as_tuple=True)
        y = F.linear(silu_and_mul_reference(F.linear(x[token], gate_up[expert])), down[expert])
        out.index_add_(0, token, weights[token, rank, None] * y.float())
    return out.to(x.dtype)


def ahead_of_time() -> AheadOfTime:
    """Variants that must compile without a GPU."""
    numbers = dict.fromkeys(("outputs", "x_stride"), "i32:16") | dict.fromkeys(("pairs", "blocks"), "i32")
    plan = dict.fromkeys(("sorted_ptr", "block_expert_ptr", "used_ptr"), "*i32:16")
    for experts, top_k in ((8, 2), (128, 8)):
        signature = {"logits_ptr": "*bf16:16", "weights_ptr": "*fp32:16", "experts_ptr": "*i32:16", "stride": "i32"}
        constants = {"EXPERTS": experts, "TOP_K": top_k, "RENORMALIZE": True, "BLOCK_E": experts, "BLOCK_K": top_k}
        yield _route_kernel, signature, constants, {"num_warps": 1}
        constants = {"EXPERTS": experts, "BLOCK_M": 16, "BINS": 2 * experts, "BLOCK": SORT_BLOCK}
        yield _sort_kernel, {"experts_ptr": "*i32:16", **plan, "pairs": "i32"}, constants, {"num_warps": 8}
        signature = {"y_ptr": "*bf16:16", "weights_ptr": "*fp32:16", "out_ptr": "*bf16:16", "hidden": "i32:16"}
        yield _combine_kernel, signature, {"TOP_K": top_k, "BLOCK": COMBINE_BLOCK}, {"num_warps": 4}
    for dtype in (torch.bfloat16, torch.float32):
        for block_m in (16, 32, 64, 128):
            name = "*bf16:16" if dtype == torch.bfloat16 else "*fp32:16"
            pointers = dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), name)
            constants, options = gemm_tiles(block_m, dtype)
            yield (
                _grouped_gemm_kernel,
                {**pointers, **plan, **numbers},
                {"INNER": 2048, "SHARED": 8, **constants},
                options,
            )


SHAPES = (("Mixtral-8x7B", 4096, 14336, 8, 2), ("Qwen3-30B-A3B", 2048, 768, 128, 8))
"""(name, hidden, width, experts, top_k) of a layer."""


def _layer(hidden: int, width: int, experts: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    gate_up = torch.randn(experts, 2 * width, hidden, device=device, dtype=dtype)
    return gate_up, torch.randn(experts, hidden, width, device=device, dtype=dtype)


def _table() -> None:
    copy, matmul = copy_ceiling(), matmul_ceiling()
    print_row("model", "tokens", "us", "GB/s", "of copy", "TFLOP/s", "of matmul")
    for name, hidden, width, experts, top_k in SHAPES:
        gate_up, down = _layer(hidden, width, experts, torch.bfloat16, "cuda")
        for tokens in (1, 4, 16, 64, 256, 1024, 8192):
            x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
            logits = torch.randn(tokens, experts, device="cuda", dtype=torch.bfloat16)
            used = len(route_reference(logits, top_k, True)[1].unique())
            us = median_us(partial(fused_moe, x, logits, gate_up, down, top_k, True))
            # The weights of the experts that this draw uses; activations are small beside them.
            rate = gigabytes_per_second(used * 3 * hidden * width * 2, us)
            flops = teraflops_per_second(6 * tokens * top_k * hidden * width, us)
            print_row(name, tokens, us, rate, share(rate, copy), flops, share(flops, matmul))


def _tiny() -> None:
    gate_up, down = _layer(40, 24, 5, torch.float32, "cpu")
    fused_moe(torch.randn(3, 40), torch.randn(3, 5), gate_up, down, 2, True)


if __name__ == "__main__":
    benchmark(_table, _tiny)
