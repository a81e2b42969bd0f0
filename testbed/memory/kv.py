"""KV memory as one: slots, pages and prefix cache, and the moves of pages between their owners.

free --extend--> owned --publish/release--> cached --evict--> free
                   '------release/drop------> free or quarantined
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from testbed.memory.allocator import PageAllocator
from testbed.memory.chunk_cache import ChunkCache
from testbed.memory.radix_cache import Match, Node, RadixCache
from testbed.memory.slots import RequestSlots
from testbed.request import NEVER, NO_PAGES, Request


class KvMemory:
    """All KV of one engine. Sizes in tokens unless they say pages."""

    def __init__(
        self,
        capacity_tokens: int,
        *,
        page_size: int,
        slots: int,
        context_tokens: int,
        prefix_cache: Literal["radix", "chunk", "none"] = "radix",
        eviction: Literal["lru", "lfu"] = "lru",
        evict_whole_need: bool = False,
    ) -> None:
        """``evict_whole_need``: evict as much as is wanted in all, not only what is missing (SGLang 0.5.1)."""
        self.page_size = page_size
        self.allocator = PageAllocator(capacity_tokens, page_size)
        self.slots = RequestSlots(slots, context_tokens, page_size)
        self.cache = (RadixCache if prefix_cache == "radix" else ChunkCache)(self.allocator, eviction)
        self.evict_whole_need = evict_whole_need
        self.owned_pages = 0
        """Pages that belong to requests, not to the tree."""

    @property
    def free_and_evictable_tokens(self) -> int:
        """What an admission may count on."""
        return self.allocator.free_pages * self.page_size + self.cache.evictable_tokens

    def make_room(self, tokens: int) -> int:
        """Evict until ``tokens`` are free, if there is so much; returns the tokens evicted."""
        available = self.allocator.available_tokens
        if available >= tokens:
            return 0
        return self.cache.evict(tokens if self.evict_whole_need else tokens - available)

    # -- one request ----------------------------------------------------------------------------------------------

    def open(self, request: Request) -> None:
        """Give ``request`` a slot, its row beginning with the cached prefix (locked by the caller)."""
        request.slot = self.slots.alloc()
        if isinstance(request.last_node, Node):
            self.cache.count_use(request.last_node)
        self.slots.pages[request.slot, : len(request.prefix_pages)] = request.prefix_pages

    def extend(self, request: Request, new_tokens: int) -> NDArray[np.int32]:
        """Room for ``new_tokens`` more of a prefilling request; returns the new pages, int32 [n]. Raises OutOfPages."""
        held = -(-request.kv_tokens // self.page_size)
        request.kv_tokens += new_tokens
        pages = self.allocator.alloc(-(-request.kv_tokens // self.page_size) - held)
        self.slots.pages[request.slot, held : held + len(pages)] = pages
        self.owned_pages += len(pages)
        return pages

    def publish(self, request: Request) -> None:
        """Make the computed KV of an unfinished request visible to others, and its own copy of what the tree already
        has free::

            0 ... prefix ....... there ....... aligned ... kv_tokens
            | tree | duplicates: | new: goes   | tail: stays the
            |      | freed       | to the tree | request's own
        """
        if self.cache.disabled:
            return
        p = self.page_size
        aligned = request.kv_tokens // p * p
        if aligned == request.prefix_tokens:
            return
        row = self.slots.pages[request.slot]
        tokens = request.fill_ids[:aligned]
        held = request.last_node
        assert isinstance(held, Node)
        there, node = self.cache.insert_below(held, request.prefix_tokens, tokens, row[: aligned // p])
        if there > request.prefix_tokens:
            self._free(row[request.prefix_tokens // p : there // p])
            match: Match = self.cache.match(tokens, request.extra_key)
            row[: aligned // p] = match.pages
            self.slots.rewritten.append((request.slot, aligned // p))
            node = match.node
        self.owned_pages -= (aligned - max(there, request.prefix_tokens)) // p
        self._move_lock(request, node)
        request.prefix_tokens = aligned

    def release(self, request: Request, tokens: NDArray[np.int32], allocated_tokens: int, fence: int = NEVER) -> None:
        """The request is over: the KV of ``tokens`` (committed) goes to the tree in whole pages, the rest of
        ``allocated_tokens`` is free. Pages that only launch ``fence`` writes to are quarantined behind it, if given."""
        p = self.page_size
        row = self.slots.pages[request.slot]
        committed_pages = -(-len(tokens) // p)
        allocated_pages = -(-allocated_tokens // p)
        kept = 0
        if not self.cache.disabled:
            kept = len(tokens) // p
            there, _ = self.cache.insert(tokens[: kept * p], row[:kept], request.extra_key)
            self._free(row[request.prefix_tokens // p : there // p])
            self.owned_pages -= kept - max(there, request.prefix_tokens) // p
        self._free(row[max(kept, request.prefix_tokens // p) : committed_pages])
        over = row[committed_pages:allocated_pages]
        if fence == NEVER:
            self._free(over)
        elif len(over):
            self.allocator.free_behind(fence, over.copy())
            self.owned_pages -= len(over)
        self._close(request)

    def drop(self, request: Request, allocated_tokens: int) -> None:
        """The request gives up its KV (retraction, abort before its prefill is done): its own pages are free, its
        locked prefix stays in the tree."""
        row = self.slots.pages[request.slot]
        self._free(row[request.prefix_tokens // self.page_size : -(-allocated_tokens // self.page_size)])
        self._close(request)

    def set_aside(self, request: Request, key: int) -> None:
        """The request gives up KV that another engine may still write to: see ``PageAllocator.set_aside``."""
        pages = self.slots.pages[request.slot, : -(-request.kv_tokens // self.page_size)].copy()
        self.allocator.set_aside(key, pages)
        self.owned_pages -= len(pages)
        self._close(request)

    def _free(self, pages: NDArray[np.int32]) -> None:
        if len(pages):
            self.allocator.free(pages)
            self.owned_pages -= len(pages)

    def _move_lock(self, request: Request, node: Node) -> None:
        assert isinstance(request.last_node, Node)
        self.cache.lock(node)
        self.cache.unlock(request.last_node)
        request.last_node = node

    def _close(self, request: Request) -> None:
        assert isinstance(request.last_node, Node)
        self.cache.unlock(request.last_node)
        self.slots.free(request.slot)
        request.slot = NEVER
        request.last_node = None
        request.prefix_tokens = request.kv_tokens = 0
        request.prefix_pages = NO_PAGES
