"""Named defects, one at a time, put into the program: the checks must find each of them.

The table says what is broken and what finds it; ``nothing`` broken must find nothing. A check that finds none of these
would be a decoration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from testbed.memory import KvMemory, PageAllocator, RadixCache, RequestSlots
from testbed.messages import AbortRequest
from testbed.request import FinishReason
from testbed.scheduler import retraction
from testbed.scheduler.admission import PrefillAdder, Verdict
from testbed.scheduler.running import RunningBatch
from testbed.scheduler.scheduler import Scheduler
from tests.properties.draws import LOOPS
from tests.properties.world import Job, burst, engine, run

Patch = pytest.MonkeyPatch


def battery() -> None:
    """A few small runs in which everything happens: sharing, chunks, retraction, eviction, overlap, aborts."""
    shared = [Job(f"s{i}", (("stem", 20), (f"own {i}", 5)), 4 + i, arrival_ns=8_000 * i) for i in range(6)]
    pressed = burst(6, prompt=15, outputs=30)
    for loop in LOOPS:
        for page_size, kv_tokens in ((1, 90), (4, 96)):
            fields: dict[str, Any] = {"loop": loop, "page_size": page_size, "chunked_prefill_size": 16}
            run(engine(max_running_requests=3, **fields), shared, kv_tokens=kv_tokens)
            run(engine(clip_max_new_tokens=1, **fields), pressed, kv_tokens=kv_tokens)
            run(
                engine(batching="mixed_chunk", rules={"over_allocated": "free_at_result"}, **fields),
                [*shared, *pressed],
            )
        same = [Job(f"d{i}", (("same", 20),), 6) for i in range(4)]
        run(engine(loop=loop), same, kv_tokens=120)
        chunked = [Job("long", (("l", 60),), 5, iteration=0), Job("other", iteration=1)]
        run(engine(loop=loop, chunked_prefill_size=16), chunked, script={2: [AbortRequest("long")]})
        script = {3: [AbortRequest("s0")], 9: [AbortRequest("r1"), AbortRequest("r5")]}
        run(engine(loop=loop), [*shared, *pressed], kv_tokens=90, script=script)
        tenants = [Job("a", (("p", 20),), extra_key="a"), Job("b", (("p", 20),), extra_key="b", arrival_ns=10**9)]
        assert run(engine(loop=loop), tenants).outputs["b"].cached_tokens == 0, "a tenant found another's prompt"
        four = run(engine(loop=loop, max_running_requests=4, policy="lof"), burst(4, 5, 20), kv_tokens=200)
        assert max(batch.rows for batch, _ in four.batches) == 4, "four fit and do not run together"


def without(patch: Patch, owner: Any, name: str, result: Any = None) -> None:
    """The method does nothing."""
    patch.setattr(owner, name, lambda *args, **kwargs: result)


def around(patch: Patch, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """``replacement(original, self, ...)`` in place of the method."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda self, *args, **kwargs: replacement(original, self, *args, **kwargs))


# -- memory --------------------------------------------------------------------------------


def forgets_to_free_duplicates(patch: Patch) -> None:
    def publish(original: Any, self: KvMemory, request: Any) -> None:
        self._free = lambda pages: None  # type: ignore[method-assign]
        original(self, request)
        del self._free

    around(patch, KvMemory, "publish", publish)


def forgets_to_remap(patch: Patch) -> None:
    def publish(original: Any, self: KvMemory, request: Any) -> None:
        row = self.slots.pages[request.slot].copy()
        original(self, request)
        self.slots.pages[request.slot] = row

    around(patch, KvMemory, "publish", publish)


def frees_twice(patch: Patch) -> None:
    def free(original: Any, self: KvMemory, pages: Any) -> None:
        original(self, pages)
        if len(pages):
            self.allocator.free(pages[:1])

    around(patch, KvMemory, "_free", free)


def forgets_to_unlock(patch: Patch) -> None:
    without(patch, RadixCache, "unlock")


def forgets_to_lock(patch: Patch) -> None:
    without(patch, RadixCache, "lock")


def evicts_what_is_locked(patch: Patch) -> None:
    def evict(original: Any, self: RadixCache, tokens: int) -> int:
        for node in self.nodes():
            if node.locks and not node.children and tokens > 0:
                self.allocator.free(node.pages)
                del node.parent.children[self._child_key(node.tokens, 0)]  # type: ignore[union-attr]
                self.protected_tokens -= len(node.tokens)
                return len(node.tokens)
        return int(original(self, tokens))

    around(patch, RadixCache, "evict", evict)


def shares_across_name_spaces(patch: Patch) -> None:
    around(patch, RadixCache, "_space", lambda original, self, extra_key: self.root)


def drops_the_fence(patch: Patch) -> None:
    without(patch, PageAllocator, "free_behind")


def never_reaps(patch: Patch) -> None:
    without(patch, PageAllocator, "reap")


def leaks_the_extra_page(patch: Patch) -> None:
    def release(original: Any, self: KvMemory, request: Any, tokens: Any, allocated: int, *fence: int) -> None:
        original(self, request, tokens, min(allocated, len(tokens)), *fence)

    around(patch, KvMemory, "release", release)


def keeps_the_slot(patch: Patch) -> None:
    without(patch, RequestSlots, "free")


def drops_without_freeing(patch: Patch) -> None:
    def drop(original: Any, self: KvMemory, request: Any, allocated: int) -> None:
        original(self, request, request.prefix_tokens)

    around(patch, KvMemory, "drop", drop)


# -- decisions --------------------------------------------------------------------------------


def latches_full(patch: Patch) -> None:
    """The first refusal closes the door for ever."""

    def may_admit(original: Any, self: Scheduler, budget: Any) -> bool:
        self.latched = getattr(self, "latched", False) or self.running.finished_rows > 0  # type: ignore[attr-defined]
        return bool(original(self, budget)) and not self.latched  # type: ignore[attr-defined]

    def add(original: Any, self: PrefillAdder, request: Any) -> Verdict:
        verdict: Verdict = original(self, request)
        if verdict is not Verdict.CONTINUE:
            self.scheduler.latched = True  # type: ignore[attr-defined]
        return verdict

    around(patch, Scheduler, "_may_admit", may_admit)
    around(patch, PrefillAdder, "add", add)


def skips_the_filter(patch: Patch) -> None:
    without(patch, RunningBatch, "filter_finished", False)


def calls_every_chunk_the_last(patch: Patch) -> None:
    def select(
        original: Any, self: PrefillAdder, request: Any, prefix: int, new: int, last: bool, reserve: int
    ) -> None:
        original(self, request, prefix, new, True, reserve)

    around(patch, PrefillAdder, "_select", select)


def ignores_the_limit(patch: Patch) -> None:
    around(patch, Scheduler, "get_next_batch_to_run", _without_limit)


def _without_limit(original: Any, self: Scheduler, now_ns: int) -> Any:
    self.max_running_requests = 1000
    return original(self, now_ns)


def ignores_the_memory_of_a_step(patch: Patch) -> None:
    without(patch, RunningBatch, "pages_needed", 0)


def opens_pages_a_step_late(patch: Patch) -> None:
    def rows(original: Any, self: RunningBatch) -> Any:
        self.advance -= 1
        opening = original(self)
        self.advance += 1
        return opening

    around(patch, RunningBatch, "rows_opening_a_page", rows)


def loses_the_retracted(patch: Patch) -> None:
    without(patch, retraction, "_wait_again")


def retracted_forget_their_outputs(patch: Patch) -> None:
    original = retraction._retract

    def retract(scheduler: Any, request: Any) -> None:
        original(scheduler, request)
        request.fill_ids = request.fill_ids[: request.prompt_tokens]

    patch.setattr(retraction, "_retract", retract)


def retracted_count_their_outputs_twice(patch: Patch) -> None:
    original = retraction._retract

    def retract(scheduler: Any, request: Any) -> None:
        original(scheduler, request)
        request.old_outputs += 1

    patch.setattr(retraction, "_retract", retract)


def deals_the_wrong_row(patch: Patch) -> None:
    def commit(original: Any, self: RunningBatch, batch: Any, token_ids: Any) -> None:
        original(self, batch, np.roll(token_ids, 1))

    around(patch, RunningBatch, "commit", commit)


# -- ends --------------------------------------------------------------------------------


def ends_one_token_late(patch: Patch) -> None:
    def merge(original: Any, self: RunningBatch, requests: Any, front: bool = False) -> None:
        for request in requests:
            request.max_new_tokens += 1
        original(self, requests, front)
        for request in requests:
            request.max_new_tokens -= 1

    around(patch, RunningBatch, "merge", merge)


def ends_twice(patch: Patch) -> None:
    def finish(original: Any, self: Scheduler, request: Any, reason: Any, ended: Any) -> None:
        original(self, request, reason, ended)
        ended.append(request)

    around(patch, Scheduler, "finish", finish)


def an_abort_keeps_its_pages(patch: Patch) -> None:
    def abort(original: Any, self: Scheduler, rid: str) -> Any:
        self._release = lambda request: None  # type: ignore[method-assign]
        answer = original(self, rid)
        del self._release
        return answer

    around(patch, Scheduler, "abort", abort)


def an_abort_is_forgotten_by_the_chunk(patch: Patch) -> None:
    def abort(original: Any, self: Scheduler, rid: str) -> Any:
        chunked = self.chunked
        answer = original(self, rid)
        self.chunked = chunked
        return answer

    around(patch, Scheduler, "abort", abort)


def late_results_count_for_the_ended(patch: Patch) -> None:
    """An ended request's late token ends it again."""

    def process(original: Any, self: Scheduler, batch: Any, result: Any, ended: Any) -> None:
        original(self, batch, result, ended)
        for request in batch.decodes:
            if request.finish_reason is not None and request not in ended:
                self._end(request, FinishReason.LENGTH, "", 200)

    around(patch, Scheduler, "_process_decodes", process)


def extra_rows_are_not_counted(patch: Patch) -> None:
    without(patch, Scheduler, "count_extra_rows")


def first_tokens_are_not_stamped(patch: Patch) -> None:
    without(patch, Scheduler, "token_sent")


def nothing(patch: Patch) -> None:
    """The control: the program as it is."""


class Mutant(NamedTuple):
    break_it: Callable[[Patch], None]
    found_as: str
    """A part of what is reported: the invariant's id, or the check's words."""


MUTANTS = [
    Mutant(forgets_to_free_duplicates, "not partitioned"),
    Mutant(forgets_to_remap, "its page table"),
    Mutant(frees_twice, "[pages]"),
    Mutant(forgets_to_unlock, "lock count differs"),
    Mutant(forgets_to_lock, "lock count differs"),
    Mutant(evicts_what_is_locked, "tokens miscounted"),
    Mutant(shares_across_name_spaces, "a tenant found another's prompt"),
    Mutant(drops_the_fence, "[pages]"),
    Mutant(never_reaps, "drained"),
    Mutant(leaks_the_extra_page, "not partitioned"),
    Mutant(keeps_the_slot, "a slot is free and held"),
    Mutant(drops_without_freeing, "not partitioned"),
    Mutant(latches_full, "Idle"),
    Mutant(skips_the_filter, "not partitioned"),
    Mutant(calls_every_chunk_the_last, "[batch]"),
    Mutant(ignores_the_limit, "the limit is 3"),
    Mutant(ignores_the_memory_of_a_step, "OutOfPages"),
    Mutant(opens_pages_a_step_late, "not partitioned"),
    Mutant(loses_the_retracted, "request lost"),
    Mutant(retracted_forget_their_outputs, "token times"),
    Mutant(retracted_count_their_outputs_twice, "tokens"),
    Mutant(deals_the_wrong_row, "foreign tokens"),
    Mutant(ends_one_token_late, "token times"),
    Mutant(ends_twice, "Deadlock"),
    Mutant(an_abort_keeps_its_pages, "not partitioned"),
    Mutant(an_abort_is_forgotten_by_the_chunk, "not partitioned"),
    Mutant(late_results_count_for_the_ended, "[ended_once]"),
    Mutant(extra_rows_are_not_counted, "work"),
    Mutant(first_tokens_are_not_stamped, "token times"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.break_it.__name__ for mutant in MUTANTS])
def test_a_defect_is_found(mutant: Mutant, monkeypatch: Patch) -> None:
    mutant.break_it(monkeypatch)
    with pytest.raises(Exception) as caught:
        battery()
    assert mutant.found_as in f"{type(caught.value).__name__}: {caught.value}"


def test_nothing_is_found_where_nothing_is_broken(monkeypatch: Patch) -> None:
    nothing(monkeypatch)
    battery()
