"""Matrix-vector product for a few tokens: bound by the bytes of the weight, which each is read once.

A program takes a block of output rows and walks along the inner dimension, so the order of the sum is fixed and no
second pass is needed: with two to sixteen rows a program, a thousand outputs are enough programs for 132
multiprocessors.
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
    median_us,
    print_row,
    share,
)

MOST_TOKENS = 16
VECTOR_K = 1024
FEW_K = 256
PAYS = ((1, 2**26), (2, 2**24))
"""(tokens at most, elements of the weight at most) where this is used and not the library. Unmeasured: a cautious guess
that spares the large products, where libraries come close to copy speed. The benchmark below gives what it should
be."""


@triton.jit
def _vector_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, outputs, INNER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """One token: products are summed for each lane along the row, and across lanes once at the end."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = weight_ptr + n.to(tl.int64)[:, None] * INNER
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, INNER, BLOCK_K):
        at = start + k
        x = tl.load(x_ptr + at, at < INNER, 0.0).to(tl.float32)
        weight = tl.load(rows + at[None, :], (n < outputs)[:, None] & (at < INNER)[None, :], 0.0)
        total += weight.to(tl.float32) * x[None, :]
    out = tl.sum(total, axis=1)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + n, n < outputs, 0.0).to(tl.float32)
    tl.store(out_ptr + n, out, n < outputs)


@triton.jit(do_not_specialize=["tokens"])
def _few_vectors_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, tokens, outputs, x_stride,
    INNER: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Up to sixteen tokens: weight times x on the matrix units, which take no fewer than sixteen columns."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    rows = weight_ptr + n.to(tl.int64)[:, None] * INNER
    columns = x_ptr + token.to(tl.int64)[None, :] * x_stride
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for start in range(0, INNER, BLOCK_K):
        at = start + k
        weight = tl.load(rows + at[None, :], (n < outputs)[:, None] & (at < INNER)[None, :], 0.0)
        x = tl.load(columns + at[:, None], (token < tokens)[None, :] & (at < INNER)[:, None], 0.0)
        total = tl.dot(weight, x, total, input_precision="ieee")
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, n < outputs, 0.0).to(tl.float32)[:, None]
    inside = (token < tokens)[None, :] & (n < outputs)[:, None]
    tl.store(out_ptr + token[None, :] * outputs + n[:, None], total, inside)


def linear_small(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for x [t, in], rows contiguous, with t at most ``MOST_TOKENS``; weight [out, in] and bias
    [out], contiguous, all of one dtype: bfloat16, float16 or float32. Result [t, out], summed in float32.

    Raises ValueError for more tokens.
    """
    tokens, inner = x.shape
    outputs = weight.shape[0]
    if tokens > MOST_TOKENS:
        raise ValueError(f"{tokens} tokens; linear_small takes {MOST_TOKENS} at most")
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    if tokens == 1:
        rows = 4 if outputs >= 4096 else 2
        grid = (triton.cdiv(outputs, rows),)
        _vector_kernel[grid](x, weight, bias, out, outputs, INNER=inner, BLOCK_N=rows, BLOCK_K=VECTOR_K)
    else:
        grid = (triton.cdiv(outputs, 16),)
        _few_vectors_kernel[grid](
            x, weight, bias, out, tokens, outputs, x.stride(0),
            INNER=inner, BLOCK_T=MOST_TOKENS, BLOCK_N=16, BLOCK_K=FEW_K, num_stages=4,
        )  # fmt: skip
    return out


def linear_small_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``linear_small``, for any number of tokens."""
    return F.linear(x, weight, bias)


def gemv_pays(tokens: int, outputs: int, inner: int) -> bool:
    """Whether ``linear_small`` is used for x [tokens, inner] and weight [outputs, inner], by the table ``PAYS``."""
    return any(tokens <= most and outputs * inner <= elements for most, elements in PAYS)


def ahead_of_time() -> AheadOfTime:
    """Variants that must compile without a GPU."""
    for dtype in ("bf16", "fp16", "fp32"):
        pointers = dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), f"*{dtype}:16")
        one = {**pointers, "outputs": "i32:16"}
        for rows in (2, 4):
            tiles = {"bias_ptr": None, "INNER": 4096, "BLOCK_N": rows, "BLOCK_K": VECTOR_K}
            yield _vector_kernel, one, tiles, {"num_warps": 4}
        few = {**one, "bias_ptr": f"*{dtype}:16", "tokens": "i32", "x_stride": "i32:16"}
        tiles = {"INNER": 4096, "BLOCK_T": MOST_TOKENS, "BLOCK_N": 16, "BLOCK_K": FEW_K}
        yield _few_vectors_kernel, few, tiles, {"num_warps": 4, "num_stages": 4}


LAYERS = (
    ("8B qkv", 6144, 4096),
    ("8B o", 4096, 4096),
    ("8B gate_up", 28672, 4096),
    ("8B down", 4096, 14336),
    ("8B head", 128256, 4096),
    ("0.6B qkv", 4096, 1024),
    ("0.6B o", 1024, 2048),
    ("0.6B gate_up", 6144, 1024),
    ("0.6B down", 1024, 3072),
    ("0.6B head", 151936, 1024),
)
"""(name, out, in) of the products of Llama-3.1-8B and Qwen3-0.6B."""


def _table() -> None:
    ceiling = copy_ceiling()
    print(f"copy: {ceiling:.1f} GB/s")
    print_row("layer", "tokens", "us", "matmul us", "GB/s", "of copy", "matmul", "of copy")
    for name, outputs, inner in LAYERS:
        weight = torch.randn(outputs, inner, device="cuda", dtype=torch.bfloat16)
        for tokens in (1, 2, 4, 8, 16):
            x = torch.randn(tokens, inner, device="cuda", dtype=torch.bfloat16)
            moved = weight.nbytes + x.nbytes + 2 * tokens * outputs
            ours, theirs = median_us(partial(linear_small, x, weight)), median_us(partial(torch.matmul, x, weight.T))
            rate, other = gigabytes_per_second(moved, ours), gigabytes_per_second(moved, theirs)
            print_row(name, tokens, ours, theirs, rate, share(rate, ceiling), other, share(other, ceiling))


def _tiny() -> None:
    for tokens in (1, 3):
        linear_small(torch.randn(tokens, 40), torch.randn(24, 40))


if __name__ == "__main__":
    benchmark(_table, _tiny)
