"""The experts against their reference step by step, the reference against one token at a time and Hugging Face."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from testbed.kernels import fused_moe as module
from testbed.kernels.fused_moe import (
    fused_moe,
    fused_moe_reference,
    route,
    route_reference,
    rows_of_a_block,
    sort_by_expert,
    sort_by_expert_reference,
)
from tests.kernels.inputs import DEVICE, Numbers, assert_near, dtypes, few, poisoned, seeds

tokens, experts = st.integers(1, 20), st.integers(1, 9)


def logits_of(numbers: Numbers, tokens: int, experts: int) -> Tensor:
    """Router logits without ties: quarters in random order."""
    return torch.stack([numbers.permutation(experts) / 4 for _ in range(tokens)]).to(numbers.dtype)


@few
@given(tokens=tokens, experts=st.integers(1, 70), data=st.data(), renormalize=st.booleans(), dtype=dtypes, seed=seeds)
def test_routes(
    tokens: int, experts: int, data: st.DataObject, renormalize: bool, dtype: torch.dtype, seed: int
) -> None:
    top_k = data.draw(st.integers(1, min(experts, 8)))
    logits = (Numbers(seed, dtype)(tokens, experts) * 4).round()  # many ties: the lower expert comes first
    with poisoned():
        weights, chosen = route(logits, top_k, renormalize)
    expected_weights, expected = route_reference(logits, top_k, renormalize)
    assert torch.equal(chosen, expected)
    assert_near(weights, expected_weights)


@few
@given(
    tokens=st.integers(1, 60),
    experts=experts,
    top_k=st.integers(1, 4),
    block_m=st.sampled_from([16, 32]),
    at_once=st.sampled_from([32, 2048]),
    used=st.integers(1, 9),
    seed=seeds,
)
@example(tokens=300, experts=128, top_k=8, block_m=16, at_once=2048, used=128, seed=0)
@example(tokens=600, experts=3, top_k=1, block_m=16, at_once=32, used=1, seed=0)  # more blocks than are written at once
def test_sorts(tokens: int, experts: int, top_k: int, block_m: int, at_once: int, used: int, seed: int) -> None:
    chosen = Numbers(seed).integers(min(used, experts), tokens, top_k).int()
    with poisoned(), mock.patch.object(module, "SORT_BLOCK", at_once):
        ordered, block_expert, blocks = sort_by_expert(chosen, experts, block_m)
    expected_ordered, expected_experts, expected_blocks = sort_by_expert_reference(chosen, experts, block_m)
    assert blocks.tolist() == expected_blocks.tolist()
    assert blocks.item() <= len(block_expert)
    assert torch.equal(ordered[: len(expected_ordered)], expected_ordered)
    assert torch.equal(block_expert[: len(expected_experts)], expected_experts)


@few
@given(
    tokens=tokens,
    hidden=st.integers(1, 70),
    width=st.integers(1, 40),
    experts=experts,
    data=st.data(),
    gap=st.integers(0, 3),
    renormalize=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
def test_kernel_equals_its_reference(
    tokens: int, hidden: int, width: int, experts: int, data: st.DataObject, gap: int, renormalize: bool,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    top_k = data.draw(st.integers(1, experts))
    check(Numbers(seed, dtype), tokens, hidden, width, experts, top_k, renormalize, gap)


@pytest.mark.parametrize(("tokens", "block_m"), [(30, 16), (60, 32), (120, 64), (200, 128)])
def test_larger_blocks(tokens: int, block_m: int) -> None:
    assert rows_of_a_block(tokens, 2) == block_m
    check(Numbers(tokens), tokens, 150, 70, 2, 1, False, 0)


def check(
    numbers: Numbers, tokens: int, hidden: int, width: int, experts: int, top_k: int, renormalize: bool, gap: int
) -> None:
    x, logits = numbers.rows(tokens, hidden, gap), logits_of(numbers, tokens, experts)
    gate_up = numbers(experts, 2 * width, hidden, scale=hidden**-0.5)
    down = numbers(experts, hidden, width, scale=width**-0.5)
    with poisoned():
        out = fused_moe(x, logits, gate_up, down, top_k, renormalize)
    assert_near(out, fused_moe_reference(x, logits, gate_up, down, top_k, renormalize))


@few
@given(tokens=st.integers(1, 4), experts=st.integers(2, 5), renormalize=st.booleans(), seed=seeds)
def test_reference_is_the_definition(tokens: int, experts: int, renormalize: bool, seed: int) -> None:
    numbers = Numbers(seed)
    x, logits = numbers(tokens, 6), logits_of(numbers, tokens, experts)
    gate_up, down = numbers(experts, 8, 6), numbers(experts, 6, 4)
    out = fused_moe_reference(x, logits, gate_up, down, 2, renormalize)
    for token in range(tokens):
        odds = logits[token].double().exp()
        best = sorted(range(experts), key=lambda expert: -odds[expert].item())[:2]
        total = odds[best].sum() if renormalize else odds.sum()
        exact = torch.zeros(6, dtype=torch.float64, device=DEVICE)
        for expert in best:
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            exact += odds[expert] / total * (down[expert].double() @ (gate / (1 + (-gate).exp()) * up))
        assert_near(out[token], exact.float(), scale=10)


@pytest.mark.parametrize("renormalize", [False, True])
def test_reference_equals_hugging_face(renormalize: bool) -> None:
    numbers = Numbers(7)
    config = Qwen3MoeConfig(
        hidden_size=24, moe_intermediate_size=20, num_experts=6, num_experts_per_tok=3, norm_topk_prob=renormalize
    )  # fmt: skip
    block = Qwen3MoeSparseMoeBlock(config).to(DEVICE)
    for parameter in block.parameters():
        parameter.data = numbers(*parameter.shape, scale=0.3)
    x = numbers(9, 24)
    with torch.no_grad():
        expected = block(x[None])[0]
        weights = block.experts.gate_up_proj, block.experts.down_proj
        assert_near(fused_moe_reference(x, x @ block.gate.weight.T, *weights, 3, renormalize), expected)
