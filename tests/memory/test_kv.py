"""KvMemory: the moves of pages between free, owned, cached and quarantined, against exact sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from testbed.memory import KvMemory, OutOfPages
from testbed.messages import GenerateRequest, TokenPrompt
from testbed.request import NEVER, Request


def request(rid: str, tokens: np.ndarray[Any, Any], extra_key: str = "") -> Request:
    return Request(GenerateRequest(rid, TokenPrompt(tokens), extra_key=extra_key), 0, tokens, 100)


class KvMachine(RuleBasedStateMachine):
    """Requests that open, extend, publish, decode, end or give up, as a scheduler makes them."""

    @initialize(
        page_size=st.sampled_from([1, 2, 3, 16]),
        pages=st.integers(4, 24),
        prefix_cache=st.sampled_from(["radix", "radix", "chunk"]),
    )
    def begin(self, page_size: int, pages: int, prefix_cache: Any) -> None:
        self.p = page_size
        self.memory = KvMemory(
            pages * page_size, page_size=page_size, slots=4, context_tokens=400, prefix_cache=prefix_cache
        )
        self.open: list[tuple[Request, int]] = []  # with the KV tokens allocated
        self.fence = 0
        self.born = 0

    def room(self, tokens: int) -> bool:
        self.memory.make_room(tokens + self.p)
        return self.memory.allocator.available_tokens >= tokens + self.p

    @precondition(lambda self: len(self.open) < 4)
    @rule(stem=st.integers(0, 40), own=st.integers(1, 20), which=st.integers(0, 1), key=st.sampled_from(["", "t"]))
    def start(self, stem: int, own: int, which: int, key: str) -> None:
        self.born += 1
        parts = (np.arange(stem) + 100 * which, np.arange(own) + 1000 * self.born)
        new = request(f"r{self.born}", np.concatenate(parts).astype(np.int32), key)
        match = self.memory.cache.match(new.fill_ids[:-1], key)
        self.memory.cache.lock(match.node)
        new.prefix_tokens = new.kv_tokens = len(match.pages) * self.p
        new.prefix_pages, new.last_node = match.pages, match.node
        if not self.room(len(new.fill_ids) - new.kv_tokens):
            self.memory.cache.unlock(match.node)
            return
        self.memory.open(new)
        self.open.append((new, new.kv_tokens))

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.integers(0, len(self.open) - 1))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), tokens=st.integers(1, 30))
    def prefill(self, data: st.DataObject, tokens: int) -> None:
        at = self.pick(data)
        chosen, allocated = self.open[at]
        tokens = min(tokens, len(chosen.fill_ids) - chosen.kv_tokens)
        if tokens < 1 or allocated != chosen.kv_tokens or not self.room(tokens):
            return
        before = -(-chosen.kv_tokens // self.p)
        pages = self.memory.extend(chosen, tokens)
        assert len(pages) == -(-chosen.kv_tokens // self.p) - before, "just enough pages"
        self.open[at] = (chosen, chosen.kv_tokens)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        chosen, allocated = self.open[self.pick(data)]
        if allocated != chosen.kv_tokens:
            return
        self.memory.publish(chosen)
        if not self.memory.cache.disabled:
            aligned = chosen.kv_tokens // self.p * self.p
            assert chosen.prefix_tokens == aligned
            match = self.memory.cache.match(chosen.fill_ids[:aligned], chosen.extra_key)
            row = self.memory.slots.pages[chosen.slot, : aligned // self.p]
            assert row.tolist() == match.pages.tolist(), "the table names the tree's pages, not freed copies"

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        chosen, allocated = self.open.pop(self.pick(data))
        tokens = chosen.fill_ids[: chosen.kv_tokens]
        # As after an overlapped step: room for one token more than is committed, perhaps in a page of its own.
        over = data.draw(st.integers(0, 1))
        if over and allocated == chosen.kv_tokens and self.memory.allocator.free_pages:
            if allocated % self.p == 0:
                page = self.memory.allocator.alloc(1)
                self.memory.slots.pages[chosen.slot, allocated // self.p] = page[0]
                self.memory.owned_pages += 1
            allocated += 1
        self.fence += 1
        self.memory.release(chosen, tokens, allocated, data.draw(st.sampled_from([NEVER, self.fence])))
        assert chosen.slot == NEVER and chosen.last_node is None and chosen.kv_tokens == 0

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        chosen, allocated = self.open.pop(self.pick(data))
        cached = self.memory.cache.evictable_tokens + self.memory.cache.protected_tokens
        self.memory.drop(chosen, allocated)
        assert self.memory.cache.evictable_tokens + self.memory.cache.protected_tokens == cached, "the prefix stays"

    @rule()
    def reap(self) -> None:
        self.memory.allocator.reap(self.fence)

    @invariant()
    def every_page_has_one_owner(self) -> None:
        memory = self.memory
        owned = [
            memory.slots.pages[r.slot, r.prefix_tokens // self.p : -(-allocated // self.p)].tolist()
            for r, allocated in self.open
        ]
        cached = [node.pages.tolist() for node in memory.cache.nodes()]
        free = [memory.allocator.free_list().tolist(), memory.allocator.quarantine_list().tolist()]
        everything = sorted(page for part in (*owned, *cached, *free) for page in part)
        assert everything == list(range(1, memory.allocator.num_pages + 1))
        assert memory.owned_pages == sum(map(len, owned))
        held = sorted([*memory.slots.free_list(), *(r.slot for r, _ in self.open)])
        assert held == list(range(4))

    @invariant()
    def prefixes_are_locked(self) -> None:
        memory = self.memory
        assert memory.cache.protected_tokens <= sum(r.prefix_tokens for r, _ in self.open)
        for chosen, _ in self.open:
            if not memory.cache.disabled:
                assert memory.cache.matched_tokens(chosen.fill_ids, chosen.extra_key) >= chosen.prefix_tokens


TestKv = KvMachine.TestCase
TestKv.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def opened(memory: KvMemory, tokens: list[int]) -> Request:
    new = request("r", np.array(tokens, np.int32))
    match = memory.cache.match(new.fill_ids[:-1])
    memory.cache.lock(match.node)
    new.prefix_tokens = new.kv_tokens = len(match.pages) * memory.page_size
    new.prefix_pages, new.last_node = match.pages, match.node
    memory.open(new)
    return new


def test_extend_takes_nothing_when_it_cannot() -> None:
    memory = KvMemory(16, page_size=4, slots=2, context_tokens=100)
    one = opened(memory, list(range(40)))
    with pytest.raises(OutOfPages):
        memory.extend(one, 40)
    assert memory.allocator.free_pages == 4 and memory.owned_pages == 0


def test_two_requests_with_one_prompt_share_pages_after_publish() -> None:
    """The second one's copy is freed at once, and its table names the tree's pages (menu A9)."""
    memory = KvMemory(64, page_size=4, slots=2, context_tokens=100)
    one, two = opened(memory, list(range(12))), opened(memory, list(range(12)))
    memory.extend(one, 12)
    memory.extend(two, 12)
    memory.publish(one)
    free = memory.allocator.free_pages
    memory.publish(two)
    assert memory.allocator.free_pages == free + 3
    rows = memory.slots.pages[[one.slot, two.slot], :3].tolist()
    assert rows[0] == rows[1]


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("off_page", [-1, 0, 1])
def test_page_edges_leave_nothing_behind(page_size: int, off_page: int) -> None:
    """k pages less, exactly and plus one token (menu A3)."""
    length = 3 * page_size + off_page
    if length < 2:
        length = 2
    memory = KvMemory(8 * page_size, page_size=page_size, slots=2, context_tokens=1000)
    one = opened(memory, list(range(length)))
    memory.extend(one, length)
    memory.publish(one)
    memory.release(one, one.fill_ids, length)
    assert memory.owned_pages == 0 and memory.cache.protected_tokens == 0
    assert memory.cache.evictable_tokens == length // page_size * page_size
    assert memory.allocator.free_pages == 8 - length // page_size


def test_whole_need_or_shortfall() -> None:
    """How much is evicted when 2 of 4 wanted tokens are free."""
    freed = []
    for whole in (False, True):
        memory = KvMemory(10, page_size=1, slots=2, context_tokens=100, evict_whole_need=whole)
        for start in range(8):
            memory.cache.insert(np.array([start], np.int32), memory.allocator.alloc(1))
        freed.append(memory.make_room(4))
    assert freed == [2, 4]
