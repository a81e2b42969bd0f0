"""The running batch's columns against one plain object a row."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from testbed.batch import Batch, ForwardMode
from testbed.memory import PageAllocator, RequestSlots
from testbed.messages import GenerateRequest, TokenPrompt
from testbed.request import NEVER, FinishReason, Request
from testbed.scheduler.running import FAR, RunningBatch

SLOTS = 12
CONTEXT = 300


@dataclass
class Row:
    """What one request is, said plainly."""

    request: Request
    kv_tokens: int
    tokens: list[int]
    """Outputs since it joined, the prefill's first."""
    pages: list[int] = field(default_factory=list)
    ended: bool = False


@dataclass
class Launched:
    batch: Batch
    rows: list[Row]


class RunningMachine(RuleBasedStateMachine):
    @initialize(page_size=st.sampled_from([1, 3, 16]), micro_batch=st.sampled_from([0, 0, 1, 7]))
    def begin(self, page_size: int, micro_batch: int) -> None:
        self.p = page_size
        self.slots = RequestSlots(SLOTS, CONTEXT, page_size)
        self.allocator = PageAllocator(100_000, page_size)
        self.running = RunningBatch(self.slots, self.allocator, micro_batch)
        self.rows: list[Row] = []
        self.in_flight: list[Launched] = []
        self.born = 0
        self.token = 0

    @precondition(lambda self: self.slots.available >= 2)
    @rule(
        prompts=st.lists(st.integers(1, 40), min_size=1, max_size=2),
        max_new=st.integers(2, 30),
        old=st.integers(0, 5),
        front=st.booleans(),
        sampled=st.booleans(),
    )
    def merge(self, prompts: list[int], max_new: int, old: int, front: bool, sampled: bool) -> None:
        # As loops do it: at most one result is pending at a decision, and none when a prefill's own result is in.
        if len(self.in_flight) > (0 if sampled else 1) or any(r.request.joined > self.running.done for r in self.rows):
            return
        for row in self.rows:
            row.request.sampled = True  # results come in launch order: only the last to join can wait for theirs
        new = []
        for prompt in prompts:
            self.born += 1
            source = GenerateRequest(f"r{self.born}", TokenPrompt([0] * prompt))
            request = Request(source, self.born, np.zeros(prompt + old, np.int32), max_new + old)
            request.old_outputs, request.sampled = old, sampled
            request.slot = self.slots.alloc()
            self.token += 1
            # The first token of one whose prefill result is pending is stored when it comes, as the scheduler does.
            self.slots.outputs[request.slot, 0] = self.token
            pages = self.allocator.alloc(-(-(prompt + old) // self.p)).tolist()
            self.slots.pages[request.slot, : len(pages)] = pages
            new.append(Row(request, prompt + old, [self.token], pages))
        self.running.merge([row.request for row in new], front=front)
        self.rows = [*new, *self.rows] if front else [*self.rows, *new]

    @precondition(lambda self: self.rows and len(self.in_flight) < 2)
    @rule()
    def launch(self) -> None:
        batch = Batch(ForwardMode.DECODE)
        opening = [row for row in self.rows if row.kv_tokens % self.p == 0]
        assert self.running.pages_needed() == len(opening)
        assert self.running.decode_into(batch) == len(opening)
        taken = [page for part in batch.pages for page in part.tolist()]
        assert len(taken) == len(opening)
        for row, page in zip(opening, taken, strict=True):
            row.pages.append(page)
        for row in self.rows:
            row.kv_tokens += 1
        self.in_flight.append(Launched(batch, list(self.rows)))

    @precondition(lambda self: self.in_flight)
    @rule()
    def commit(self) -> None:
        launched = self.in_flight.pop(0)
        tokens = []
        for row in launched.rows:
            self.token += 1
            tokens.append(self.token)
            row.request.sampled = True
            if not row.ended and row in self.rows:
                row.tokens.append(self.token)
        due = [i for i, row in enumerate(launched.rows) if self.last_by_length(row)]
        self.running.commit(launched.batch, np.array(tokens, np.int32))
        assert np.flatnonzero(launched.batch.finish_at == launched.batch.advance).tolist() == due
        for i in due:
            if not launched.rows[i].ended and launched.rows[i] in self.rows:
                self.end(launched.rows[i])

    def last_by_length(self, row: Row) -> bool:
        """By counting: the tokens that decode results up to this one gave it are all that it may have."""
        request = row.request
        decoded = self.running.done + 1 - request.joined
        return request.old_outputs + 1 + decoded == request.max_new_tokens

    def end(self, row: Row) -> None:
        known = row.request.old_outputs + len(row.tokens)
        row.request.output_ids = np.zeros(known, np.int32)
        row.request.finish_reason = FinishReason.LENGTH
        row.ended = True
        self.running.finished_rows += 1

    @precondition(lambda self: any(not row.ended and row.request.sampled for row in self.rows))
    @rule(data=st.data())
    def stop_early(self, data: st.DataObject) -> None:
        live = [row for row in self.rows if not row.ended and row.request.sampled]
        self.end(data.draw(st.sampled_from(live)))

    @rule()
    def filter_finished(self) -> None:
        assert self.running.filter_finished() == any(row.ended for row in self.rows)
        self.forget([row for row in self.rows if not row.ended])

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        order = data.draw(st.permutations(range(len(self.rows))))
        if not all(row.request.sampled for row in self.rows):
            order = sorted(order)  # no estimate is asked for between a reordering and the pending result
        kept = list(order[: data.draw(st.integers(0, len(order)))])
        self.running.keep(kept)
        self.forget([self.rows[row] for row in kept])

    def forget(self, kept: list[Row]) -> None:
        gone = [row for row in self.rows if row not in kept]
        self.rows = kept
        for row in gone:
            assert not row.request.in_running
            self.allocator.free(np.array(row.pages, np.int32))
            self.slots.free(row.request.slot)
            row.request.slot = NEVER

    # -- agreement ------------------------------------------------------------------------------------------------

    @invariant()
    def columns_say_what_the_rows_are(self) -> None:
        running = self.running
        assert running.requests == [row.request for row in self.rows]
        assert all(row.request.in_running for row in self.rows)
        assert running.slots.tolist() == [row.request.slot for row in self.rows]
        assert (running.start + running.advance).tolist() == [row.kv_tokens for row in self.rows]
        assert running.finished_rows == sum(row.ended for row in self.rows)
        if self.rows:
            assert running.context_tokens() == sum(row.kv_tokens for row in self.rows)
            assert running.context_max() == max(row.kv_tokens for row in self.rows)

    @invariant()
    def tables_hold_pages_and_tokens(self) -> None:
        for row in self.rows:
            slot = row.request.slot
            assert self.slots.pages[slot, : len(row.pages)].tolist() == row.pages
            assert len(row.pages) == -(-row.kv_tokens // self.p)
            assert self.slots.outputs[slot, : len(row.tokens)].tolist() == row.tokens
            if row.request.sampled and not row.ended:
                known = row.request.outputs_known(self.running.done)
                assert known == row.request.old_outputs + len(row.tokens)

    @invariant()
    def remaining_is_counted_row_by_row(self) -> None:
        if not self.rows:
            return
        for clip in (1, 3, 4096):
            expected = 0
            for row in self.rows:
                known = row.request.old_outputs + (len(row.tokens) if row.request.sampled else 0)
                expected += min(row.request.max_new_tokens - known, clip)
            assert self.running.remaining_outputs(clip) == expected

    @invariant()
    def nobody_finishes_before_the_next_finish(self) -> None:
        pending = [int(at) for at in self.running.finish_at if at > self.running.done]
        assert self.running.next_finish <= min(pending, default=FAR)

    @invariant()
    def launched_batches_are_snapshots(self) -> None:
        for launched in self.in_flight:
            assert list(launched.batch.decodes) == [row.request for row in launched.rows]
            assert len(launched.batch.slots) == len(launched.batch.start) == len(launched.rows)


TestRunning = RunningMachine.TestCase
TestRunning.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
