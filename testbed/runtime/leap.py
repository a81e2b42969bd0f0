"""The decode leap: many identical decode steps at once, to the nanosecond what they are one by one.

Between two events of the world (an arrival, the end of a request) every iteration of a built-in loop does the same:
receive nothing, schedule, prepare and launch the same rows one token further, wait for the oldest launched step,
process and send it. The times follow a recurrence of a dozen integer operations; pages, tokens and records of all the
steps are written in bulk. ``tests/runtime/test_leap.py`` holds every record of a run with leaps to the bytes of one
without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from testbed.batch import BatchShape, ForwardMode, StepResult
from testbed.loops.normal import event_loop_normal
from testbed.loops.overlap import event_loop_overlap
from testbed.loops.overlap_suspended import event_loop_overlap_suspended
from testbed.ports import Stage
from testbed.runtime.modelled import device_time
from testbed.scheduler.load import load_report
from testbed.scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from testbed.runtime.router import RouterReports
    from testbed.runtime.virtual import VirtualRuntime

LEAPING = (event_loop_normal, event_loop_overlap, event_loop_overlap_suspended)
"""The loops whose iterations are known."""
SHORTEST = 8
"""Fewer steps are cheaper one by one (measured)."""
LONGEST = 1024


class Leaper:
    """Leaps for one loop that is known to do one iteration as the module's text says (normal or overlap)."""

    def __init__(self, scheduler: Scheduler, runtime: VirtualRuntime) -> None:
        self._scheduler = scheduler
        self._runtime = runtime
        assert runtime.users is not None and runtime.oracle is not None, "a loop that leaps has users, and makes tokens"
        self._users, self._oracle = runtime.users, runtime.oracle
        self._memory = scheduler.memory
        self._stages: tuple[int, ...] = ()
        """Host time of receive, schedule, prepare, wait, process and send (ns) of the steps at hand."""

    def try_leap(self) -> None:
        """Called where an iteration begins, nothing having arrived. Moves the world on, or does nothing."""
        scheduler, runtime = self._scheduler, self._runtime
        running, last = scheduler.running, scheduler.last_batch
        if last is None or last.decodes is not running.requests or last.prefills or scheduler.waiting:
            return
        in_flight = scheduler.in_flight
        if scheduler.chunked is not None or running.finished_rows or scheduler.forward_sleep_ns or len(in_flight) > 1:
            return
        if self._users.tied_to_iterations or scheduler.grammar_queue.open:
            return
        if in_flight and (in_flight[0] is not last or runtime.last_result.stopped):
            return
        steps = self._steps_until_something_changes(len(in_flight))
        if steps < SHORTEST:
            return
        horizon_ns = runtime.horizon_ns()
        step_ns = runtime.last_result.end_ns - runtime.last_result.start_ns
        if horizon_ns - runtime.local_ns < SHORTEST * step_ns:
            return
        times = self._times(steps, horizon_ns, len(in_flight))
        if times is not None:
            self._apply(times, bool(in_flight))

    def _steps_until_something_changes(self, in_flight: int) -> int:
        """Launches before a row ends, memory runs out, or the full invariant check is due."""
        scheduler, running, memory = self._scheduler, self._scheduler.running, self._memory
        rows, advance = len(running.requests), running.advance
        full_every = scheduler.invariants.full_every
        if memory.allocator.quarantined_pages or scheduler.invariants.every_step or not scheduler.steps % full_every:
            return 0
        # An end by length shows when its result is processed, an early one is part of the launched result.
        ends = min(running.next_finish + in_flight, self._oracle.next_end(running.requests))
        steps = min(ends - 1 - advance, LONGEST, full_every - scheduler.steps % full_every)
        free = memory.allocator.free_pages
        if memory.page_size == 1:
            return min(steps, free // rows)
        # A row opens a page every page_size steps; SGLang's rule also looks for a page a row at every step.
        return min(steps, memory.page_size * (free // rows - 1 - memory.evict_whole_need))

    def _times(self, steps: int, horizon_ns: int, in_flight: int) -> NDArray[np.int64] | None:
        """The recurrence: int64 [steps, 10], the times of each launch (columns: see ``_apply``), as far as no event
        of others comes before an iteration begins; None when that is too short."""
        runtime, running = self._runtime, self._scheduler.running
        rows = len(running.requests)
        price, host = runtime.cost_model.price_decode, runtime.host
        receive = runtime.stage_price(Stage.RECEIVE, 0)
        schedule, prepare, sample, wait, process, send = (
            runtime.stage_price(stage, rows)
            for stage in (Stage.SCHEDULE, Stage.PREPARE, Stage.SAMPLE, Stage.WAIT, Stage.PROCESS, Stage.SEND)
        )
        before_launch, after_result = receive + schedule + prepare, wait + process + send
        context, longest = running.context_tokens(), running.context_max()
        to_launch = runtime.stage_price(Stage.LAUNCH, rows)
        now, free = runtime.local_ns, runtime.device_free_ns
        oldest_end = runtime.last_result.end_ns if in_flight else 0
        table: list[tuple[int, ...]] = []
        for _ in range(steps):
            if now >= horizon_ns:
                break
            context += rows
            longest += 1
            cost = price(rows, context, longest)
            begin = now + before_launch
            launched = begin + host.launch_ns(cost.kernels, cost.graph) + to_launch
            start, free = device_time(cost, begin, launched, free)
            sampled = launched + sample
            awaited = oldest_end if in_flight else free
            resumed = sampled if sampled > awaited else awaited
            table.append((now, begin, launched, sampled, resumed, start, free, context, longest, cost.graph))
            oldest_end = free
            now = resumed + after_result
        if len(table) < SHORTEST:
            return None
        self._stages = (receive, schedule, prepare, wait, process, send)
        return np.array(table, dtype=np.int64)

    def _apply(self, times: NDArray[np.int64], in_flight: bool) -> None:
        """Do all that the steps did."""
        scheduler, runtime, running = self._scheduler, self._runtime, self._scheduler.running
        steps, first, rows = len(times), scheduler.steps, len(running.requests)
        now, begin, _, _, resumed, start, end, context, longest, graph = times.T
        sent = resumed + sum(self._stages[3:])
        tokens = self._oracle.tokens_ahead(running.advance, steps)
        recorder = scheduler.recorder
        if in_flight:
            running.commit(scheduler.in_flight[0], runtime.last_result.token_ids)
            recorder.step(scheduler.in_flight[0], runtime.last_result, int(sent[0]))
        done = steps - in_flight
        running.store_outputs(tokens[:done])
        pages, free_tokens = self._take_pages(steps)
        ratios = self._decay(steps)
        records = {
            "step": np.arange(first, first + steps),
            "mode": ForwardMode.DECODE,
            "launch_ns": begin,
            "start_ns": start,
            "end_ns": end,
            "rows": rows,
            "decode_rows": rows,
            "running": rows,
            "graph": graph,
            "context_tokens": context,
            "free_tokens": free_tokens,
            "evictable_tokens": self._memory.cache.evictable_tokens,
        }
        recorder.steps_at_once(records, ratios, done)
        recorder.advance_times.frombytes(sent.tobytes())
        recorder.journal.stamps.frombytes(now.tobytes())
        recorder.journal.sent.frombytes(sent[in_flight:].tobytes())
        self._record_spans(times)
        scheduler.decision_log.append_decodes(rows, pages)
        scheduler.steps += steps
        scheduler.now_ns = int(now[-1])
        runtime.moved(steps, int(sent[-1]), int(end[-1]))
        if in_flight:
            # The loop holds this very batch: it now is the last one launched.
            batch = scheduler.in_flight[0]
            batch.index, batch.advance = scheduler.steps - 1, running.advance
            batch.output_shift = running.advance - running.since
            batch.evicted_tokens = batch.extra_rows = 0
            batch.retracted, batch.pages, batch.new_token_ratio = (), pages[-1:], ratios[-1]
            batch.shape = BatchShape((), (), rows, int(context[-1]), int(longest[-1]))
            batch.decided = (rows, 0, int(free_tokens[-1]), self._memory.cache.evictable_tokens)
            last = int(begin[-1]), int(start[-1]), int(end[-1]), bool(graph[-1])
            runtime.replace_last_result(StepResult(tokens[-1], (), *last))
        if runtime.reports is not None:
            self._report_load(runtime.reports, sent, free_tokens)
        recorder.count("leaps")
        recorder.count("steps_leapt", steps)
        if scheduler.on_step is not None:
            scheduler.on_step()

    def _report_load(self, reports: RouterReports, sent: NDArray[np.int64], free_tokens: NDArray[np.int64]) -> None:
        """Send the reports of all steps, but for those that are overtaken before anybody looks: at the horizon."""
        scheduler, horizon_ns = self._scheduler, self._runtime.horizon_ns()
        last, processed = load_report(scheduler), scheduler.steps - len(scheduler.in_flight)
        for back in range(processed % reports.every_steps, len(sent), reports.every_steps):
            more_free = int(free_tokens[-1 - back] - free_tokens[-1])
            load = replace(last, used_tokens=last.used_tokens - more_free, steps=processed - back)
            if reports.send_at(int(sent[-1 - back]), load) <= horizon_ns:
                break

    def _take_pages(self, steps: int) -> tuple[list[NDArray[np.int32]], NDArray[np.int64]]:
        """Allocate and enter the pages of all steps, in the order of single steps; also the free tokens after each."""
        running, memory = self._scheduler.running, self._memory
        pages = running.take_pages_of(steps)
        taken = np.array([len(part) for part in pages]).cumsum()
        memory.owned_pages += int(taken[-1])
        left = int(taken[-1]) - taken  # what later steps take
        free = memory.allocator.free_pages + left
        self._scheduler.invariants.pages_of(free, memory.owned_pages - left)
        return pages, free * memory.page_size

    def _decay(self, steps: int) -> list[float]:
        """The ratio at each step."""
        scheduler, ratios = self._scheduler, []
        for _ in range(steps):
            scheduler.new_token_ratio = max(scheduler.new_token_ratio - scheduler.ratio_decay, scheduler.ratio_min)
            ratios.append(scheduler.new_token_ratio)
        return ratios

    def _record_spans(self, times: NDArray[np.int64]) -> None:
        """The host spans of all steps; a stage that costs nothing has none."""
        now, begin, launched, sampled, resumed = times[:, :5].T
        receive, schedule, prepare, wait, process, send = self._stages
        spans = np.empty((len(times), 8, 4), dtype=np.int64)
        spans[:, :, 0] = np.arange(Stage.FINISH)  # nothing ends
        launches = np.arange(self._runtime.launches, self._runtime.launches + len(times))
        spans[:, : Stage.WAIT, 1] = launches[:, None]
        spans[:, Stage.WAIT :, 1] = launches[:, None] - (self._runtime.launches - self._runtime.processed)
        # Before the launch and after the result the stages follow one another; their ends are running sums.
        spans[:, : Stage.LAUNCH, 3] = now[:, None] + (receive, receive + schedule, receive + schedule + prepare)
        spans[:, Stage.LAUNCH, 3], spans[:, Stage.SAMPLE, 3] = launched, sampled
        spans[:, Stage.WAIT :, 3] = resumed[:, None] + (wait, wait + process, wait + process + send)
        spans[:, 1:, 2] = spans[:, :-1, 3]
        spans[:, Stage.RECEIVE, 2], spans[:, Stage.LAUNCH, 2], spans[:, Stage.WAIT, 2] = now, begin, resumed
        self._scheduler.recorder.spans_at_once(spans[spans[:, :, 2] < spans[:, :, 3]])
