"""The operations in plain torch, by the references of the kernels: their definition, and what runs without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from testbed.engine.backends.base import AttentionPlan, Rotary
from testbed.kernels.decode_attention import decode_attention_reference
from testbed.kernels.extend_attention import extend_attention_reference
from testbed.kernels.fused_moe import fused_moe_reference
from testbed.kernels.gemv import linear_small_reference
from testbed.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from testbed.kernels.rope_store import rope_and_store_reference
from testbed.kernels.silu_mul import silu_and_mul_reference


def with_rotary(kernel: Callable[..., None]) -> Callable[..., None]:
    """``Backend.rope_and_store`` by a kernel, which takes a ``Rotary`` in parts."""

    def rope_and_store(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        rotary: Rotary,
        k_cache: Tensor,
        v_cache: Tensor,
        locations: Tensor,
    ) -> None:
        kernel(
            q, k, v, positions, rotary.cos_sin, k_cache, v_cache, locations,
            q_norm=rotary.q_norm, k_norm=rotary.k_norm, eps=rotary.eps,
        )  # fmt: skip

    return rope_and_store


class TorchBackend:
    """``Backend`` on any device and in any dtype. It reads lengths back to the host, so no CUDA graph can hold it."""

    linear = staticmethod(linear_small_reference)
    rms_norm = staticmethod(rms_norm_reference)
    add_rms_norm = staticmethod(add_rms_norm_reference)
    silu_and_mul = staticmethod(silu_and_mul_reference)
    rope_and_store = staticmethod(with_rotary(rope_and_store_reference))
    experts = staticmethod(fused_moe_reference)

    def prepare(self, plan: AttentionPlan) -> None:
        """Nothing is shared between layers."""

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float
    ) -> Tensor:
        """As ``Backend.attention``."""
        return attention_of_both(
            q, k, v, k_cache, v_cache, plan, scale, extend=extend_attention_reference, decode=decode_attention_reference
        )


def attention_of_both(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    *,
    extend: Callable[..., Tensor],
    decode: Callable[..., Tensor],
) -> Tensor:
    """Attention of a step's extending tokens by ``extend`` and of the decoding ones behind them by ``decode``, which
    write into one result: [t, h, d], contiguous."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    new = 0
    if plan.extend is not None:
        rows = plan.extend
        new = rows.tokens
        extend(
            q[:new], k[:new], v[:new], k_cache, v_cache, plan.page_table, rows.slots, rows.starts, rows.prefix_lens,
            page_size=plan.page_size, longest=rows.longest, scale=scale, out=out[:new],
        )  # fmt: skip
    if plan.decode is not None:
        decode(
            q[new:], k_cache, v_cache, plan.page_table, plan.decode.slots, plan.decode.seq_lens,
            page_size=plan.page_size, scale=scale, out=out[new:],
        )  # fmt: skip
    return out
