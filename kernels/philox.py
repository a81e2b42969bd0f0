"""Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): random bits without a state.

The bits of a draw are a function of three numbers: the request's seed is the key; the counter is (position of the token
in its sequence, index in the vocabulary // 4, 0, 0); of the four words that come out, index % 4 says which. So a token
depends neither on its neighbours in the batch nor on how often anybody has drawn before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from testbed.kernels.language import tl, triton
from testbed.kernels.measure import AheadOfTime

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
"""What the two halves of the key grow by from round to round (the golden ratio and sqrt(3) - 1)."""
MASK = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox_reference(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Words:
    """Four words, int64 with values in [0, 2**32), of the shape that all arguments broadcast to.

    ``seed``: int64, the bit pattern of the 64-bit key; counters: integers in [0, 2**32), or int32 bit patterns.
    """
    words = [counter.to(torch.int64) & MASK for counter in (c0, c1, c2, c3)]
    keys = [seed & MASK, (seed >> 32) & MASK]
    for _ in range(ROUNDS):
        high0, low0 = _product(MULTIPLIERS[0], words[0])
        high1, low1 = _product(MULTIPLIERS[1], words[2])
        words = [high1 ^ words[1] ^ keys[0], low1, high0 ^ words[3] ^ keys[1], low0]
        keys = [(key + step) & MASK for key, step in zip(keys, WEYL, strict=True)]
    return words[0], words[1], words[2], words[3]


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, in halves of 16 bits: the whole does not fit into a signed int64."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def token_bits_reference(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """The word of every token of the vocabulary: int64 [rows, vocab] with values in [0, 2**32).

    ``seeds`` int64 [rows], bit patterns; ``positions`` int32 [rows].
    """
    groups = torch.arange(-(-vocab_size // 4), device=seeds.device)
    zero = torch.zeros_like(groups)
    words = philox_reference(seeds[:, None], positions[:, None], groups, zero, zero)
    return torch.stack(words, dim=-1).flatten(1)[:, :vocab_size]


@triton.jit
def token_bits_block(seed, position, first, BLOCK: tl.constexpr):
    """The words of tokens ``first .. first + BLOCK - 1``, uint32 [BLOCK]; ``first`` and BLOCK are multiples of 4."""
    group = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = group * 0
    w0, w1, w2, w3 = tl.philox(seed, zero + position.to(tl.uint32), group, zero, zero)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def _token_bits_kernel(seeds_ptr, positions_ptr, out_ptr, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    words = token_bits_block(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), first, BLOCK)
    token = first + tl.arange(0, BLOCK)
    tl.store(out_ptr + row * vocab_size + token, words.to(tl.int64), token < vocab_size)


def token_bits(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """As ``token_bits_reference``, bit for bit; sampling itself draws from ``token_bits_block``."""
    out = torch.empty((len(seeds), vocab_size), dtype=torch.int64, device=seeds.device)
    grid = (len(seeds), triton.cdiv(vocab_size, 1024))
    _token_bits_kernel[grid](seeds, positions, out, vocab_size, BLOCK=1024)
    return out


def ahead_of_time() -> AheadOfTime:
    """Variants that must compile without a GPU."""
    signature = {"seeds_ptr": "*i64:16", "positions_ptr": "*i32:16", "out_ptr": "*i64:16", "vocab_size": "i32"}
    yield _token_bits_kernel, signature, {"BLOCK": 1024}, {"num_warps": 4}
