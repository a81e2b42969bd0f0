"""What must be true after every step (``test_menu`` 3.1). Each check has a stable id and counts its evaluations.

The *delta* check compares totals and costs half a microsecond; the *full* one compares exact sets of pages, locks and
rows. Full: when idle, every 1000 steps or more (``Invariants.full_every``), and at every step on request (small pools
in tests).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from testbed.batch import Batch, ForwardMode
from testbed.memory import Node
from testbed.request import NEVER, NO_PAGES, Request
from testbed.scheduler.micro_batch import seats_of

if TYPE_CHECKING:
    from testbed.scheduler.scheduler import Scheduler

FULL_EVERY = 1000
PAGES_A_STEP = 100
"""The full check looks at every page (3 ns each): it is made so seldom that a step pays for no more than these."""


class InvariantError(AssertionError):
    """Something that must always hold does not: a defect of the program, never of its input."""

    def __init__(self, check: str, message: str) -> None:
        super().__init__(f"[{check}] {message}")
        self.check = check


class Invariants:
    """The checks of one scheduler."""

    def __init__(self, scheduler: Scheduler, every_step: bool) -> None:
        self._scheduler = scheduler
        self.every_step = every_step
        self.full_every = max(FULL_EVERY, scheduler.memory.allocator.num_pages // PAGES_A_STEP)
        """Steps from one full check to the next."""
        self._ended: set[int] = set()
        self._ended_below = 0
        """Every request of a lower rank has ended; of the others, those in the set."""
        self._met = np.zeros(scheduler.memory.allocator.num_pages + 1, dtype=np.bool_)
        """Scratch of the full check, kept: a fresh one costs more than the check."""
        self.evaluations = {"pages": 0, "full": 0, "batch": 0, "ended_once": 0, "idle": 0}

    def _require(self, truth: bool, check: str, message: str) -> None:
        if not truth:
            raise InvariantError(check, f"step {self._scheduler.steps}: {message}")

    # -- when -----------------------------------------------------------------------------------------------------

    def after_decision(self, batch: Batch) -> None:
        """Every launch: totals, and the batch's own limits."""
        self.pages()
        if batch.prefills or self.every_step:
            self.batch(batch)
        if self.every_step or batch.index % self.full_every == 0:
            self.full()

    def when_idle(self) -> None:
        """Nothing to do: everything; and if nothing is left at all, everything is free or cached."""
        scheduler = self._scheduler
        self.full()
        self.evaluations["idle"] += 1
        if scheduler.idle:
            memory = scheduler.memory
            self._require(memory.owned_pages == 0, "idle", f"{memory.owned_pages} pages owned by nobody")
            self._require(memory.cache.protected_tokens == 0, "idle", "a tree node is locked by nobody")
            self._require(memory.slots.available == memory.slots.count, "idle", "a request slot is held by nobody")

    def ended(self, request: Request) -> None:
        """Every request ends once."""
        self.evaluations["ended_once"] += 1
        again = request.rank < self._ended_below or request.rank in self._ended
        self._require(not again, "ended_once", f"request {request.rid} ended twice")
        self._ended.add(request.rank)
        while self._ended_below in self._ended:
            self._ended.remove(self._ended_below)
            self._ended_below += 1

    # -- what -----------------------------------------------------------------------------------------------------

    def pages(self) -> None:
        """free + quarantined + cached + owned = capacity (3.1 row 1, as totals)."""
        self.evaluations["pages"] += 1
        memory = self._scheduler.memory
        allocator, cache = memory.allocator, memory.cache
        cached = (cache.evictable_tokens + cache.protected_tokens) // memory.page_size
        total = allocator.free_pages + allocator.quarantined_pages + cached + memory.owned_pages
        if total != allocator.num_pages:
            raise InvariantError(
                "pages",
                f"step {self._scheduler.steps}: free {allocator.free_pages} + quarantined "
                f"{allocator.quarantined_pages} + cached {cached} + owned {memory.owned_pages} = {total}, "
                f"not the capacity of {allocator.num_pages}",
            )

    def pages_of(self, free_pages: NDArray[np.int64], owned_pages: NDArray[np.int64]) -> None:
        """``pages`` for many steps between which nothing was cached or quarantined: int64 [steps] both."""
        self.evaluations["pages"] += len(free_pages)
        memory = self._scheduler.memory
        cached = (memory.cache.evictable_tokens + memory.cache.protected_tokens) // memory.page_size
        total = free_pages + owned_pages + (memory.allocator.quarantined_pages + cached)
        self._require(bool((total == memory.allocator.num_pages).all()), "pages", "the totals of a leap do not add up")

    def batch(self, batch: Batch) -> None:
        """A batch keeps the limits and has every request once, none of them waiting (3.1 rows 20, 22). That the running
        rows are distinct and do not wait is part of the full check: here they may be many."""
        self.evaluations["batch"] += 1
        scheduler = self._scheduler
        prefills, running = batch.prefills, len(scheduler.running.requests)
        self._require(bool(prefills or batch.decodes), "batch", "empty batch")
        ranks = {prefill.request.rank for prefill in prefills}
        self._require(len(ranks) == len(prefills), "batch", "a request is in the batch twice")
        limit, rows = scheduler.config.max_running_requests, running + len(prefills)
        if scheduler.micro_batch.others:
            limit = len(scheduler.micro_batches) * seats_of(limit, len(scheduler.micro_batches))
            rows = scheduler.memory.slots.count - scheduler.memory.slots.available
        # A half-computed prompt goes on whatever the limit says: its KV would be stranded.
        self._require(rows <= limit + scheduler.continued, "batch", f"{rows} requests run, the limit is {limit}")
        for request, prefix, new, last in batch.prefills:
            self._require(new > 0, "batch", f"{request.rid} prefills {new} tokens")
            self._require(request.slot != NEVER and not request.in_running, "batch", f"{request.rid} runs or waits")
            self._require(request.kv_tokens == prefix + new, "batch", f"{request.rid}: gap between chunks")
            self._require(last == (prefix + new == len(request.fill_ids)), "batch", f"{request.rid}: wrong last chunk")
        mixed = bool(batch.prefills) and bool(batch.decodes)
        expected = ForwardMode.MIXED if mixed else ForwardMode.EXTEND if batch.prefills else ForwardMode.DECODE
        self._require(batch.mode is expected, "batch", f"mode {batch.mode.name}, contents {expected.name}")

    def full(self) -> None:
        """Exact sets: every page has one owner; rows, locks and counters equal their recounts (3.1 rows 1-6, 11-17)."""
        self.evaluations["full"] += 1
        self.pages()
        scheduler = self._scheduler
        holders = [request for request in scheduler.requests.values() if request.slot != NEVER]
        nodes = scheduler.memory.cache.nodes()
        self._page_owners(holders, nodes)
        self._locks(holders, nodes)
        self._running_rows()
        waiting = {request.rank for request in scheduler.waiting}
        self._require(len(waiting) == len(scheduler.waiting), "full", "a request waits twice")
        side = scheduler.side
        unplaced = side.unplaced() if side is not None else scheduler.grammar_queue.compiling
        everybody = [*(r.rank for r in holders), *waiting, *unplaced]
        self._require(sorted(everybody) == sorted(r.rank for r in scheduler.requests.values()), "full", "request lost")
        self._require(all(r.slot == NEVER for r in scheduler.waiting), "full", "a waiting request holds a slot")
        asked = sum(request.grammar is not None for request in scheduler.requests.values())
        self._require(asked == scheduler.grammar_queue.open, "full", "requests with a grammar miscounted")
        steps = [one.last_batch for one in scheduler.micro_batches if one.last_batch is not None]
        joining = {prefill.request.rank for step in steps for prefill in step.prefills}
        lost = [r for r in holders if not (r.in_running or r is scheduler.chunked or r.rank in joining)]
        somewhere = not lost or (side is not None and all(map(side.holds, lost)))
        self._require(somewhere, "full", "a request holds KV and is in no batch")
        if side is not None:
            self._require(not side.problem(), "rooms", side.problem())

    def _running_rows(self) -> None:
        """Every request runs in one micro-batch at most; the columns say of each row what the request says."""
        scheduler = self._scheduler
        everywhere = [request.rank for one in scheduler.micro_batches for request in one.running.requests]
        self._require(len(set(everywhere)) == len(everywhere), "full", "a request runs twice")
        for running in (one.running for one in scheduler.micro_batches):
            live = [request for request in running.requests if request.finish_reason is None]
            miscounted = running.finished_rows != len(running.requests) - len(live)
            self._require(not miscounted, "full", "finished rows miscounted")
            for row, request in enumerate(running.requests):
                if request.finish_reason is None:
                    held = int(running.start[row]) + running.advance
                    same = held == scheduler.allocated_tokens(request)
                    self._require(same, "full", f"{request.rid}: KV length differs")
                    self._require(int(running.slots[row]) == request.slot, "full", f"{request.rid}: slot differs")

    def _page_owners(self, holders: list[Request], nodes: list[Node]) -> None:
        scheduler = self._scheduler
        memory = scheduler.memory
        p = memory.page_size
        owned = [
            memory.slots.pages[r.slot, r.prefix_tokens // p : -(-scheduler.allocated_tokens(r) // p)] for r in holders
        ]
        parts = [memory.allocator.free_list(), memory.allocator.quarantine_list(), *owned, *(n.pages for n in nodes)]
        # As many entries as pages, and every page met: then every page is met once.
        pages, met = np.concatenate(parts), self._met
        met[:] = False
        met[0] = True
        met[pages] = True
        whole = len(pages) == memory.allocator.num_pages and bool(met.all())
        self._require(whole, "full", "the pages are not partitioned among free, cached, owned and quarantined")
        self._require(sum(map(len, owned)) == memory.owned_pages, "full", "owned pages miscounted")
        slots = sorted([*memory.slots.free_list(), *(request.slot for request in holders)])
        self._require(slots == list(range(memory.slots.count)), "full", "a slot is free and held, or neither")

    def _locks(self, holders: list[Request], nodes: list[Node]) -> None:
        """A node's lock count is the number of holders whose path passes through it; sizes equal their recount."""
        memory = self._scheduler.memory
        cache = memory.cache
        expected: dict[Node, int] = {}
        for request in holders:
            node, depth, path = request.last_node, 0, [NO_PAGES]
            while isinstance(node, Node) and node.parent is not None:
                expected[node] = expected.get(node, 0) + 1
                depth += len(node.tokens)
                path.append(node.pages)
                node = node.parent
            if not cache.disabled:
                self._require(depth == request.prefix_tokens, "full", f"{request.rid}: prefix is not its locked path")
                table = memory.slots.pages[request.slot, : depth // memory.page_size]
                same = np.array_equal(table, np.concatenate(path[::-1]))
                self._require(same, "full", f"{request.rid}: its page table does not name its locked path's pages")
        evictable = protected = 0
        page_size = cache.page_size
        for node in nodes:
            tokens, locks = len(node.tokens), node.locks
            if locks != expected.get(node, 0):
                self._require(False, "full", "lock count differs from the requests' paths")
            if tokens != len(node.pages) * page_size:
                self._require(False, "full", "node key and pages differ")
            if locks:
                protected += tokens
            else:
                evictable += tokens
        self._require(evictable == cache.evictable_tokens, "full", "evictable tokens miscounted")
        self._require(protected == cache.protected_tokens, "full", "protected tokens miscounted")
