"""The Triton backend, in the interpreter, against the torch backend: every operation, on steps of all kinds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from testbed.engine.backends.base import AttentionPlan, Backend, DecodeRows, ExtendRows, Rotary
from testbed.engine.backends.torch_backend import TorchBackend
from testbed.engine.backends.triton_backend import TritonBackend
from testbed.engine.build import WARM_LENGTHS
from testbed.kernels.fused_moe import rows_of_a_block
from testbed.kernels.interpreter import INTERPRETED
from testbed.scenario.models import load_model

DEVICE = "cpu" if INTERPRETED else "cuda"
HEADS, KV_HEADS, D, CONTEXT, MAX_BATCH = 6, 2, 20, 40, 5
few = settings(max_examples=15, deadline=None, derandomize=True)
steps = given(
    extends=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 12)), max_size=3),
    decodes=st.lists(st.integers(1, CONTEXT), max_size=MAX_BATCH),
    page_size=st.sampled_from([1, 4, 16]),
    norm=st.booleans(),
    seed=st.integers(0, 2**32),
)


def both() -> tuple[Backend, Backend]:
    return TorchBackend(), TritonBackend(MAX_BATCH, HEADS, KV_HEADS, D, DEVICE)


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator).to(DEVICE)


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@dataclass
class Step:
    """A mixed step: fused projections of its tokens, a cache that holds every prefix in pages of random order."""

    plan: AttentionPlan
    qkv: Tensor
    positions: Tensor
    locations: Tensor
    rotary: Rotary
    caches: tuple[Tensor, Tensor]

    def run(self, backend: Backend) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Two layers on copies, as a model runs them: what each gives, then the caches."""
        qkv = self.qkv.clone()
        k_cache, v_cache = (cache.clone() for cache in self.caches)
        q, k, v = qkv.unflatten(1, (-1, D)).split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        backend.prepare(self.plan)
        outs = []
        for _ in range(2):
            backend.rope_and_store(q, k, v, self.positions, self.rotary, k_cache, v_cache, self.locations)
            outs.append(backend.attention(q, k, v, k_cache, v_cache, self.plan, D**-0.5))
            assert outs[-1].shape == q.shape and outs[-1].is_contiguous()
        return outs[0], outs[1], k_cache, v_cache


def step(extends: list[tuple[int, int]], decodes: list[int], page_size: int, norm: bool, seed: int) -> Step:
    """``extends``: (prefix, new tokens) of each row; ``decodes``: tokens that each row attends to."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = len(extends) + len(decodes), -(-CONTEXT // page_size)
    pages = (1 + torch.randperm(rows * width, generator=generator)).view(rows, width)
    table = torch.zeros(rows + 1, width, dtype=torch.int32)
    slots = torch.randperm(rows, generator=generator)
    table[slots] = pages.int()
    spans = [*(range(prefix, prefix + new) for prefix, new in extends), *(range(n - 1, n) for n in decodes)]
    places = [(row, position) for row, span in enumerate(spans) for position in span]
    locations = [int(pages[row, p // page_size]) * page_size + p % page_size for row, p in places]
    plan = AttentionPlan(table.to(DEVICE), page_size)
    if extends:
        prefixes, new = zip(*extends, strict=True)
        starts = [sum(new[:i]) for i in range(len(new) + 1)]
        lengths = ints(starts), ints(list(prefixes)), max(new), sum(new)
        plan.extend = ExtendRows(ints(slots[: len(extends)].tolist()), *lengths)
    if decodes:
        plan.decode = DecodeRows(ints(slots[len(extends) :].tolist()), ints(decodes))
    cache_shape = ((rows * width + 1) * page_size, KV_HEADS, D)
    norms = (random(generator, D), random(generator, D)) if norm else (None, None)
    angles = random(generator, CONTEXT, D // 2)
    return Step(
        plan,
        random(generator, len(places), (HEADS + 2 * KV_HEADS) * D),
        ints([position for _, position in places]),
        torch.tensor(locations, device=DEVICE),
        Rotary(torch.cat((angles.cos(), angles.sin()), 1), *norms, eps=1e-5),
        (random(generator, *cache_shape), random(generator, *cache_shape)),
    )


def assert_near(values: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4)


@few
@steps
def test_a_mixed_step_gives_the_same(
    extends: list[tuple[int, int]], decodes: list[int], page_size: int, norm: bool, seed: int
) -> None:
    extends = extends or [(0, 3)]
    torch_backend, triton_backend = both()
    given_step = step(extends, decodes, page_size, norm, seed)
    assert_near(given_step.run(triton_backend), given_step.run(torch_backend))


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_step_of_decodes_alone(page_size: int) -> None:
    torch_backend, triton_backend = both()
    given_step = step([], [1, 16, 17, 40], page_size, False, 3)
    assert_near(given_step.run(triton_backend), given_step.run(torch_backend))


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_rows_attend_to_their_own_past(name: str) -> None:
    """Each token's result is softmax attention over its row's tokens up to itself, summed by hand."""
    backend = dict(zip(("torch", "triton"), both(), strict=True))[name]
    given_step = step([(7, 3), (0, 5)], [9, 1], 4, False, 1)
    plan, (k_cache, v_cache) = given_step.plan, given_step.caches
    assert plan.extend is not None and plan.decode is not None
    q, k, v = given_step.qkv.unflatten(1, (-1, D)).split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    k_cache[given_step.locations], v_cache[given_step.locations] = k, v
    backend.prepare(plan)
    out = backend.attention(q, k, v, k_cache, v_cache, plan, 0.3)
    slots = [*plan.extend.slots.repeat_interleave(plan.extend.starts.diff()).tolist(), *plan.decode.slots.tolist()]
    for token, (slot, position) in enumerate(zip(slots, given_step.positions.tolist(), strict=True)):
        past = [int(plan.page_table[slot, p // 4]) * 4 + p % 4 for p in range(position + 1)]
        for head in range(HEADS):
            kv_head = head // (HEADS // KV_HEADS)
            weights = (0.3 * k_cache[past, kv_head].double() @ q[token, head].double()).softmax(0)
            torch.testing.assert_close(out[token, head], (weights @ v_cache[past, kv_head].double()).float())


@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_the_other_operations_give_the_same(tokens: int) -> None:
    torch_backend, triton_backend = both()
    generator = torch.Generator().manual_seed(tokens)
    x, residual, weight, bias = (random(generator, *shape) for shape in ((tokens, 24), (tokens, 24), (24,), (40,)))
    gate_up, down, logits = (random(generator, *shape) for shape in ((5, 40, 24), (5, 24, 20), (tokens, 5)))
    results = []
    for backend in (triton_backend, torch_backend):
        sum_of_both = residual.clone()
        added = backend.add_rms_norm(x, sum_of_both, weight, 1e-5)
        linear, biased = backend.linear(x, gate_up[0]), backend.linear(x, gate_up[1], bias)
        routed = [backend.experts(x, logits, gate_up, down, 2, renormalize) for renormalize in (True, False)]
        normed, gated = backend.rms_norm(x, weight, 1e-5), backend.silu_and_mul(linear)
        results.append((sum_of_both, added, linear, biased, *routed, normed, gated))
    assert_near(*results)
    assert torch.equal(results[1][0], x + residual)


@pytest.mark.parametrize("preset", ["mixtral-8x7b", "qwen3-30b-a3b"])
def test_experts_are_compiled_before_the_first_request(preset: str) -> None:
    """The number of tokens decides how large the blocks of the grouped product are, and each size is a compilation."""
    spec, longest = load_model(preset), 8192

    def blocks(lengths: Iterable[int]) -> set[int]:
        return {rows_of_a_block(tokens * spec.experts_per_token, spec.experts) for tokens in lengths}

    assert blocks([*WARM_LENGTHS, longest]) == blocks(range(1, longest + 1))
