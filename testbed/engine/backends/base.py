"""What a model asks of a device: a dozen operations. ``torch_backend`` is their definition, ``triton_backend`` is fast.

Notation of shapes: ``t`` tokens of the step, ``h`` query heads, ``kvh`` key/value heads, ``d`` head dimension,
``n`` prefilling rows, ``b`` decoding rows. Tokens of a step are those of the prefilling rows, one row after the other,
then one for each decoding row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(slots=True)
class ExtendRows:
    """Rows that compute several new tokens behind a prefix whose KV is in the pages."""

    slots: Tensor
    """int32 [n]: each row's slot in the page table."""
    starts: Tensor
    """int32 [n + 1]: row i's tokens are ``starts[i] .. starts[i + 1] - 1`` of the step."""
    prefix_lens: Tensor
    """int32 [n]: tokens of KV before the row's first new token."""
    longest: int
    """New tokens of the longest row, known to the host (it sizes a grid)."""
    tokens: int
    """New tokens of all rows, known to the host."""


@dataclass(slots=True)
class DecodeRows:
    """Rows that compute one token."""

    slots: Tensor
    """int32 [b]."""
    seq_lens: Tensor
    """int32 [b]: tokens of KV that the row attends to, its own new one included; at least 1."""


@dataclass(slots=True)
class AttentionPlan:
    """Who attends to what in one step."""

    page_table: Tensor
    """int32 [slots + 1, pages]: page of tokens ``i * page_size ..`` of the request in a slot; the last row and page 0
    are for padding."""
    page_size: int
    extend: ExtendRows | None = None
    decode: DecodeRows | None = None


@dataclass(slots=True)
class Rotary:
    """Rotary position embedding and, for models that have them, the norms of query and key heads before it."""

    cos_sin: Tensor
    """float32 [positions, d]: cosines of the d/2 angles, then their sines (halves rotate: the "neox" layout)."""
    q_norm: Tensor | None = None
    """[d]: weight of the RMS norm over each query head."""
    k_norm: Tensor | None = None
    eps: float = 1e-6


class Backend(Protocol):
    """The operations. Inputs and outputs are of the model's dtype unless said otherwise; sums are in float32."""

    def prepare(self, plan: AttentionPlan) -> None:
        """Once a step, before its first layer: whatever ``attention`` needs that is the same for all layers."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ weight.T + bias``: x [t, in], weight [out, in], result [t, out]."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension: [t, hidden]."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``residual += x`` in place (rounded to the dtype), then the norm of it: [t, hidden]."""
        ...

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) * up`` of a fused [t, 2 * width]: [t, width]."""
        ...

    def rope_and_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        rotary: Rotary,
        k_cache: Tensor,
        v_cache: Tensor,
        locations: Tensor,
    ) -> None:
        """Norm (if any) and rotate q [t, h, d] and k [t, kvh, d] in place, then write k and v to the cache.

        q, k and v may be views of one fused projection: the stride of a token is free, heads and dimensions are
        contiguous. positions int32 [t]; locations int64 [t]: page * page_size + offset, where the token's KV goes in
        ``k_cache`` and ``v_cache``, [pages * page_size, kvh, d].
        """
        ...

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float
    ) -> Tensor:
        """Causal attention with grouped queries: [t, h, d], contiguous.

        The KV of this step's tokens is in the cache already; extending rows may read their new keys and values
        directly from ``k`` and ``v`` [t, kvh, d] (strided as above).
        """
        ...

    def experts(
        self, x: Tensor, router_logits: Tensor, gate_up: Tensor, down: Tensor, top_k: int, renormalize: bool
    ) -> Tensor:
        """Mixture of experts: x [t, hidden], router_logits [t, experts], gate_up [experts, 2 * width, hidden], down
        [experts, hidden, width]; weights are the softmax over all experts in float32, of the ``top_k`` largest, with
        ``renormalize`` scaled to sum to one. Result [t, hidden]."""
        ...
