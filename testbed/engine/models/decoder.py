"""The forward pass of Llama, Mistral, Qwen2, Qwen3, Mixtral and Qwen3-MoE: one decoder with options.

They differ in biases, in norms of the heads and in mixtures of experts; every layer is

    x += attention(norm(x));  x += mlp(norm(x))

with each addition fused into the norm that follows it. Nothing here waits for the device or looks at a value on it,
so a step with fixed shapes can be a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from testbed.engine.backends.base import AttentionPlan, Backend, Rotary
from testbed.engine.models.config import DecoderConfig


@dataclass(slots=True)
class LayerWeights:
    """One layer, in the model's dtype. Projections of the same input are one matrix."""

    attention_norm: Tensor
    """[hidden]"""
    qkv: Tensor
    """[(heads + 2 * kv_heads) * head_dim, hidden]: queries, keys, values."""
    qkv_bias: Tensor | None
    rotary: Rotary
    """With the norms of query and key heads, [head_dim] each, where the family has them."""
    output: Tensor
    """[hidden, heads * head_dim]"""
    output_bias: Tensor | None
    mlp_norm: Tensor
    """[hidden]"""
    router: Tensor | None
    """[experts, hidden]; None: a dense MLP."""
    gate_up: Tensor
    """[2 * width, hidden], with a first dimension of experts where there are any."""
    down: Tensor
    """[hidden, width], likewise."""


@dataclass(slots=True)
class DecoderWeights:
    """All weights; where embeddings are tied, ``head`` is ``embedding``."""

    embedding: Tensor
    """[vocab, hidden]"""
    layers: list[LayerWeights]
    norm: Tensor
    """[hidden]"""
    head: Tensor
    """[vocab, hidden]"""


class Decoder:
    """Token ids to hidden states to logits. It holds weights; keys and values are the caller's."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, backend: Backend, source: str) -> None:
        """``source``: in words, where the weights come from."""
        self.config = config
        self.source = source
        self.weights = weights
        self._ops = backend
        # The norm after a layer is the next layer's first one.
        self.norms_after = [*(layer.attention_norm for layer in weights.layers[1:]), weights.norm]

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        locations: Tensor,
        kv: Sequence[tuple[Tensor, Tensor]],
        plan: AttentionPlan,
    ) -> Tensor:
        """Hidden states after the final norm, [t, hidden]; the backend has been given the plan (``prepare``).

        token_ids and positions int32 [t]; locations int64 [t]: where each token's KV goes in each layer's pair of
        ``kv``, [pages * page_size, kv_heads, head_dim], in the model's dtype.
        """
        eps = self.config.rms_norm_eps
        residual = functional.embedding(token_ids, self.weights.embedding)
        x = self._ops.rms_norm(residual, self.weights.layers[0].attention_norm, eps)
        for layer, norm_after, cache in zip(self.weights.layers, self.norms_after, kv, strict=True):
            x = self._attention(x, layer, positions, locations, cache, plan)
            x = self._ops.add_rms_norm(x, residual, layer.mlp_norm, eps)
            x = self._mlp(x, layer)
            x = self._ops.add_rms_norm(x, residual, norm_after, eps)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] to float32 [rows, vocab]; multiplied in the model's dtype."""
        return self._ops.linear(hidden, self.weights.head).float()

    def _attention(
        self,
        x: Tensor,
        layer: LayerWeights,
        positions: Tensor,
        locations: Tensor,
        cache: tuple[Tensor, Tensor],
        plan: AttentionPlan,
    ) -> Tensor:
        spec = self.config.spec
        heads = self._ops.linear(x, layer.qkv, layer.qkv_bias).view(len(x), -1, spec.head_dim)
        q, k, v = heads.split((spec.heads, spec.kv_heads, spec.kv_heads), dim=1)
        self._ops.rope_and_store(q, k, v, positions, layer.rotary, *cache, locations)
        mixed = self._ops.attention(q, k, v, *cache, plan, spec.head_dim**-0.5)
        return self._ops.linear(mixed.flatten(1), layer.output, layer.output_bias)

    def _mlp(self, x: Tensor, layer: LayerWeights) -> Tensor:
        if layer.router is None:
            return self._ops.linear(self._ops.silu_and_mul(self._ops.linear(x, layer.gate_up)), layer.down)
        top_k, renormalize = self.config.spec.experts_per_token, self.config.norm_topk_prob
        router_logits = self._ops.linear(x, layer.router)
        return self._ops.experts(x, router_logits, layer.gate_up, layer.down, top_k, renormalize)
