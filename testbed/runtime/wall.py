"""The wall clock: the ports without SimPy. An ``await`` blocks the loop's own thread, so a coroutine of a loop is
driven by one ``send(None)``: no event library, no second thread.

``PacedRuntime`` is the wall clock with a modelled device: a step takes the time that the cost model says, for real. The
loop, its host time and its races with the clock are real, and no GPU is needed.
"""

from __future__ import annotations

import time
from collections.abc import Coroutine
from heapq import heappop, heappush
from typing import Any

from testbed.batch import Batch, StepResult
from testbed.costs import CostModel, HostProfile
from testbed.messages import ControlOutput, Message, RequestOutput
from testbed.metrics.recorder import Recorder
from testbed.ports import Stage
from testbed.runtime.modelled import Deadlock, device_time, price_batch
from testbed.runtime.oracle import Oracle
from testbed.runtime.traffic import Traffic
from testbed.workload.base import TimedRequest, Workload

SPIN_NS = 300_000
"""The last part of a wait is spun: ``time.sleep`` wakes late by some 100 us."""


class LoopEnded(Exception):
    """Nothing more will come: the loop's coroutine ends here."""


class PacedRuntime:
    """The ports of one loop on the wall clock, over a modelled device. Times are ns since the runtime was made."""

    def __init__(
        self,
        *,
        cost_model: CostModel,
        recorder: Recorder,
        oracle: Oracle,
        workload: Workload,
        inject: HostProfile | None = None,
    ) -> None:
        """``inject``: spin each stage of the loop until this profile's time is spent, to study a slower host than
        ours."""
        self.inbox = self.cpu = self.executor = self.outbox = self
        self.traffic = Traffic(workload, oracle)
        self._cost_model = cost_model
        self._recorder = recorder
        self._oracle = oracle
        self._inject = inject
        self._due: list[tuple[int, int, Message | TimedRequest]] = []
        """Heap of (when, serial, what): requests not sent yet, timers."""
        self._serial = 0
        self._next_of_source = 0
        """Serial of the workload's next request: when it is sent, the one after it is put into the heap."""
        self._device_free_ns = 0
        self._launches = 0
        self._processed = 0
        self.iteration = 0
        self._origin_ns = time.perf_counter_ns()
        self._mark_ns = 0
        """Where the open span began."""
        self._take_next()

    def now_ns(self) -> int:
        """The time (ns)."""
        return time.perf_counter_ns() - self._origin_ns

    def _wait_until(self, when_ns: int) -> None:
        ahead = when_ns - self.now_ns() - SPIN_NS
        if ahead > 0:
            time.sleep(ahead * 1e-9)
        while self.now_ns() < when_ns:
            pass

    # -- the workload -----------------------------------------------------------------------------------------------

    def _push(self, when_ns: int, what: Message | TimedRequest) -> None:
        self._serial += 1
        heappush(self._due, (when_ns, self._serial, what))

    def _take_next(self) -> None:
        timed = self.traffic.next_timed()
        if timed is not None:
            self._push(timed.arrival_ns, timed)
            self._next_of_source = self._serial

    def _delivered(self, now_ns: int) -> list[Message]:
        """Everything that was due by now."""
        messages: list[Message] = []
        while self._due and self._due[0][0] <= now_ns:
            _, serial, what = heappop(self._due)
            if isinstance(what, TimedRequest):
                messages.append(self.traffic.send(what))
                if serial == self._next_of_source:
                    self._take_next()
            else:
                messages.append(what)
        return messages

    # -- Inbox ------------------------------------------------------------------------------------------------------

    async def recv(self, block: bool) -> tuple[int, list[Message]]:
        """See ports.Inbox. Raises LoopEnded when nothing is open and nothing will come."""
        now = self.now_ns()
        messages: list[Message] = []
        if self.traffic.tied_to_iterations:
            messages.extend(self.traffic.due(self.iteration, now))
            block = block and not self.traffic.tied_to_iterations
        self.iteration += 1
        messages.extend(self._delivered(now))
        if block and not messages:
            if not self._due:
                if self.traffic.open:
                    raise Deadlock(f"{self.traffic.open} requests are open, and nothing will wake the loop")
                raise LoopEnded
            self._wait_until(self._due[0][0])
            self._mark_ns = now = self.now_ns()
            messages = self._delivered(now)
        return now, messages

    def post_at(self, when_ns: int, message: Message) -> None:
        """See ports.Inbox."""
        self._push(when_ns, message)

    # -- Cpu --------------------------------------------------------------------------------------------------------

    def charge(
        self,
        stage: Stage,
        rows: int = 0,
        new_tokens: int = 0,
        admitted: int = 0,
        waiting: int = 0,
        matched_tokens: int = 0,
    ) -> None:
        """See ports.Cpu: a span closes here, after spinning until the injected profile's time is spent."""
        cost_ns = 0
        if self._inject is not None:
            cost_ns = self._inject.price(stage, rows, new_tokens, admitted, waiting, matched_tokens)
        self._close_span(stage, cost_ns)

    def _close_span(self, stage: Stage, least_ns: int) -> None:
        until = self._mark_ns + least_ns
        now = self.now_ns()
        while now < until:
            now = self.now_ns()
        step = self._launches if stage <= Stage.SAMPLE else self._processed
        self._recorder.span((stage, step, self._mark_ns, now))
        self._mark_ns = now

    async def sleep(self, duration_ns: int) -> None:
        """See ports.Cpu."""
        self._wait_until(self.now_ns() + duration_ns)

    # -- Executor -----------------------------------------------------------------------------------------------------

    def launch(self, batch: Batch, defer_sampling: bool = False) -> _Running:
        """See ports.Executor: the device is a promise to be done at a known time."""
        cost = price_batch(self._cost_model, batch)
        token_ids, stopped = self._oracle.result(batch)
        begin = self._mark_ns = self.now_ns()  # the model's own work is in nobody's span
        least = 0
        if self._inject is not None:
            least = self._inject.launch_ns(cost.kernels, cost.graph) + self._inject.price(Stage.LAUNCH, batch.rows)
        self._close_span(Stage.LAUNCH, least)
        start, end = device_time(cost, begin, self._mark_ns, self._device_free_ns)
        self._device_free_ns = end
        self.charge(Stage.SAMPLE, batch.rows)
        self._launches += 1
        return _Running(self, StepResult(token_ids, stopped, begin, start, end, cost.graph))

    def device_done(self, result: StepResult) -> None:
        """Wait until the device has ended a batch."""
        self._wait_until(result.end_ns)
        self._mark_ns = max(self._mark_ns, result.end_ns)
        self.charge(Stage.WAIT, len(result.token_ids))

    # -- Outbox -------------------------------------------------------------------------------------------------------

    def send_tokens(self, batch: Batch, result: StepResult) -> int:
        """See ports.Outbox; returns the time of sending (ns)."""
        self.charge(Stage.SEND, batch.rows)
        self._processed += 1
        return self._mark_ns

    def send(self, output: RequestOutput | ControlOutput) -> None:
        """See ports.Outbox: the end of a request may make its user send the next."""
        if isinstance(output, RequestOutput):
            for timed in self.traffic.end(output, self.now_ns()):
                self._push(timed.arrival_ns, timed)


class _Running:
    """A batch on the paced device."""

    __slots__ = ("_result", "_runtime")

    def __init__(self, runtime: PacedRuntime, result: StepResult) -> None:
        self._runtime = runtime
        self._result = result

    def sample(self, masks: object) -> None:
        """See ports.Pending: the oracle does not sample."""

    async def result(self) -> StepResult:
        """See ports.Pending."""
        self._runtime.device_done(self._result)
        return self._result


def run_to_the_end(loop: Coroutine[Any, Any, None]) -> None:
    """Drive a loop until its runtime says that nothing more will come. Raises RuntimeError if the loop ever suspends:
    on the wall clock every ``await`` blocks."""
    try:
        loop.send(None)
    except LoopEnded:
        return
    finally:
        loop.close()
    raise RuntimeError("a loop suspended on the wall clock: it awaited something that is not a port")
