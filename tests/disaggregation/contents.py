"""What lies in the KV of every engine: a fingerprint for each token slot, written when a device or a network would
write it, and compared when a step reads it. A page that is reused too early, a chunk that is taken twice, a copy that
is forgotten: each leaves a wrong fingerprint behind."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from testbed.tokens import oracle_key, token_ids
from tests.properties.world import VOCABULARY

GARBAGE = -1
"""What a corrupt transfer writes."""


class WrongKv(AssertionError):
    """A step has read KV that is not its request's."""


def fingerprints(tokens: NDArray[np.int32]) -> list[int]:
    """For each position, of all tokens up to it: KV depends on them."""
    found, last = [], 0
    for token in tokens.tolist():
        last = crc32(token.to_bytes(4, "little"), last)
        found.append(last)
    return found


@cache
def outputs_of(seed: int, rid: str, count: int) -> NDArray[np.int32]:
    return token_ids(oracle_key(seed, rid), 0, count, VOCABULARY)


class KvContents:
    """The KV memory of one engine."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._at: dict[int, int] = {}
        self.reads = 0

    def places(self, pages: Sequence[int], start: int, end: int) -> list[int]:
        """Token slots of positions ``start`` .. ``end`` - 1, of a request whose pages are ``pages``."""
        p = self._page_size
        return [int(pages[i // p]) * p + i % p for i in range(start, end)]

    def read(self, places: Sequence[int]) -> list[int]:
        return [self._at.get(place, 0) for place in places]

    def write(self, places: Sequence[int], values: Sequence[int]) -> None:
        self._at.update(zip(places, values, strict=True))

    def expect(self, who: str, places: Sequence[int], values: Sequence[int]) -> None:
        self.reads += len(places)
        found = self.read(places)
        if found != list(values):
            wrong = next(i for i, (a, b) in enumerate(zip(found, values, strict=True)) if a != b)
            raise WrongKv(f"{who}: the KV of token {wrong} of {len(values)} is not its own")
