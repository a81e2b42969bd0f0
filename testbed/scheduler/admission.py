"""Which waiting requests fit into the next prefill: SGLang's PrefillAdder (specification B.3, B.4).

Two budgets in tokens are kept: what is left of memory if everybody admitted runs to its expected end
(``total_offset``), and what is left right now (``current_offset``); and two of work: ``input_left`` of
``max_prefill_tokens`` and ``chunk_left`` of ``chunked_prefill_size``.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from testbed.batch import Prefill
from testbed.request import NO_PAGES, Request

if TYPE_CHECKING:
    from testbed.scheduler.scheduler import Scheduler

IGNORE_EOS_RESERVE_TOKENS = 1  # SGLang: kept free per request along the simulated finish order


class Verdict(Enum):
    """Whether the next request may be tried; if not, why."""

    CONTINUE = "continue"
    NO_TOKENS = "no memory"
    OTHER = "no budget"


class PrefillAdder:
    """Collects the prefills of one step."""

    def __init__(self, scheduler: Scheduler, token_budget: int | None, mixed_rows: int) -> None:
        """``token_budget``: tokens this step may prefill (None: prompts are not cut); ``mixed_rows``: running requests
        that decode in the same step and were not given their memory yet."""
        config = scheduler.config
        self.scheduler = scheduler
        self.rules = config.rules
        self.page_size = config.page_size
        self.clip = config.clip_max_new_tokens
        self.input_left = config.max_prefill_tokens - mixed_rows
        self.chunk_left = token_budget
        self.prefills: list[Prefill] = []
        self.chunked: Request | None = None
        self.matched_tokens = 0
        expected = 0.0
        if self.rules.reserve == "estimate":
            expected = scheduler.new_token_ratio * scheduler.remaining_outputs(self.clip)
        self.total_offset = mixed_rows + expected
        self.current_offset = mixed_rows
        self._finish_order: list[tuple[float, int]] | None = None

    # -- budgets ------------------------------------------------------------------------------------------------

    def _in_pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size) * self.page_size

    @property
    def total_left(self) -> float:
        """Tokens left if all that was admitted runs to its expected end."""
        return self.scheduler.free_and_evictable_tokens - self.total_offset

    @property
    def current_left(self) -> int:
        """Tokens left after this step's prefill."""
        return self.scheduler.free_and_evictable_tokens - self.current_offset

    def _verdict(self) -> Verdict:
        if self.total_left <= 0 or self.current_left <= 0:
            return Verdict.NO_TOKENS
        if self.input_left <= 0 or (self.chunk_left is not None and self.chunk_left <= 0):
            return Verdict.OTHER
        return Verdict.CONTINUE

    def _select(self, request: Request, prefix: int, new: int, last: bool, reserve: int) -> None:
        """Take ``new`` tokens of ``request`` behind ``prefix`` and reserve ``reserve`` for its output."""
        self.prefills.append(Prefill(request, prefix, new, last))
        charged = self._in_pages(new)
        self.total_offset += charged + (reserve if self.rules.reserve == "estimate" else 0)
        self.current_offset += charged
        self.input_left -= charged
        if self.chunk_left is not None:
            self.chunk_left -= charged
        if not last:
            self.chunked = request

    def _reserve(self, request: Request) -> int:
        """Output tokens to keep room for."""
        outputs = 0 if self.rules.retracted_reserve == "whole" else request.old_outputs
        return min(request.max_new_tokens - outputs, self.clip)

    # -- selection ----------------------------------------------------------------------------------------------

    def add_chunked(self, request: Request) -> None:
        """Continue the request whose prompt is half computed: always first, whatever the reserves say."""
        prefix = request.kv_tokens
        left = len(request.fill_ids) - prefix
        budget = left if self.chunk_left is None else self.chunk_left
        if not self.rules.can_stall:
            # Only what memory holds now; the rest comes when others have finished (never refused outright: its KV
            # would be stranded).
            budget = min(budget, self.current_left + -prefix % self.page_size)
            if budget < left and self.rules.chunk_align == "page":
                budget = (prefix + budget) // self.page_size * self.page_size - prefix
        new = min(left, budget)
        if new <= 0:
            self.chunked = request
            return
        self._select(request, prefix, new, new == left, self._reserve(request) if new == left else 0)

    def add(self, request: Request) -> Verdict:
        """Try to admit ``request``; anything but CONTINUE ends this step's admission."""
        scheduler = self.scheduler
        alone = not (self.rules.can_stall or scheduler.running.requests or self.prefills or scheduler.others_run())
        if self.rules.ignore_eos_admission and request.ignore_eos and scheduler.cache.disabled and not alone:
            return self._add_ignore_eos(request)
        estimated = self.rules.reserve == "estimate" and not self.rules.can_stall and not alone
        if estimated and self._reserve(request) + 1 >= self.total_left:
            return Verdict.NO_TOKENS  # not even with all but one token cached: a blocked head is not matched every step
        match = scheduler.cache.match(request.matchable_ids, request.extra_key)
        prefix = len(match.pages) * self.page_size
        new = len(request.fill_ids) - prefix
        if self._refuses(request, new, alone):
            return Verdict.NO_TOKENS
        padded = self._in_pages(new)
        budgeted = self.rules.prefill_budget == "always" or self.chunk_left is None
        if budgeted and padded >= self.input_left and self.prefills:
            return Verdict.OTHER
        scheduler.cache.lock(match.node)
        # The lock took the matched tokens out of the evictable ones.
        verdict = Verdict.NO_TOKENS if self._refuses(request, new, alone) else self._cut(request, prefix, new)
        if verdict is not Verdict.CONTINUE:
            scheduler.cache.unlock(match.node)
            return verdict
        request.prefix_tokens = request.kv_tokens = prefix
        request.prefix_pages = match.pages
        request.last_node = match.node
        self.matched_tokens += prefix
        return self._verdict()

    def _refuses(self, request: Request, new: int, alone: bool) -> bool:
        """Whether memory does not hold the request to its expected end. With nobody else about, it is enough that the
        prompt fits: refusing would block the queue for ever."""
        if alone:
            return self._in_pages(new) > self.current_left
        if self.rules.reserve == "none":
            chunk = new if self.chunk_left is None else min(new, self.chunk_left)
            return self._in_pages(chunk) > self.current_left
        needed = new + self._reserve(request)
        if not self.rules.can_stall:
            needed += self.page_size - 1  # the last page is rarely full
        return needed >= self.total_left

    def _cut(self, request: Request, prefix: int, new: int) -> Verdict:
        """Select the request, whole or its first chunk."""
        left = self.chunk_left
        if left is None or self._in_pages(new) <= left or (self.rules.chunk_align == "page" and new <= left):
            self._select(request, prefix, new, True, self._reserve(request))
            return Verdict.CONTINUE
        if self.rules.chunk_align == "page":
            chunk = left // self.page_size * self.page_size
        else:
            chunk = left - self.page_size + 1
        if chunk <= 0 or self.chunked is not None:
            return Verdict.OTHER
        self._select(request, prefix, chunk, False, 0)
        return Verdict.CONTINUE

    def _add_ignore_eos(self, request: Request) -> Verdict:
        """SGLang's rule when lengths are known (EOS ignored, no prefix tree): walk through the finishes in order of
        tokens left and require memory for everybody at each of them (specification B.4)."""
        new = len(request.fill_ids)
        if self._in_pages(new) > min(self.current_left, self.total_left):
            return Verdict.NO_TOKENS
        self._enter_finish_order(request)
        assert self._finish_order is not None
        left = self.current_left - self._in_pages(new)
        freed = 0
        for place, (tokens_left, occupied) in enumerate(self._finish_order):
            rows = len(self._finish_order) - place
            if left + freed - tokens_left * rows <= IGNORE_EOS_RESERVE_TOKENS * rows:
                return Verdict.NO_TOKENS
            freed += occupied
        request.prefix_tokens = request.kv_tokens = 0
        request.prefix_pages = NO_PAGES
        request.last_node = self.scheduler.cache.root
        if self.chunk_left is None or new <= self.chunk_left:
            self._select(request, 0, new, True, min(request.max_new_tokens, self.clip))
        elif self.chunk_left <= 0 or self.chunked is not None:  # below 0: a padded chunk beside decode rows
            return Verdict.OTHER
        else:
            self._select(request, 0, self.chunk_left, False, 0)
        return self._verdict()

    def _enter_finish_order(self, request: Request) -> None:
        """Keep (tokens left, tokens occupied) of everybody sorted by tokens left."""
        scheduler = self.scheduler

        def state(other: Request) -> tuple[float, int]:
            ratio = 1.0 if other.ignore_eos else scheduler.new_token_ratio
            outputs = scheduler.outputs_known(other)
            return other.max_new_tokens * ratio - outputs, other.prompt_tokens + outputs

        if self._finish_order is None:
            everybody = [request, *scheduler.everybody_running(), *(prefill.request for prefill in self.prefills)]
            self._finish_order = sorted((s for s in map(state, everybody) if s[0] > 0), key=lambda s: s[0])
            return
        entry = state(request)
        if entry[0] <= 0:
            return
        # As SGLang: before the first that has at least as much left, else before the last.
        order = self._finish_order
        place = next((i for i, other in enumerate(order) if entry[0] <= other[0]), max(len(order) - 1, 0))
        order.insert(place, entry)
