"""Rotary position embedding: the table of cosines and sines, for each way to stretch a context."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from testbed.engine.models.config import RopeConfig


def cos_sin_table(rope: RopeConfig, head_dim: int, positions: int, device: torch.device) -> Tensor:
    """float32 [positions, head_dim]: cosines of the ``head_dim / 2`` angles, then their sines.

    The angle of pair i at position p is ``p * frequency[i]`` (Su et al. 2021, RoFormer, section 3.2.2).
    """
    angles = torch.outer(
        torch.arange(positions, dtype=torch.float32, device=device), frequencies(rope, head_dim).to(device)
    )
    return torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(rope.attention_factor)


def frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians a position, float32 [head_dim / 2], on the host: the same bits for every device."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _mixed(plain, rope.factor, _llama3_kept(plain, rope))
    if rope.kind == "yarn":
        return _mixed(plain, rope.factor, _yarn_kept(head_dim, rope))
    return plain


def _mixed(plain: Tensor, factor: float, kept: Tensor) -> Tensor:
    """``kept`` in [0, 1]: how much of a frequency stays as it was; the rest is stretched ``factor`` times."""
    return plain / factor * (1 - kept) + plain * kept


def _llama3_kept(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Frequencies that turn often within the original context stay, seldom ones stretch, a ramp between (Llama 3.1's
    released code, ``apply_scaling``)."""
    turns = rope.original_positions * plain / (2 * math.pi)
    return ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)


def _yarn_kept(head_dim: int, rope: RopeConfig) -> Tensor:
    """As llama3, but the ramp is straight in the index of the pair (Peng et al. 2023, YaRN, section 3.2)."""

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(rope.original_positions / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = max(high - low, 0.001)  # a step where both ends meet
    return 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
