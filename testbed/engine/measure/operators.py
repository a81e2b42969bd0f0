"""One operator of a model through all layers in order, so that its weights come from where they do in a step: a big
model's from memory, a small one's from a cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from testbed.engine.backends.base import AttentionPlan, DecodeRows, ExtendRows
from testbed.engine.inputs import SamplingNeeds, SlotSampling
from testbed.engine.measure.clock import Work
from testbed.engine.models.decoder import LayerWeights
from testbed.engine.runner import ModelRunner
from testbed.sampling import SamplingParams

BLOCK_TOKENS = 1024
"""Random keys and values are drawn for so many tokens, and repeated."""


def scattered(pages: int) -> NDArray[np.int32]:
    """Pages 1 .. ``pages`` in the order in which rows are given them: int32 [pages + 1], 0 first, which is nobody's.

    As after long use: in runs of a server, a request's neighbouring tokens lie 1 to 2.5 pages in a row, and reading
    them takes up to twice as long as in the order of memory.
    """
    order = np.random.Generator(np.random.Philox(key=0)).permutation(pages)
    return np.concatenate(([0], 1 + order)).astype(np.int32)


class OperatorBench:
    """Work to be timed, on the parts of a runner and random activations. Sizes are bounded by what the runner holds."""

    def __init__(self, runner: ModelRunner, device: torch.device, most_tokens: int) -> None:
        """``most_tokens``: of any work, but for the rows of attention and sampling."""
        self._runner = runner
        self._device = device
        self._config = runner.decoder.config
        self._weights = runner.decoder.weights
        self._ops = runner.backend
        self._dtype = self._weights.embedding.dtype
        self._most_tokens = most_tokens
        self._pages = scattered(runner.info.kv_tokens // runner.page_size)
        self._drawn: dict[tuple[int, str], Tensor] = {}
        with torch.inference_mode():
            for keys, values in runner.kv.layers:  # untouched memory would be read from one zero page of the system
                for cache in (keys, values):
                    block = self._random(min(BLOCK_TOKENS, len(cache)), cache[0].numel()).view(-1, *cache.shape[1:])
                    for part in cache.split(BLOCK_TOKENS):
                        part.copy_(block[: len(part)])

    def work(self, operator: str, tokens: int) -> Work:
        """An operator over the tokens or sampled rows of a step: of every layer (``qkv``, ``o``, ``gate_up``, ``down``,
        ``router``, ``experts``, ``norms``, ``rope_kv_write``, ``activation``), or of the step (``embedding``,
        ``lm_head``)."""
        with torch.inference_mode():
            if operator in ("qkv", "o", "gate_up", "down", "router"):
                return self._linear(operator, tokens)
            works = {
                "experts": self._experts,
                "norms": self._norms,
                "rope_kv_write": self._rope_kv_write,
                "activation": self._activation,
                "embedding": self._embedding,
                "lm_head": self._lm_head,
            }
            return works[operator](tokens)

    def _random(self, tokens: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """[tokens, width] of normal numbers, a view: operators of one width share their memory."""
        kind = dtype or self._dtype
        drawn = self._drawn.get((width, str(kind)))
        if drawn is None or len(drawn) < tokens:
            # At once for the largest work: what smaller work was given stays in memory as long as that.
            most = max(tokens, self._most_tokens if kind == self._dtype else 0)
            drawn = torch.randn(most, width, device=self._device).to(kind)
            self._drawn[width, str(kind)] = drawn
        return drawn[:tokens]

    # -- of the tokens ---------------------------------------------------------------------------------------------

    def _linear(self, operator: str, tokens: int) -> Work:
        pairs = [_projection(layer, operator) for layer in self._weights.layers]
        x = self._random(tokens, pairs[0][0].shape[1])

        def work() -> None:
            for weight, bias in pairs:
                self._ops.linear(x, weight, bias)

        return work

    def _norms(self, tokens: int) -> Work:
        hidden, eps = self._config.spec.hidden, self._config.rms_norm_eps
        x, residual = self._random(tokens, hidden), torch.zeros(tokens, hidden, dtype=self._dtype, device=self._device)
        pairs = list(zip(self._weights.layers, self._runner.decoder.norms_after, strict=True))

        def work() -> None:
            for layer, norm_after in pairs:
                self._ops.add_rms_norm(x, residual, layer.mlp_norm, eps)
                self._ops.add_rms_norm(x, residual, norm_after, eps)

        return work

    def _rope_kv_write(self, tokens: int) -> Work:
        q, k, v = self._heads(tokens)
        positions = torch.arange(tokens, dtype=torch.int32, device=self._device) % self._runner.info.context_length
        locations = torch.arange(tokens, device=self._device) + self._runner.page_size

        def work() -> None:
            for layer, cache in zip(self._weights.layers, self._runner.kv.layers, strict=True):
                self._ops.rope_and_store(q, k, v, positions, layer.rotary, *cache, locations)

        return work

    def _heads(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: views of one projection, [tokens, heads, head_dim] each."""
        spec = self._config.spec
        counts = (spec.heads, spec.kv_heads, spec.kv_heads)
        heads = self._random(tokens, sum(counts) * spec.head_dim).view(tokens, -1, spec.head_dim)
        q, k, v = heads.split(counts, dim=1)
        return q, k, v

    def _activation(self, tokens: int) -> Work:
        gate_up = self._random(tokens, self._weights.layers[0].gate_up.shape[0])

        def work() -> None:
            for _ in self._weights.layers:
                self._ops.silu_and_mul(gate_up)

        return work

    def _experts(self, tokens: int) -> Work:
        spec, renormalize = self._config.spec, self._config.norm_topk_prob
        x, logits = self._random(tokens, spec.hidden), self._random(tokens, spec.experts)

        def work() -> None:
            for layer in self._weights.layers:
                self._ops.experts(x, logits, layer.gate_up, layer.down, spec.experts_per_token, renormalize)

        return work

    def _embedding(self, tokens: int) -> Work:
        token_ids = torch.arange(tokens, dtype=torch.int32, device=self._device) % self._config.spec.vocab
        norm, eps = self._weights.layers[0].attention_norm, self._config.rms_norm_eps
        return lambda: self._ops.rms_norm(functional.embedding(token_ids, self._weights.embedding), norm, eps)

    # -- of the rows -----------------------------------------------------------------------------------------------

    def _lm_head(self, rows: int) -> Work:
        hidden = self._random(rows, self._config.spec.hidden)
        return lambda: self._runner.decoder.logits(hidden)

    def sampling(self, rows: int, params: SamplingParams) -> Work:
        """Drawing the tokens of so many rows, each as ``params`` says; without penalties and grammars."""
        sampler, needs = self._runner.sampler, needs_of(params)
        logits = self._random(rows, self._config.spec.vocab, torch.float32)
        host_slots = np.arange(rows, dtype=np.int32)
        slots = torch.arange(rows, dtype=torch.int32, device=self._device)
        with torch.inference_mode():
            sampler.update([SlotSampling(slot, params, slot, 0) for slot in range(rows)])
        return lambda: sampler.sample(logits, slots, slots, needs, host_slots)

    # -- attention -------------------------------------------------------------------------------------------------

    def decode_attention(self, contexts: Sequence[int]) -> Work:
        """Rows with these contexts, the new token included."""
        with torch.inference_mode():
            lengths = torch.tensor(contexts, dtype=torch.int32, device=self._device)
            plan = self._plan(contexts)
            plan.decode = DecodeRows(self._slots(len(contexts)), lengths)
            return self._attention(len(contexts), plan)

    def prefill_attention(self, new_tokens: Sequence[int], prefix_tokens: Sequence[int]) -> Work:
        """Rows with so many new tokens behind so many cached ones."""
        starts = np.concatenate(([0], np.cumsum(new_tokens)))
        with torch.inference_mode():
            plan = self._plan([n + p for n, p in zip(new_tokens, prefix_tokens, strict=True)])
            plan.extend = ExtendRows(
                slots=self._slots(len(new_tokens)),
                starts=torch.tensor(starts, dtype=torch.int32, device=self._device),
                prefix_lens=torch.tensor(prefix_tokens, dtype=torch.int32, device=self._device),
                longest=max(new_tokens),
                tokens=int(starts[-1]),
            )
            return self._attention(int(starts[-1]), plan)

    def _attention(self, tokens: int, plan: AttentionPlan) -> Work:
        q, k, v = self._heads(tokens)
        scale = self._config.spec.head_dim**-0.5

        def work() -> None:
            self._ops.prepare(plan)
            for cache in self._runner.kv.layers:
                self._ops.attention(q, k, v, *cache, plan, scale)

        return work

    def _slots(self, rows: int) -> Tensor:
        return torch.arange(rows, dtype=torch.int32, device=self._device)

    def _plan(self, lengths: Sequence[int]) -> AttentionPlan:
        """A page table of its own: each row's pages are the next of the scattered ones."""
        size = self._runner.page_size
        pages = [-(-length // size) for length in lengths]
        table = np.zeros((len(lengths), max(pages)), np.int32)
        first = 1
        for row, count in zip(table, pages, strict=True):
            row[:count] = self._pages[first : first + count]
            first += count
        return AttentionPlan(torch.tensor(table, device=self._device), size)


def _projection(layer: LayerWeights, operator: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer's product."""
    if operator == "qkv":
        return layer.qkv, layer.qkv_bias
    if operator == "o":
        return layer.output, layer.output_bias
    weight = {"gate_up": layer.gate_up, "down": layer.down, "router": layer.router}[operator]
    assert weight is not None, "a dense model has no router"
    return weight, None


def needs_of(params: SamplingParams) -> SamplingNeeds:
    """What rows of these parameters want, but for penalties and grammars."""
    filters = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    return SamplingNeeds(greedy=params.greedy, filters=filters)
