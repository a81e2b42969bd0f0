"""RMS norm (Zhang and Sennrich, arXiv 1910.07467), alone or of a residual stream that is updated in the same pass.

Rounding follows Hugging Face's ``LlamaRMSNorm``: statistics in float32, the normalised value is rounded to the dtype
and then multiplied by the weight.
"""

from __future__ import annotations

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

TILE = 2048
"""Elements of a program where rows are short: it takes several."""


@triton.jit
def normalize(x, weight, eps, width):
    """Float32 ``x`` [rows, block], zero beyond ``width``, to its RMS norm in the dtype of ``weight`` [block]."""
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    return (x * scale[:, None]).to(weight.dtype) * weight[None, :]


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, rows, hidden, x_stride, residual_stride, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)
    inside = (row < rows) & (column < hidden)[None, :]
    x = tl.load(x_ptr + row * x_stride + column[None, :], inside, 0.0)
    if ADD:
        at = residual_ptr + row * residual_stride + column[None, :]
        x = (x.to(tl.float32) + tl.load(at, inside, 0.0)).to(x.dtype)
        tl.store(at, x, inside)
    weight = tl.load(weight_ptr + column, column < hidden, 0.0)
    tl.store(out_ptr + row * hidden + column[None, :], normalize(x.to(tl.float32), weight, eps, hidden), inside)


def warps_for(block: int) -> int:
    """Sixteen elements a thread."""
    return min(max(block // 512, 4), 16)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    rows, hidden = x.shape
    out = torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(hidden)
    together = max(1, TILE // block)
    stride = x.stride(0) if residual is None else residual.stride(0)
    _rms_norm_kernel[(triton.cdiv(rows, together),)](
        x, x if residual is None else residual, weight, out, rows, hidden, x.stride(0), stride, eps,
        ADD=residual is not None, ROWS=together, BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight``: x [t, hidden], rows contiguous, weight [hidden]; [t, hidden]."""
    return _launch(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``residual += x`` in place, rounded to the dtype, then the norm of it: all [t, hidden], rows contiguous."""
    return _launch(x, residual, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As ``rms_norm``, over the last dimension of any shape."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As ``add_rms_norm``."""
    residual += x
    return rms_norm_reference(residual, weight, eps)


def ahead_of_time() -> AheadOfTime:
    """Variants that must compile without a GPU."""
    for dtype in ("bf16", "fp32"):
        for hidden in (1024, 4096, 5120, 8192):
            block = triton.next_power_of_2(hidden)
            for add in (False, True):
                pointers = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "out_ptr"), f"*{dtype}:16")
                numbers = {"rows": "i32", "eps": "fp32"}
                strides = dict.fromkeys(("hidden", "x_stride", "residual_stride"), "i32:16")
                constants = {"ADD": add, "ROWS": max(1, TILE // block), "BLOCK": block}
                yield _rms_norm_kernel, {**pointers, **numbers, **strides}, constants, {"num_warps": warps_for(block)}


def _table() -> None:
    ceiling = copy_ceiling()
    print_row("tokens", "hidden", "operation", "us", "GB/s", "of copy")
    for tokens, hidden in ((1, 1024), (1, 4096), (256, 1024), (256, 4096), (8192, 1024), (8192, 4096), (8192, 8192)):
        x, residual = (torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        weight = torch.randn(hidden, device="cuda", dtype=torch.bfloat16)
        alone = median_us(partial(rms_norm, x, weight, 1e-6))
        added = median_us(partial(add_rms_norm, x, residual, weight, 1e-6))
        for name, us, passes in (("rms_norm", alone, 2), ("add_rms_norm", added, 4)):
            rate = gigabytes_per_second(passes * x.nbytes, us)
            print_row(tokens, hidden, name, us, rate, share(rate, ceiling))


def _tiny() -> None:
    add_rms_norm(torch.randn(3, 40), torch.randn(3, 40), torch.randn(40), 1e-6)


if __name__ == "__main__":
    benchmark(_table, _tiny)
