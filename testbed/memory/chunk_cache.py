"""No prefix sharing: a request's pages are its own (SGLang's ChunkCache)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from testbed.memory.radix_cache import Match, Node, RadixCache


class ChunkCache(RadixCache):
    """A prefix cache that never finds and never keeps anything."""

    disabled = True

    def match(self, tokens: NDArray[np.int32], extra_key: str = "") -> Match:
        """Nothing is ever found."""
        return Match(np.empty(0, np.int32), self.root)

    def insert(self, tokens: NDArray[np.int32], pages: NDArray[np.int32], extra_key: str = "") -> tuple[int, Node]:
        """Keeps nothing: the caller goes on owning the pages."""
        raise RuntimeError("a chunk cache keeps no pages")

    def evict(self, tokens: int) -> int:
        """Nothing to evict."""
        return 0
