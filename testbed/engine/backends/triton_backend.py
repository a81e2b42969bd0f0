"""The operations by Triton's kernels, and by the library where that is fastest."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from testbed.engine.backends.base import AttentionPlan
from testbed.engine.backends.torch_backend import attention_of_both, with_rotary
from testbed.kernels.decode_attention import DecodeScratch, decode_attention, plan_splits
from testbed.kernels.extend_attention import extend_attention
from testbed.kernels.fused_moe import fused_moe
from testbed.kernels.gemv import gemv_pays, linear_small
from testbed.kernels.rms_norm import add_rms_norm, rms_norm
from testbed.kernels.rope_store import rope_and_store
from testbed.kernels.silu_mul import silu_and_mul


class TritonBackend:
    """``Backend`` on a GPU, or on the CPU in Triton's interpreter. A CUDA graph can hold all of it for decoding rows:
    no operation waits for the device or has a grid that depends on its results."""

    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)
    silu_and_mul = staticmethod(silu_and_mul)
    rope_and_store = staticmethod(with_rotary(rope_and_store))
    experts = staticmethod(fused_moe)

    def __init__(self, max_batch: int, heads: int, kv_heads: int, head_dim: int, device: torch.device | str) -> None:
        """For at most ``max_batch`` decoding rows at a time."""
        on_gpu = torch.device(device).type == "cuda"
        sms = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
        self._scratch = DecodeScratch(max_batch, heads, kv_heads, head_dim, device, sms)

    def prepare(self, plan: AttentionPlan) -> None:
        """Cut the decoding rows' contexts into splits."""
        if plan.decode is not None:
            plan_splits(plan.decode.seq_lens, self._scratch)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """As ``Backend.linear``."""
        if gemv_pays(len(x), *weight.shape):
            return linear_small(x, weight, bias)
        return F.linear(x, weight, bias)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float
    ) -> Tensor:
        """As ``Backend.attention``; ``prepare`` was called with this plan."""
        decode = partial(decode_attention, scratch=self._scratch)
        return attention_of_both(q, k, v, k_cache, v_cache, plan, scale, extend=extend_attention, decode=decode)
