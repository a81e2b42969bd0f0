"""The random bits against the vectors that Random123 publishes, and the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.kernels.philox import philox_reference, token_bits, token_bits_reference

KNOWN = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}
"""philox4x32-10 in Random123's kat_vectors: counter, key, words."""


def int64(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers(name: str) -> None:
    counter, key, expected = KNOWN[name]
    seed = torch.tensor([int64(key[0] | key[1] << 32)])
    words = philox_reference(seed, *(torch.tensor([word]) for word in counter))
    assert tuple(int(word) for word in words) == expected


def test_known_answers_of_the_kernel(device: str) -> None:
    """The vector whose counter a token can have: the first four tokens of position 0."""
    bits = token_bits(
        torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int32, device=device), 4
    )
    assert tuple(bits[0].tolist()) == KNOWN["zeros"][2]


def words_in_python(seed: int, counter: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Philox with Python's integers, which do not overflow."""
    c, k = list(counter), [seed % 2**32, seed >> 32]
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [product1 >> 32 ^ c[1] ^ k[0], product1 % 2**32, product0 >> 32 ^ c[3] ^ k[1], product0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**31 - 1), token=st.integers(0, 150_000))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_token_has_its_word(seed: int, position: int, token: int) -> None:
    """Counter (position, token // 4, 0, 0), word token % 4."""
    seeds, positions = torch.tensor([int64(seed)]), torch.tensor([position], dtype=torch.int32)
    bits = token_bits_reference(seeds, positions, token + 1)
    assert int(bits[0, token]) == words_in_python(seed, (position, token // 4, 0, 0))[token % 4]


@given(
    rows=st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**31 - 1)), min_size=1, max_size=3),
    vocab_size=st.integers(1, 3000),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_kernel_gives_the_same_bits(device: str, rows: list[tuple[int, int]], vocab_size: int) -> None:
    seeds = torch.tensor([int64(seed) for seed, _ in rows], device=device)
    positions = torch.tensor([position for _, position in rows], dtype=torch.int32, device=device)
    assert torch.equal(token_bits(seeds, positions, vocab_size), token_bits_reference(seeds, positions, vocab_size))
