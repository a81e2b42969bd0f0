"""Rotary position embedding (Su et al., arXiv 2104.09864), the norms of query and key heads before it (Qwen3), and the
write of keys and values into the paged cache: one kernel, so that a layer's new tokens pass through memory once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
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
from testbed.kernels.rms_norm import rms_norm_reference

HEADS = 8
"""Heads of a program: few enough that the heads of a single token fill several multiprocessors."""


@triton.jit
def _rotated(ptr, weight_ptr, cos, sin, eps, lane, inside, D: tl.constexpr, NORM: tl.constexpr):
    """Both halves of the heads at ``ptr`` [heads, 1]: normed if they are to be, rotated, in float32."""
    first = tl.load(ptr + lane, inside, 0.0)
    second = tl.load(ptr + D // 2 + lane, inside, 0.0)
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        squares = tl.sum(wide_first * wide_first + wide_second * wide_second, axis=1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        in_head = lane < D // 2
        first = (wide_first * scale).to(first.dtype) * tl.load(weight_ptr + lane, in_head, 0.0)
        second = (wide_second * scale).to(second.dtype) * tl.load(weight_ptr + D // 2 + lane, in_head, 0.0)
        wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    return wide_first * cos - wide_second * sin, wide_second * cos + wide_first * sin


@triton.jit
def _rope_and_store_kernel(
    q_ptr, k_ptr, v_ptr, q_stride, k_stride, v_stride, positions_ptr, cos_sin_ptr, q_norm_ptr, k_norm_ptr, eps,
    k_cache_ptr, v_cache_ptr, locations_ptr,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    lane = tl.arange(0, HALF)[None, :]
    in_head = lane < D // 2
    angles = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * D + lane
    cos = tl.load(angles, in_head, 0.0)
    sin = tl.load(angles + D // 2, in_head, 0.0)
    if block < q_blocks:
        head = block * HEADS + tl.arange(0, HEADS)[:, None]
        inside = (head < Q_HEADS) & in_head
        at = q_ptr + token * q_stride + head * D
        first, second = _rotated(at, q_norm_ptr, cos, sin, eps, lane, inside, D, NORM)
        tl.store(at + lane, first, inside)
        tl.store(at + D // 2 + lane, second, inside)
    else:
        head = (block - q_blocks) * HEADS + tl.arange(0, HEADS)[:, None]
        inside = (head < KV_HEADS) & in_head
        at = k_ptr + token * k_stride + head * D
        first, second = _rotated(at, k_norm_ptr, cos, sin, eps, lane, inside, D, NORM)
        tl.store(at + lane, first, inside)
        tl.store(at + D // 2 + lane, second, inside)
        to = tl.load(locations_ptr + token).to(tl.int64) * (KV_HEADS * D) + head * D + lane
        tl.store(k_cache_ptr + to, first, inside)
        tl.store(k_cache_ptr + to + D // 2, second, inside)
        values = v_ptr + token * v_stride + head * D + lane
        tl.store(v_cache_ptr + to, tl.load(values, inside), inside)
        tl.store(v_cache_ptr + to + D // 2, tl.load(values + D // 2, inside), inside)


def warps_for(half: int) -> int:
    """Eight elements of a tile for each thread. Not more warps than elements: one that holds copies of another's
    elements could read them after they were rotated in place."""
    return max(HEADS * half // 256, 1)


def rope_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    locations: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """Norm (if any) and rotate q [t, h, d] and k [t, kvh, d] in place, then write k and v [t, kvh, d] to the caches.

    The stride of a token is free, heads and dimensions are contiguous, d is even. positions int32 [t]; cos_sin float32
    [positions, d]: cosines of the d/2 angles, then their sines; caches [tokens, kvh, d], contiguous; locations int64
    [t]: each token's row of the caches. q_norm and k_norm [d]: both or neither. The norm rounds as ``rms_norm`` does,
    the rotation is in float32 and rounded once.
    """
    tokens, heads, d = q.shape
    kv_heads = k.shape[1]
    grid = (tokens, triton.cdiv(heads, HEADS) + triton.cdiv(kv_heads, HEADS))
    half = triton.next_power_of_2(d // 2)
    _rope_and_store_kernel[grid](
        q, k, v, q.stride(0), k.stride(0), v.stride(0), positions, cos_sin, q_norm, k_norm, eps,
        k_cache, v_cache, locations,
        Q_HEADS=heads, KV_HEADS=kv_heads, D=d, NORM=q_norm is not None,
        HEADS=HEADS, HALF=half, num_warps=warps_for(half),
    )  # fmt: skip


def _rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rope_and_store_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    locations: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """As ``rope_and_store``."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    q.copy_(_rotate_reference(q if q_norm is None else rms_norm_reference(q, q_norm, eps), cos, sin))
    k.copy_(_rotate_reference(k if k_norm is None else rms_norm_reference(k, k_norm, eps), cos, sin))
    k_cache[locations] = k
    v_cache[locations] = v


def ahead_of_time() -> AheadOfTime:
    """Variants that must compile without a GPU."""
    cases = (
        ("bf16", 32, 8, 128, False),
        ("bf16", 16, 8, 128, True),
        ("fp32", 32, 8, 128, True),
        ("bf16", 9, 3, 64, False),
    )
    for dtype, heads, kv_heads, d, norm in cases:
        half = triton.next_power_of_2(d // 2)
        signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "k_cache_ptr", "v_cache_ptr"), f"*{dtype}:16")
        signature |= dict.fromkeys(("q_stride", "k_stride", "v_stride"), "i32:16")
        signature |= {"positions_ptr": "*i32:16", "cos_sin_ptr": "*fp32:16", "locations_ptr": "*i64:16", "eps": "fp32"}
        constants = {"Q_HEADS": heads, "KV_HEADS": kv_heads, "D": d, "NORM": norm, "HEADS": HEADS, "HALF": half}
        norms = ("q_norm_ptr", "k_norm_ptr")
        if norm:
            signature |= dict.fromkeys(norms, f"*{dtype}:16")
        else:
            constants |= dict.fromkeys(norms)
        yield _rope_and_store_kernel, signature, constants, {"num_warps": warps_for(half)}


def _step(tokens: int, heads: int, kv_heads: int, d: int, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """One call on a fused projection of random numbers, with norms, every token at a place of its own."""
    qkv = torch.randn(tokens, heads + 2 * kv_heads, d, device=device, dtype=dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    k_cache, v_cache = (torch.zeros(2 * tokens, kv_heads, d, device=device, dtype=dtype) for _ in range(2))
    positions = torch.arange(tokens, device=device, dtype=torch.int32)
    cos_sin = torch.randn(tokens, d, device=device)
    locations = torch.randperm(2 * tokens, device=device)[:tokens]
    norm = torch.randn(d, device=device, dtype=dtype)
    return partial(
        rope_and_store, q, k, v, positions, cos_sin, k_cache, v_cache, locations, q_norm=norm, k_norm=norm
    )  # fmt: skip


def _table() -> None:
    ceiling = copy_ceiling()
    print_row("tokens", "heads", "kv heads", "us", "GB/s", "of copy")
    for tokens, heads in ((1, 16), (1, 32), (256, 16), (256, 32), (8192, 16), (8192, 32)):
        us = median_us(_step(tokens, heads, 8, 128, torch.bfloat16, "cuda"))
        # q and k are read and written, k is written again, v is read and written; the angles of a token are read.
        moved = tokens * 128 * (2 * (2 * heads + 5 * 8) + 4)
        rate = gigabytes_per_second(moved, us)
        print_row(tokens, heads, 8, us, rate, share(rate, ceiling))


def _tiny() -> None:
    _step(3, 4, 2, 16, torch.float32, "cpu")()


if __name__ == "__main__":
    benchmark(_table, _tiny)
