"""Token ids without text: one formula for prompts and for the outputs of the oracle.

A *stream* is an endless sequence of token ids named by a 64-bit key. Prompts are cut from streams, the oracle's
output of a request is the start of a stream, and a session's next turn repeats its earlier turns' streams. So equal
content means equal ids, and a request that is handed another request's token is caught by comparing ids.

Token ``i`` of stream ``k`` is the high word of a Weyl sequence, ``(k + i * STEP) mod 2**64``, scaled to the
vocabulary: linear in ``i``, so the next token of a row costs one addition.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

STEP = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the Weyl increment with the lowest discrepancy
_MASK = (1 << 64) - 1
_HIGH_WORD = np.uint64(32)


def stream_key(*names: str | int) -> int:
    """The 64-bit key of the stream with this name; equal names give equal keys in every process."""
    digest = blake2b("\x1f".join(map(str, names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def oracle_key(seed: int, rid: str) -> int:
    """Key of the tokens that the oracle gives to request ``rid``."""
    return stream_key("oracle", seed, rid)


def token_ids(key: int, start: int, count: int, vocab_size: int) -> NDArray[np.int32]:
    """Ids ``start .. start + count - 1`` of stream ``key``: int32 [count], each in ``[0, vocab_size)``."""
    states = np.arange(start, start + count, dtype=np.uint64)
    states *= np.uint64(STEP)
    states += np.uint64(key & _MASK)
    return scale(states, vocab_size)


def scale(states: NDArray[np.uint64], vocab_size: int) -> NDArray[np.int32]:
    """Map 64-bit states, uint64 [n], to ids in ``[0, vocab_size)``, int32 [n] (multiply-shift, no modulo)."""
    ids = states >> _HIGH_WORD
    ids *= np.uint64(vocab_size)
    ids >>= _HIGH_WORD
    return ids.astype(np.int32)
