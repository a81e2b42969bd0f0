"""The radix tree against a naive model: a dictionary from every cached prefix to the page behind it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from testbed.memory import ChunkCache, Node, PageAllocator, RadixCache

Key = tuple[str, tuple[int, ...]]
PAGES = 60
SPACES = ("", "", "adapter", "salt")


def tokens_of(draw: st.DrawFn, page_size: int) -> np.ndarray[Any, Any]:
    """Sequences over few page contents, so that they share beginnings; the tail may not fill a page."""
    pages = draw(st.lists(st.integers(0, 1), max_size=5))
    body = [10 * page + i % 7 for page in pages for i in range(page_size)]
    if pages and page_size > 1 and draw(st.booleans()):
        body[-1] += 3  # differs in the last token of a page only
    return np.array(body + [1] * draw(st.integers(0, page_size - 1)), np.int32)


class RadixMachine(RuleBasedStateMachine):
    """``cached`` knows the page of each whole-page prefix, ``locks`` how often each is locked."""

    @initialize(page_size=st.sampled_from([1, 2, 16, 64]), eviction=st.sampled_from(["lru", "lfu"]))
    def begin(self, page_size: int, eviction: Any) -> None:
        self.p = page_size
        self.allocator = PageAllocator(PAGES * page_size, page_size)
        self.cache = RadixCache(self.allocator, eviction)
        self.cached: dict[Key, int] = {}
        self.locked: list[tuple[Node, list[Key]]] = []

    def prefixes(self, tokens: np.ndarray[Any, Any], space: str) -> list[Key]:
        return [(space, tuple(tokens[:end].tolist())) for end in range(self.p, len(tokens) + 1, self.p)]

    def known(self, tokens: np.ndarray[Any, Any], space: str) -> list[int]:
        found = []
        for key in self.prefixes(tokens, space):
            if key not in self.cached:
                break
            found.append(self.cached[key])
        return found

    @rule(data=st.data(), space=st.sampled_from(SPACES))
    def insert(self, data: st.DataObject, space: str) -> None:
        tokens = data.draw(st.composite(tokens_of)(self.p))
        whole = tokens[: len(tokens) // self.p * self.p]
        need = len(whole) // self.p
        self.cache.evict((need - self.allocator.free_pages) * self.p)
        self.forget_evicted()
        if self.allocator.free_pages < need:
            return
        pages = self.allocator.alloc(need)
        there, _ = self.cache.insert(whole, pages, space)
        assert there == len(self.known(whole, space)) * self.p
        self.allocator.free(pages[: there // self.p])
        for key, page in list(zip(self.prefixes(whole, space), pages.tolist(), strict=True))[there // self.p :]:
            self.cached[key] = page

    @rule(data=st.data(), space=st.sampled_from(SPACES))
    def match(self, data: st.DataObject, space: str) -> None:
        tokens = data.draw(st.composite(tokens_of)(self.p))
        before = self.shape()
        assert self.cache.matched_tokens(tokens, space) == len(self.known(tokens, space)) * self.p
        assert self.shape() == before, "a look without side effects"
        match = self.cache.match(tokens, space)
        assert match.pages.tolist() == self.known(tokens, space)
        assert match.node.extra_key == space

    @rule(data=st.data(), space=st.sampled_from(SPACES))
    def lock(self, data: st.DataObject, space: str) -> None:
        tokens = data.draw(st.composite(tokens_of)(self.p))
        match = self.cache.match(tokens, space)
        self.cache.lock(match.node)
        self.locked.append((match.node, self.prefixes(tokens, space)[: len(match.pages)]))

    @precondition(lambda self: self.locked)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        node, _ = self.locked.pop(data.draw(st.integers(0, len(self.locked) - 1)))
        self.cache.unlock(node)

    @rule(tokens=st.integers(0, 100))
    def evict(self, tokens: int) -> None:
        order = self.eviction_order()
        evictable, free = self.cache.evictable_tokens, self.allocator.available_tokens
        freed = self.cache.evict(tokens)
        assert freed >= min(tokens, evictable) and self.allocator.available_tokens == free + freed
        gone = self.forget_evicted()
        assert gone * self.p == freed
        assert [node for node in order if node.parent is None] == order[: self.evicted_nodes(order)], "oldest first"

    # -- the model ------------------------------------------------------------------------------------------------

    def shape(self) -> list[Any]:
        return [(id(node), len(node.tokens), node.locks, node.hits, node.touched) for node in self.cache.nodes()]

    def eviction_order(self) -> list[Node]:
        """Leaves that may go, in order, as they are now (a parent becomes one only when its children have gone)."""
        lfu = self.cache.eviction == "lfu"
        leaves = [node for node in self.cache.nodes() if not node.children and not node.locks]
        return sorted(leaves, key=lambda node: (node.hits if lfu else 0, node.touched))

    @staticmethod
    def evicted_nodes(order: list[Node]) -> int:
        return sum(node.parent is None for node in order)

    def forget_evicted(self) -> int:
        """Drop from the model what is no longer in the tree; the tree must not have dropped anything locked."""
        kept = set(self.paths())
        gone = [key for key in self.cached if key not in kept]
        held = {key for _, keys in self.locked for key in keys}
        assert not held & set(gone), "a locked prefix was evicted"
        for key in gone:
            del self.cached[key]
        return len(gone)

    def paths(self) -> dict[Key, int]:
        """Every prefix the tree holds, and its page, by walking from the roots."""
        found: dict[Key, int] = {}
        stack: list[tuple[Node, tuple[int, ...]]] = [(space, ()) for space in self.cache.spaces()]
        while stack:
            node, before = stack.pop()
            for child in node.children.values():
                assert child.parent is node and child.extra_key == node.extra_key
                assert len(child.tokens) == len(child.pages) * self.p > 0
                path = before
                for i, page in enumerate(child.pages.tolist()):
                    path += tuple(child.tokens[i * self.p : (i + 1) * self.p].tolist())
                    assert (child.extra_key, path) not in found, "a path twice"
                    found[child.extra_key, path] = page
                stack.append((child, path))
        return found

    @invariant()
    def tree_is_the_dictionary(self) -> None:
        assert self.paths() == self.cached

    @invariant()
    def locks_are_paths(self) -> None:
        expected: dict[Key, int] = {}
        for _, keys in self.locked:
            for key in keys:
                expected[key] = expected.get(key, 0) + 1
        protected = sum(self.p for key in self.cached if key in expected)
        assert self.cache.protected_tokens == protected
        assert self.cache.evictable_tokens == len(self.cached) * self.p - protected
        for node in self.cache.nodes():
            assert node.parent is not None and node.parent.locks >= min(node.locks, 1)

    @invariant()
    def pages_are_cached_or_free(self) -> None:
        assert sorted([*self.cached.values(), *self.allocator.free_list().tolist()]) == list(range(1, PAGES + 1))


TestRadix = RadixMachine.TestCase
TestRadix.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def seq(*tokens: int) -> np.ndarray[Any, Any]:
    return np.array(tokens, np.int32)


def filled(eviction: Any = "lru", page_size: int = 1) -> tuple[RadixCache, PageAllocator]:
    allocator = PageAllocator(100 * page_size, page_size)
    return RadixCache(allocator, eviction), allocator


def put(cache: RadixCache, allocator: PageAllocator, *tokens: int, key: str = "") -> None:
    pages = allocator.alloc(len(tokens) // cache.page_size)
    there, _ = cache.insert(seq(*tokens), pages, key)
    allocator.free(pages[: there // cache.page_size])


def test_a_split_keeps_pages_locks_and_sizes() -> None:
    cache, allocator = filled()
    put(cache, allocator, 1, 2, 3, 4)
    whole = cache.match(seq(1, 2, 3, 4))
    cache.lock(whole.node)
    part = cache.match(seq(1, 2, 9))
    assert part.pages.tolist() == whole.pages[:2].tolist()
    assert part.node.locks == 1 and part.node is whole.node.parent
    assert (cache.protected_tokens, cache.evictable_tokens) == (4, 0)
    cache.unlock(whole.node)
    assert cache.evict(100) == 4 and not list(cache.nodes())


def test_a_partial_match_pins_only_what_matched() -> None:
    cache, allocator = filled()
    put(cache, allocator, 1, 2, 3, 4)
    cache.lock(cache.match(seq(1, 2, 9)).node)
    assert (cache.protected_tokens, cache.evictable_tokens) == (2, 2)
    assert cache.evict(100) == 2
    assert cache.matched_tokens(seq(1, 2, 3, 4)) == 2


def test_unlock_without_lock_raises_and_changes_nothing() -> None:
    cache, allocator = filled()
    put(cache, allocator, 1, 2, 3)
    node = cache.match(seq(1, 2, 3)).node
    with pytest.raises(RuntimeError, match="not locked"):
        cache.unlock(node)
    assert (node.locks, cache.evictable_tokens, cache.protected_tokens) == (0, 3, 0)


@pytest.mark.parametrize(("eviction", "first_out"), [("lru", 1), ("lfu", 2)])
def test_eviction_order(eviction: str, first_out: int) -> None:
    """1 is used more often, 2 more recently; 2 is looked at more often (a blocked head), which is no use."""
    cache, allocator = filled(eviction)
    put(cache, allocator, 1, 1)
    put(cache, allocator, 2, 2)
    for _ in range(3):
        cache.count_use(cache.match(seq(1, 1)).node)
    for _ in range(9):
        cache.match(seq(2, 2))
    cache.count_use(cache.match(seq(2, 2)).node)
    assert cache.evict(1) == 2
    assert cache.matched_tokens(seq(first_out, first_out)) == 0
    assert cache.matched_tokens(seq(3 - first_out, 3 - first_out)) == 2


def test_children_go_before_parents() -> None:
    cache, allocator = filled()
    put(cache, allocator, 1, 2)
    put(cache, allocator, 1, 2, 3)
    cache.match(seq(1, 2, 3))
    assert cache.evict(1) == 1 and cache.matched_tokens(seq(1, 2, 3)) == 2
    assert cache.evict(1) == 2 and cache.matched_tokens(seq(1, 2)) == 0


def test_name_spaces_never_meet() -> None:
    """The same string as two adapters or salts must be told apart from the same tokens without one."""
    cache, allocator = filled()
    put(cache, allocator, 1, 2, 3, key="a")
    assert cache.matched_tokens(seq(1, 2, 3)) == cache.matched_tokens(seq(1, 2, 3), "b") == 0
    assert cache.matched_tokens(seq(1, 2, 3), "a") == 3
    put(cache, allocator, 1, 2, 3, key="b")
    pages = [cache.match(seq(1, 2, 3), key).pages.tolist() for key in ("a", "b")]
    assert not set(pages[0]) & set(pages[1])


def test_shorter_than_a_page_matches_nothing() -> None:
    cache, allocator = filled(page_size=16)
    put(cache, allocator, *range(16))
    match = cache.match(np.arange(15, dtype=np.int32))
    assert len(match.pages) == 0 and match.node is cache.root


def test_the_tree_keeps_no_view_of_a_prompt() -> None:
    """A view would keep the whole prompt's memory alive as long as its last page is cached."""
    cache, allocator = filled()
    prompt = np.arange(50, dtype=np.int32)
    cache.insert(prompt[:10], allocator.alloc(10))
    (node,) = cache.nodes()
    prompt[:] = -1
    assert node.tokens.tolist() == list(range(10)) and node.tokens.base is None


def test_a_chunk_cache_finds_and_keeps_nothing() -> None:
    cache = ChunkCache(PageAllocator(8, 1))
    match = cache.match(seq(1, 2, 3))
    assert len(match.pages) == 0 and match.node is cache.root and cache.evict(5) == 0
    with pytest.raises(RuntimeError, match="keeps no pages"):
        cache.insert(seq(1), seq(1))


def test_what_was_evicted_stays_counted_after_a_flush() -> None:
    cache, allocator = filled()
    put(cache, allocator, 1, 2, 3)
    cache.evict(2)
    cache.clear()
    allocator.clear()
    assert cache.evicted_tokens_total == 3 and not cache.nodes() and cache.evictable_tokens == 0
