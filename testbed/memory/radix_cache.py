"""The radix tree over cached prefixes: which tokens have KV, in which pages (SGLang's RadixCache; specification D.2).

Nodes hold whole pages. A node is *locked* while a running or parked request's path passes through it; locked tokens are
protected, the others evictable. Eviction takes unlocked leaves, least recently (or least frequently) used first; time
is a counter of touches, so equal runs evict equally.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from testbed.memory.allocator import PageAllocator
from testbed.request import NO_PAGES

Ints = NDArray[np.int32]


class Node:
    """An edge of the tree with what follows it: ``tokens`` int32 [n * page_size], ``pages`` int32 [n]."""

    __slots__ = ("children", "extra_key", "hits", "locks", "offered", "pages", "parent", "tokens", "touched")

    def __init__(self, parent: Node | None, tokens: Ints, pages: Ints, extra_key: str, touched: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.pages = pages
        self.extra_key = extra_key
        self.children: dict[int | bytes, Node] = {}
        self.locks = 0
        self.touched = touched
        self.hits = 0
        self.offered = False


class Match(NamedTuple):
    """The longest cached prefix: its pages, int32 [n], and the node it ends in."""

    pages: Ints
    node: Node


class RadixCache:
    """``match``, ``insert``, ``lock``/``unlock``, ``evict``; sizes in tokens.

    Requests with different ``extra_key`` (adapter, tenant, salt) live in different name spaces and never share nodes:
    each name space is a child of the root with no tokens of its own.
    """

    disabled = False

    def __init__(self, allocator: PageAllocator, eviction: Literal["lru", "lfu"] = "lru") -> None:
        self.allocator = allocator
        self.page_size = allocator.page_size
        self.eviction = eviction
        self.evicted_tokens_total = 0
        """Since the start: forgetting the tree does not take it back."""
        self.clear()

    def clear(self) -> None:
        """Forget everything. The pages are not returned: the caller clears the allocator, or nothing is cached."""
        self.clock = 0
        self.root = Node(None, NO_PAGES, NO_PAGES, "", 0)
        self.root.locks = 1
        self._spaces: dict[str, Node] = {"": self.root}
        self.evictable_tokens = 0
        self.protected_tokens = 0
        # Heap of (rank at push, serial, node), at most one entry a node (``offered``). Ranks only grow, so an entry
        # whose node was touched since is put back with its new rank; one whose node is locked or has children is
        # dropped.
        self._leaves: list[tuple[tuple[int, int], int, Node]] = []
        self._serial = 0

    # -- reading ------------------------------------------------------------------------------------------------

    def match(self, tokens: Ints, extra_key: str = "") -> Match:
        """The longest cached prefix of ``tokens``, in whole pages. Touches the path; splits a partly matched node."""
        node = self._space(extra_key)
        node.touched = self._tick()
        found: list[Ints] = []
        start, end = 0, len(tokens) // self.page_size * self.page_size
        while start < end:
            child = node.children.get(self._child_key(tokens, start))
            if child is None:
                break
            child.touched = self._tick()
            same = self._common(child.tokens, tokens, start, end)
            node = child if same == len(child.tokens) else self._split(child, same)
            found.append(node.pages)
            start += same
            if node is not child:
                break
        pages = found[0] if len(found) == 1 else np.concatenate(found) if found else NO_PAGES
        return Match(pages, node)

    def matched_tokens(self, tokens: Ints, extra_key: str = "") -> int:
        """Length of the longest cached prefix in tokens, leaving the tree as it is (no touch, no split)."""
        node: Node | None = self._spaces.get(extra_key)
        start, end = 0, len(tokens) // self.page_size * self.page_size
        while node is not None and start < end:
            child = node.children.get(self._child_key(tokens, start))
            if child is None:
                break
            same = self._common(child.tokens, tokens, start, end)
            start += same
            node = child if same == len(child.tokens) else None
        return start

    # -- writing ------------------------------------------------------------------------------------------------

    def insert(self, tokens: Ints, pages: Ints, extra_key: str = "") -> tuple[int, Node]:
        """Take over ``pages`` for ``tokens`` (whole pages both). Returns how many leading tokens were there already
        (their pages stay the caller's, as duplicates or as the tree's own) and the node where the path ends."""
        node = self._space(extra_key)
        node.touched = self._tick()
        return self.insert_below(node, 0, tokens, pages)

    def insert_below(self, node: Node, start: int, tokens: Ints, pages: Ints) -> tuple[int, Node]:
        """``insert`` for a caller who holds ``node``, in which the first ``start`` of ``tokens`` end."""
        end = len(tokens)
        while start < end:
            key = self._child_key(tokens, start)
            child = node.children.get(key)
            if child is None:
                # Copies: a view would keep the whole prompt alive for as long as its last page is cached.
                kept = pages[start // self.page_size :].copy()
                leaf = Node(node, tokens[start:].copy(), kept, node.extra_key, self._tick())
                node.children[key] = leaf
                self.evictable_tokens += end - start
                self._offer(leaf)
                return start, leaf
            child.touched = self._tick()
            same = self._common(child.tokens, tokens, start, end)
            node = child if same == len(child.tokens) else self._split(child, same)
            start += same
        return end, node

    def lock(self, node: Node) -> None:
        """Protect the path from ``node`` to the root from eviction."""
        while node.parent is not None:
            if node.locks == 0:
                self.evictable_tokens -= len(node.tokens)
                self.protected_tokens += len(node.tokens)
            node.locks += 1
            node = node.parent

    def count_use(self, node: Node) -> None:
        """A request was admitted that found the path to ``node``: what LFU counts (looks alone do not count)."""
        while node.parent is not None:
            node.hits += 1
            node = node.parent

    def unlock(self, node: Node) -> None:
        """Undo one ``lock(node)``. Raises RuntimeError when the path is not locked."""
        while node.parent is not None:
            if node.locks <= 0:
                raise RuntimeError("unlock of a node that is not locked")
            node.locks -= 1
            if node.locks == 0:
                self.evictable_tokens += len(node.tokens)
                self.protected_tokens -= len(node.tokens)
                self._offer(node)
            node = node.parent

    def evict(self, tokens: int) -> int:
        """Free unlocked leaves, in order of eviction, until ``tokens`` are freed (whole nodes: it may be more)."""
        freed = 0
        while freed < tokens and self._leaves:
            rank, _, node = heappop(self._leaves)
            node.offered = False
            if node.children or node.locks or node.parent is None:
                continue
            if rank != self._rank(node):
                self._offer(node)
                continue
            self.allocator.free(node.pages)
            freed += len(node.tokens)
            self.evictable_tokens -= len(node.tokens)
            parent = node.parent
            del parent.children[self._child_key(node.tokens, 0)]
            node.parent = None
            if not parent.children:
                self._offer(parent)
        self.evicted_tokens_total += freed
        return freed

    # -- checking -----------------------------------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        """Every node but the roots of name spaces, parents before children."""
        found: list[Node] = []
        level = [child for space in self._spaces.values() for child in space.children.values()]
        while level:
            found += level
            level = [child for node in level if node.children for child in node.children.values()]
        return found

    def spaces(self) -> Iterator[Node]:
        """The roots of the name spaces, in order of creation."""
        yield from self._spaces.values()

    # -- inside -------------------------------------------------------------------------------------------------

    def _space(self, extra_key: str) -> Node:
        space = self._spaces.get(extra_key)
        if space is None:
            space = self._spaces[extra_key] = Node(None, NO_PAGES, NO_PAGES, extra_key, 0)
            space.locks = 1
        return space

    def _tick(self) -> int:
        self.clock += 1
        return self.clock

    def _rank(self, node: Node) -> tuple[int, int]:
        return (0, node.touched) if self.eviction == "lru" else (node.hits, node.touched)

    def _offer(self, node: Node) -> None:
        """Enter ``node`` into the eviction order if it is an unlocked leaf."""
        if not node.offered and not node.children and node.locks == 0 and node.parent is not None:
            self._serial += 1
            node.offered = True
            heappush(self._leaves, (self._rank(node), self._serial, node))

    def _child_key(self, tokens: Ints, start: int) -> int | bytes:
        if self.page_size == 1:
            return int(tokens[start])
        return tokens[start : start + self.page_size].tobytes()

    def _common(self, edge: Ints, tokens: Ints, start: int, end: int) -> int:
        """Leading tokens, in whole pages, that ``edge`` and ``tokens[start:end]`` share."""
        length = min(len(edge), end - start)
        different = edge[:length] != tokens[start : start + length]
        first = int(different.argmax())
        same = first if different[first] else length
        return same // self.page_size * self.page_size

    def _split(self, child: Node, tokens: int) -> Node:
        """Cut ``child`` after ``tokens``; returns the new upper node. Locks and sizes stay as they were."""
        parent = child.parent
        assert parent is not None and 0 < tokens < len(child.tokens)
        at = tokens // self.page_size
        upper = Node(parent, child.tokens[:tokens], child.pages[:at], child.extra_key, self._tick())
        upper.locks = child.locks
        upper.hits = child.hits
        parent.children[self._child_key(child.tokens, 0)] = upper
        child.tokens = child.tokens[tokens:]
        child.pages = child.pages[at:]
        child.parent = upper
        upper.children[self._child_key(child.tokens, 0)] = child
        return upper
