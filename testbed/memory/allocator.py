"""The page allocator. A token allocator is one whose pages hold one token."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from testbed.scenario.errors import InputError

Pages = NDArray[np.int32]


class OutOfPages(RuntimeError):
    """More pages were asked for than are free: the caller's admission or memory test was wrong."""


class PageAllocator:
    """Hands out whole pages ``1 .. num_pages``; page 0 is the padding sink and never handed out.

    The free list is a stack in one array, so taking and returning n pages is one slice copy. Pages freed behind a
    *fence* (the index of the last launch that may still touch them) are quarantined until ``reap`` passes it.
    """

    def __init__(self, capacity_tokens: int, page_size: int) -> None:
        """``capacity_tokens`` is floored to whole pages. Raises InputError for more pages than ids have numbers."""
        self.page_size = page_size
        self.num_pages = capacity_tokens // page_size
        self.capacity_tokens = self.num_pages * page_size
        if self.num_pages > np.iinfo(np.int32).max:
            message = f"{self.num_pages:,} pages are more than page ids can number"
            raise InputError(message, where="engine.kv_tokens", remedy="lower it, or raise engine.page_size")
        self._stack: Pages = np.empty(self.num_pages, dtype=np.int32)
        self._quarantine: deque[tuple[int, Pages]] = deque()
        self._aside: dict[int, Pages] = {}
        self.clear()

    def clear(self) -> None:
        """Every page is free again."""
        self._stack[:] = np.arange(self.num_pages, 0, -1, dtype=np.int32)
        self.free_pages = self.num_pages
        self.quarantined_pages = 0
        self._quarantine.clear()
        self._aside.clear()

    @property
    def available_tokens(self) -> int:
        """Tokens that fit into the free pages."""
        return self.free_pages * self.page_size

    def pages_for(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.page_size)

    def alloc(self, pages: int) -> Pages:
        """Take ``pages`` pages: int32 [pages]. Raises OutOfPages, taking nothing, when fewer are free."""
        top = self.free_pages
        if pages > top:
            raise OutOfPages(f"{pages} pages wanted, {top} of {self.num_pages} free")
        self.free_pages = top - pages
        return self._stack[top - pages : top].copy()

    def free(self, pages: Pages) -> None:
        """Return pages, int32 [n]."""
        top = self.free_pages
        self.free_pages = end = top + len(pages)
        if end > self.num_pages:
            raise RuntimeError(f"more pages freed than exist: {end} of {self.num_pages}")
        self._stack[top:end] = pages

    def free_behind(self, fence: int, pages: Pages) -> None:
        """Return pages that launch ``fence`` may still touch; they are free once ``reap(fence)`` was called."""
        if len(pages):
            self._quarantine.append((fence, pages))
            self.quarantined_pages += len(pages)

    def reap(self, fence: int) -> None:
        """Launch ``fence`` has ended: free what waited for it or for an earlier one."""
        while self._quarantine and self._quarantine[0][0] <= fence:
            pages = self._quarantine.popleft()[1]
            self.quarantined_pages -= len(pages)
            self.free(pages)

    def set_aside(self, key: int, pages: Pages) -> None:
        """Return pages that somebody beyond the device may still write to; ``key`` names them until
        ``take_back(key)``."""
        self._aside[key] = pages
        self.quarantined_pages += len(pages)

    def take_back(self, key: int) -> None:
        """Nobody writes to these pages any more: they are free."""
        pages = self._aside.pop(key)
        self.quarantined_pages -= len(pages)
        self.free(pages)

    def free_list(self) -> Pages:
        """The free pages, for checks: int32 [free_pages]."""
        return self._stack[: self.free_pages]

    def quarantine_list(self) -> Pages:
        """The quarantined pages, for checks."""
        parts = [*(pages for _, pages in self._quarantine), *self._aside.values()]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)
