"""Penalties, bitmask and counts: by hand, against a loop over tokens, and the kernels against their references."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from testbed.kernels.penalties import Penalties, adjust, adjust_reference, count, count_reference

BOTH = pytest.mark.parametrize("apply", [adjust_reference, adjust])
Adjust = Callable[[Tensor, Tensor, Penalties | None, Tensor | None], None]


def penalties_of(device: str, seed: int, slots: int, vocab_size: int) -> Penalties:
    """Random ones; every third slot wants none."""
    bits = torch.Generator().manual_seed(seed)
    some = (torch.arange(slots) % 3 > 0).float()
    frequency, presence = (4 * torch.rand(2, slots, generator=bits) - 2) * some
    return Penalties(
        frequency=frequency.to(device),
        presence=presence.to(device),
        repetition=(1 + some * (1.9 * torch.rand(slots, generator=bits) - 0.9)).to(device),
        counts=torch.randint(0, 4, (slots, vocab_size), dtype=torch.int32, generator=bits).to(device),
        in_prompt=(torch.rand(slots, vocab_size, generator=bits) < 0.5).to(device),
    )


def random_bitmask(seed: int, rows: int, vocab_size: int) -> Tensor:
    bits = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (rows, -(-vocab_size // 32)), dtype=torch.int32, generator=bits)


def naive(logits: Tensor, slots: Tensor, penalties: Penalties | None, bitmask: Tensor | None) -> Tensor:
    """Token by token, in Python's floats."""
    out = logits.to(torch.float64)
    for row, slot in enumerate(slots.tolist()):
        for token in range(logits.shape[1]):
            x = float(logits[row, token])
            if penalties is not None:
                number, repetition = int(penalties.counts[slot, token]), float(penalties.repetition[slot])
                if number or penalties.in_prompt[slot, token]:
                    x = x / repetition if x > 0 else x * repetition
                x -= number * float(penalties.frequency[slot]) + (number > 0) * float(penalties.presence[slot])
            if bitmask is not None and not int(bitmask[row, token // 32]) >> token % 32 & 1:
                x = -math.inf
            out[row, token] = x
    return out


@BOTH
def test_by_hand(device: str, apply: Adjust) -> None:
    """Repetition 2, frequency 0.5, presence 1. Tokens: untouched; in the prompt; twice output; both; forbidden."""
    penalties = Penalties(
        frequency=torch.tensor([0.5], device=device),
        presence=torch.tensor([1.0], device=device),
        repetition=torch.tensor([2.0], device=device),
        counts=torch.tensor([[0, 0, 2, 1, 0]], dtype=torch.int32, device=device),
        in_prompt=torch.tensor([[False, True, False, True, False]], device=device),
    )
    logits = torch.tensor([[3.0, 3.0, 3.0, -3.0, 9.0]], device=device)
    bitmask = torch.tensor([[0b01111]], dtype=torch.int32, device=device)
    apply(logits, torch.zeros(1, dtype=torch.int32, device=device), penalties, bitmask)
    # 3 / 2 - 2 * 0.5 - 1 = -0.5; -3 * 2 - 0.5 - 1 = -7.5
    assert logits.tolist() == [[3.0, 1.5, -0.5, -7.5, -math.inf]]


@BOTH
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 4),
    vocab_size=st.integers(1, 70),
    penalised=st.booleans(),
    masked=st.booleans(),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_as_token_by_token(
    device: str, apply: Adjust, seed: int, rows: int, vocab_size: int, penalised: bool, masked: bool
) -> None:
    bits = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(rows, vocab_size, generator=bits)
    logits[torch.rand(rows, vocab_size, generator=bits) < 0.1] = -math.inf
    slots = torch.randperm(6, generator=bits)[:rows].to(torch.int32)
    penalties = penalties_of(device, seed, 6, vocab_size) if penalised else None
    bitmask = random_bitmask(seed, rows, vocab_size) if masked else None
    expected = naive(logits, slots, penalties, bitmask)
    changed = logits.to(device)
    apply(changed, slots.to(device), penalties, None if bitmask is None else bitmask.to(device))
    torch.testing.assert_close(changed.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 3), vocab_size=st.integers(1, 5000))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_kernel_equals_reference(device: str, seed: int, rows: int, vocab_size: int) -> None:
    """Over several blocks of the vocabulary, rows of a wider buffer."""
    bits = torch.Generator().manual_seed(seed)
    logits = (5 * torch.randn(rows, vocab_size + 3, generator=bits)).to(device)
    expected = logits.clone()
    slots = torch.randperm(4, generator=bits)[:rows].to(device, torch.int32)
    penalties = penalties_of(device, seed, 4, vocab_size)
    bitmask = random_bitmask(seed, rows, vocab_size).to(device)
    adjust_reference(expected[:, :vocab_size], slots, penalties, bitmask)
    adjust(logits[:, :vocab_size], slots, penalties, bitmask)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@BOTH
def test_no_penalty_changes_nothing(device: str, apply: Adjust) -> None:
    """Bit for bit, whatever the counts are: a slot's old counts cannot touch a request that wants no penalty."""
    penalties = penalties_of(device, 0, 4, 100)  # slots 0 and 3 want none
    logits = torch.randn(2, 100, generator=torch.Generator().manual_seed(1)).to(device)
    before = logits.clone()
    apply(logits, torch.tensor([0, 3], dtype=torch.int32, device=device), penalties, None)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("add", [count_reference, count])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_counting(device: str, add: Callable[[Tensor, Tensor, Tensor], None], rows: int) -> None:
    """The spare slot (the last) occurs often and never counts; neither do rows without a token."""
    slots, vocab_size = 310, 7
    bits = torch.Generator().manual_seed(rows)
    counts = torch.randint(0, 3, (slots + 1, vocab_size), dtype=torch.int32, generator=bits)
    row_slots = torch.randperm(slots, generator=bits)[:rows].to(torch.int32)
    row_slots[::4] = slots
    token_ids = torch.randint(-1, vocab_size, (rows,), dtype=torch.int32, generator=bits)
    expected = counts.clone()
    for slot, token in zip(row_slots.tolist(), token_ids.tolist(), strict=True):
        expected[slot, token] += slot != slots and token >= 0
    counted = counts.to(device)
    add(counted, row_slots.to(device), token_ids.to(device))
    assert torch.equal(counted.cpu(), expected)
