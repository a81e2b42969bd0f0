"""Rotation, norms and KV store against their reference, the reference against rotating by hand and Hugging Face."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from testbed.kernels.rope_store import rope_and_store, rope_and_store_reference
from tests.kernels.inputs import DEVICE, Numbers, assert_near, dtypes, few, seeds

POSITIONS = 50


@dataclass
class Step:
    """New tokens as views of a fused projection, caches full of NaN."""

    qkv: Tensor
    heads: int
    kv_heads: int
    d: int
    positions: Tensor
    cos_sin: Tensor
    k_cache: Tensor
    v_cache: Tensor
    locations: Tensor
    norms: dict[str, Tensor]

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        sizes = (self.heads, self.kv_heads, self.kv_heads)
        used = self.qkv[:, : sum(sizes) * self.d]
        q, k, v = used.split([size * self.d for size in sizes], dim=1)
        return q.unflatten(1, (-1, self.d)), k.unflatten(1, (-1, self.d)), v.unflatten(1, (-1, self.d))

    def clone(self) -> Step:
        caches = self.k_cache.clone(), self.v_cache.clone()
        fixed = self.positions, self.cos_sin
        return Step(self.qkv.clone(), self.heads, self.kv_heads, self.d, *fixed, *caches, self.locations, self.norms)

    def arguments(self) -> tuple[Tensor, ...]:
        return *self.split(), self.positions, self.cos_sin, self.k_cache, self.v_cache, self.locations


def step(
    seed: int, dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, d: int, gap: int = 0, norm: bool = False
) -> Step:  # fmt: skip
    numbers = Numbers(seed, dtype)
    qkv = numbers(tokens, (heads + 2 * kv_heads) * d + gap)
    angles = numbers(POSITIONS, d // 2).float()
    caches = (torch.full((3 * tokens, kv_heads, d), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
    norms = {"q_norm": numbers(d), "k_norm": numbers(d)} if norm else {}
    return Step(
        qkv, heads, kv_heads, d, numbers.integers(POSITIONS, tokens).int(), torch.cat((angles.cos(), angles.sin()), 1),
        *caches, numbers.permutation(3 * tokens)[:tokens], norms,
    )  # fmt: skip


@few
@given(
    seed=seeds,
    dtype=dtypes,
    tokens=st.integers(1, 5),
    heads=st.integers(1, 11),
    kv_heads=st.integers(1, 10),
    d=st.sampled_from([2, 6, 16, 40, 64]),
    gap=st.integers(0, 5),
    norm=st.booleans(),
)
def test_kernel_equals_its_reference(
    seed: int, dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, d: int, gap: int, norm: bool
) -> None:
    ours = step(seed, dtype, tokens, heads, kv_heads, d, gap, norm)
    theirs = ours.clone()
    rope_and_store(*ours.arguments(), **ours.norms, eps=1e-5)
    rope_and_store_reference(*theirs.arguments(), **theirs.norms, eps=1e-5)
    assert_near(ours.qkv, theirs.qkv, scale=4)  # v and what lies beyond it are untouched
    assert_near(ours.k_cache, theirs.k_cache, scale=4)  # NaN stays where no token was stored
    assert torch.equal(ours.v_cache.nan_to_num(9e4), theirs.v_cache.nan_to_num(9e4))
    assert torch.equal(ours.k_cache[ours.locations], ours.split()[1])


def test_caches_may_exceed_two_billion_elements() -> None:
    """The memory is only touched where the token goes, so the size costs nothing."""
    given = step(3, torch.float16, 1, 2, 2, 64)
    tokens = 2**31 // 128 + 2
    pool = torch.empty((tokens, 2, 64), dtype=torch.float16, device=DEVICE)
    given.k_cache, given.v_cache = pool[:-1], pool[1:]
    given.locations = torch.tensor([tokens - 2], device=DEVICE)
    rope_and_store(*given.arguments())
    _, k, v = given.split()
    assert torch.equal(pool[-2], k[0]) and torch.equal(pool[-1], v[0])


@few
@given(seed=seeds, d=st.sampled_from([2, 6, 16]), norm=st.booleans())
def test_reference_rotates_by_the_angle(seed: int, d: int, norm: bool) -> None:
    """Elements i and i + d/2 are a plane; in it a head turns by the angle of its position."""
    given = step(seed, torch.float32, 3, 2, 1, d, 0, norm)
    before = given.clone()
    rope_and_store_reference(*given.arguments(), **given.norms, eps=1e-5)
    names = ("q_norm", "k_norm")
    for x, rotated, name in zip(before.split(), given.split()[:2], names, strict=False):
        for token, position in enumerate(given.positions.tolist()):
            cos, sin = (half.tolist() for half in given.cos_sin[position].chunk(2))
            for head, result in zip(x[token].tolist(), rotated[token].tolist(), strict=True):
                if norm:
                    rms = math.sqrt(sum(value * value for value in head) / d + 1e-5)
                    head = [v / rms * w for v, w in zip(head, given.norms[name].tolist(), strict=True)]
                for i in range(d // 2):
                    turned = complex(head[i], head[i + d // 2]) * complex(cos[i], sin[i])
                    assert complex(result[i], result[i + d // 2]) == pytest.approx(turned, rel=1e-4, abs=1e-5)


def test_reference_equals_hugging_face() -> None:
    given = step(5, torch.float32, 4, 6, 2, 32)
    q, k, _ = (x.clone() for x in given.split())
    angles = given.cos_sin[given.positions]
    cos, sin = (half.repeat(1, 2)[None] for half in angles.chunk(2, dim=1))
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    rope_and_store_reference(*given.arguments())
    for x, other in zip(given.split(), expected, strict=False):
        torch.testing.assert_close(x, other[0].transpose(0, 1), rtol=1e-6, atol=1e-6)
