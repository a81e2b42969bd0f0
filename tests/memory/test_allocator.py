"""The page allocator against the sets it stands for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from testbed.memory import OutOfPages, PageAllocator


class AllocatorMachine(RuleBasedStateMachine):
    """Pages handed out are held by somebody, pages behind a fence by nobody, the rest is free."""

    @initialize(capacity=st.integers(1, 40), page_size=st.sampled_from([1, 2, 16]))
    def begin(self, capacity: int, page_size: int) -> None:
        self.allocator = PageAllocator(capacity * page_size + page_size - 1, page_size)
        self.pages = capacity
        self.held: list[int] = []
        self.fenced: list[tuple[int, list[int]]] = []
        self.fence = 0

    @rule(count=st.integers(0, 12))
    def alloc(self, count: int) -> None:
        free = self.pages - len(self.held) - sum(len(pages) for _, pages in self.fenced)
        if count > free:
            with pytest.raises(OutOfPages):
                self.allocator.alloc(count)
            return
        taken = self.allocator.alloc(count).tolist()
        assert len(taken) == count and not set(taken) & set(self.held)
        self.held += taken

    def _give(self, count: int) -> list[int]:
        given, self.held = self.held[:count], self.held[count:]
        return given

    @rule(count=st.integers(0, 12))
    def free(self, count: int) -> None:
        self.allocator.free(np.array(self._give(count), np.int32))

    @rule(count=st.integers(0, 12), ahead=st.integers(0, 2))
    def free_behind(self, count: int, ahead: int) -> None:
        self.fence += ahead  # launches are numbered upwards
        given = self._give(count)
        self.allocator.free_behind(self.fence, np.array(given, np.int32))
        self.fenced.append((self.fence, given))

    @rule(back=st.integers(0, 3))
    def reap(self, back: int) -> None:
        fence = self.fence - back
        self.allocator.reap(fence)
        self.fenced = [(behind, pages) for behind, pages in self.fenced if behind > fence]

    @precondition(lambda self: not self.held)
    @rule()
    def clear(self) -> None:
        self.allocator.clear()
        self.fenced.clear()

    @invariant()
    def partition(self) -> None:
        fenced = [page for _, pages in self.fenced for page in pages]
        free = self.allocator.free_list().tolist()
        assert sorted([*free, *self.held, *fenced]) == list(range(1, self.pages + 1)), "page 0 is never handed out"
        assert sorted(self.allocator.quarantine_list().tolist()) == sorted(fenced)
        assert self.allocator.quarantined_pages == len(fenced)
        assert self.allocator.available_tokens == len(free) * self.allocator.page_size


TestAllocator = AllocatorMachine.TestCase


def test_more_freed_than_exist_is_an_error() -> None:
    allocator = PageAllocator(4, 1)
    page = allocator.alloc(1)
    allocator.free(page)
    with pytest.raises(RuntimeError, match="more pages freed than exist"):
        allocator.free(page)


def test_the_caller_owns_what_it_was_given() -> None:
    """Writing into a free list through an old result would hand pages out twice."""
    allocator = PageAllocator(4, 1)
    pages = allocator.alloc(2)
    allocator.free(pages)
    pages[:] = 99
    assert sorted(allocator.alloc(4).tolist()) == [1, 2, 3, 4]


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert PageAllocator(64, 16).pages_for(tokens) == pages
