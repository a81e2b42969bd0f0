"""The gate of a SwiGLU layer (Shazeer, arXiv 2002.05202): ``silu(gate) * up`` of one fused projection."""

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

BLOCK = 1024


@triton.jit
def _silu_and_mul_kernel(gate_up_ptr, out_ptr, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up_ptr + row * stride + column, inside, 0.0)
    up = tl.load(gate_up_ptr + row * stride + width + column, inside, 0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out_ptr + row * width + column, silu * up, inside)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up [t, 2 * width], rows contiguous, to [t, width]. silu is computed in float32 and rounded to the dtype
    before the product, as Hugging Face's modules do."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    grid = (tokens, triton.cdiv(width, BLOCK))
    _silu_and_mul_kernel[grid](gate_up, out, width, gate_up.stride(0), BLOCK=BLOCK)
    return out


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """As ``silu_and_mul``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def ahead_of_time() -> AheadOfTime:
    """Variants that must compile without a GPU."""
    for dtype in ("bf16", "fp32"):
        signature = {"gate_up_ptr": f"*{dtype}:16", "out_ptr": f"*{dtype}:16", "width": "i32:16", "stride": "i32:16"}
        yield _silu_and_mul_kernel, signature, {"BLOCK": BLOCK}, {"num_warps": 4}


def _table() -> None:
    ceiling = copy_ceiling()
    print_row("tokens", "width", "us", "GB/s", "of copy")
    for tokens, width in ((1, 3072), (1, 14336), (256, 3072), (256, 14336), (8192, 3072), (8192, 14336)):
        gate_up = torch.randn(tokens, 2 * width, device="cuda", dtype=torch.bfloat16)
        us = median_us(partial(silu_and_mul, gate_up))
        rate = gigabytes_per_second(gate_up.nbytes * 3 // 2, us)
        print_row(tokens, width, us, rate, share(rate, ceiling))


def _tiny() -> None:
    silu_and_mul(torch.randn(3, 80))


if __name__ == "__main__":
    benchmark(_table, _tiny)
