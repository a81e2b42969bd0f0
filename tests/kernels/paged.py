"""A paged KV cache for tests of attention: shuffled pages, NaN wherever no token is, and the plain truth in float64."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.inputs import Numbers

page_sizes = st.sampled_from([1, 3, 16, 64])
groups = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16])
head_dims = st.sampled_from([16, 32, 64, 80, 96, 128])
EDGES = (1, 15, 16, 17, 63, 64, 65, 128, 192, 300)
"""Lengths around the ends of tiles, pages and chunks."""


class Paged:
    """KV of some rows, on the CPU. ``k`` and ``v``: each row's [length, kvh, d]; ``slots``: the rows' in
    ``page_table``."""

    def __init__(self, numbers: Numbers, lengths: list[int], kv_heads: int, head_dim: int, page_size: int) -> None:
        self.page_size = page_size
        counts = [-(-length // page_size) for length in lengths]
        pages = numbers.permutation(sum(counts)) + 1  # page 0 is for padding
        size = ((sum(counts) + 1) * page_size, kv_heads, head_dim)
        self.k_cache, self.v_cache = (torch.full(size, torch.nan, dtype=numbers.dtype) for _ in range(2))
        self.page_table = torch.zeros(len(lengths) + 2, max([*counts, 1]), dtype=torch.int32)
        self.slots = numbers.permutation(len(lengths) + 1)[: len(lengths)].int()
        self.k = [numbers(length, kv_heads, head_dim) for length in lengths]
        self.v = [numbers(length, kv_heads, head_dim) for length in lengths]
        for row, mine in enumerate(pages.split(counts)):
            self.page_table[self.slots[row], : len(mine)] = mine.int()
            token = torch.arange(lengths[row])
            place = mine[token // page_size] * page_size + token % page_size
            self.k_cache[place], self.v_cache[place] = self.k[row], self.v[row]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Softmax attention written down: q [t, h, d] are the last t of the tokens of k and v [length, kvh, d]; float64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    for token in range(len(q)):
        seen = len(k) - len(q) + token + 1
        for head in range(q.shape[1]):
            kv_head = head * k.shape[1] // q.shape[1]
            weights = torch.exp(k[:seen, kv_head] @ q[token, head] * scale)
            out[token, head] = weights @ v[:seen, kv_head] / weights.sum()
    return out
