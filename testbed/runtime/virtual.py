"""Virtual time: the ports on SimPy. A coroutine of a loop is a SimPy process; the only ``yield`` is ``wait``.

Work is charged, not awaited: the loop's own clock runs ahead of SimPy's by what it has charged, and the debt is paid
when it awaits. If no event of anybody else lies in between, there is nobody to notice: the debt is carried on and no
event is made at all (``_Host.settle``), which is what makes a step cost microseconds.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, Protocol

import numpy as np
import simpy
from numpy.typing import NDArray
from simpy.events import URGENT

from testbed.batch import Batch, BatchShape, StepCost, StepResult
from testbed.messages import ControlOutput, Message, RequestOutput
from testbed.metrics.recorder import Recorder
from testbed.ports import Stage
from testbed.request import Request
from testbed.tokens import STEP, oracle_key, scale
from testbed.workload.base import TimedRequest, Workload

FAR = 1 << 62


class CostModel(Protocol):
    """What a step costs on the device."""

    def price(self, shape: BatchShape) -> StepCost:
        """Device time, kernels, and whether one graph holds them."""
        ...

    def price_decode(self, rows: int, context_tokens: int, context_max: int) -> StepCost:
        """The same for a pure decode step."""
        ...


class HostProfile(Protocol):
    """What a stage of the loop costs on the host."""

    def price(
        self,
        stage: Stage,
        rows: int = 0,
        new_tokens: int = 0,
        admitted: int = 0,
        waiting: int = 0,
        matched_tokens: int = 0,
    ) -> int:
        """Nanoseconds."""
        ...

    def launch_ns(self, kernels: int, graph: bool) -> int:
        """Nanoseconds to launch a step."""
        ...


class Deadlock(RuntimeError):
    """Nothing can happen any more, and requests are still open."""


@types.coroutine
def wait(event: simpy.Event) -> Generator[simpy.Event, Any, Any]:
    """The trap: suspend the coroutine until ``event``."""
    return (yield event)


class Oracle:
    """The tokens of a simulated step: a function of request and position alone, so that every mix-up shows; and when
    requests end early. It alone knows true output lengths."""

    def __init__(self, seed: int, vocab_size: int, slots: int, key_of: Callable[[str], int] | None = None) -> None:
        self._vocab_size = vocab_size
        self._key_of = key_of or (lambda rid: oracle_key(seed, rid))
        self._keys = np.zeros(slots, dtype=np.uint64)
        self._stop_at: dict[str, int] = {}
        """Output index at which a request stops, for those that stop before their max_new_tokens."""
        self._rows: list[Request] | None = None
        self._states = np.empty(0, np.uint64)
        self._ends = np.empty(0, np.int64)
        self._next_end = FAR

    def expect(self, timed: TimedRequest) -> None:
        """A request was sent: remember where it ends if that is before what the scheduler was told."""
        request = timed.request
        if request.max_new_tokens is None or timed.output_tokens < request.max_new_tokens or not request.ignore_eos:
            self._stop_at[request.rid] = timed.output_tokens - 1

    def result(self, batch: Batch) -> tuple[NDArray[np.int32], tuple[int, ...]]:
        """Token ids, int32 [rows], and the rows that stop."""
        first = self._prefill_states(batch) if batch.prefills else None
        if batch.decodes:
            if batch.decodes is not self._rows:
                self._look_up(batch)
            states = self._states + np.uint64(batch.advance * STEP % 2**64)
            states = states if first is None else np.concatenate((first, states))
        else:
            assert first is not None
            states = first
        return scale(states, self._vocab_size), self._stops(batch) if self._stop_at else ()

    def _look_up(self, batch: Batch) -> None:
        """Per membership of the running batch: each row's state at advance 0, and the advance it ends at.

        KV of length n holds tokens 0 .. n - 1, so the step that makes it n yields the token with index n of the
        sequence: output number n - prompt_tokens.
        """
        self._rows = batch.decodes
        self._states = self._keys[batch.slots] + batch.start.astype(np.uint64) * np.uint64(STEP)
        stop_at = self._stop_at
        ends = [r.joined + stop_at[r.rid] - r.old_outputs if r.rid in stop_at else FAR for r in batch.decodes]
        self._ends = np.array(ends, dtype=np.int64)
        self._next_end = int(self._ends.min())

    def _prefill_states(self, batch: Batch) -> NDArray[np.uint64]:
        """States of the first tokens. A slot's key is shifted, so that a token depends on its place in the sequence."""
        states = np.empty(len(batch.prefills), dtype=np.uint64)
        for row, (request, prefix, new, _) in enumerate(batch.prefills):
            key = (self._key_of(request.rid) - STEP * request.prompt_tokens) % 2**64
            self._keys[request.slot] = key
            states[row] = (key + STEP * (prefix + new)) % 2**64
        return states

    def _stops(self, batch: Batch) -> tuple[int, ...]:
        """Rows whose token is the last of a request that ends early."""
        stops = []
        for row, (request, _, _, last) in enumerate(batch.prefills):
            if last and self._stop_at.get(request.rid, FAR) <= request.old_outputs:
                stops.append(row)
        if batch.decodes and batch.advance >= self._next_end:
            first = len(batch.prefills)
            stops.extend((np.flatnonzero(self._ends == batch.advance) + first).tolist())
            later = self._ends[self._ends > batch.advance]
            self._next_end = int(later.min()) if len(later) else FAR
        return tuple(stops)


class VirtualRuntime:
    """The ports of one loop in virtual time: inbox, cpu, executor and outbox are this object."""

    def __init__(
        self,
        env: simpy.Environment,
        *,
        cost_model: CostModel,
        host: HostProfile,
        recorder: Recorder,
        oracle: Oracle,
        workload: Workload,
    ) -> None:
        self.env = env
        self.inbox = self.cpu = self.executor = self.outbox = self
        self._cost_model = cost_model
        self._host = host
        self._recorder = recorder
        self._oracle = oracle
        self._workload = workload
        self._local_ns = 0
        """The loop's own clock; never behind ``env.now`` while the loop runs."""
        self._delivered: deque[Message] = deque()
        self._waiting_for_message: simpy.Event | None = None
        self._device_free_ns = 0
        self._launches = 0
        self._processed = 0
        self._by_iteration: deque[TimedRequest] = deque()
        self.iteration = 0
        self.sent: dict[str, tuple[int, str, str]] = {}
        """(arrival_ns, session, tenant) of every request sent so far, by id."""
        self.open = 0
        """Requests sent and not ended."""
        self.ended = 0
        self.exhausted = False
        """The workload has no more requests of its own."""
        self.tokens_sink: Callable[[Batch, StepResult], None] | None = None

    # -- the workload --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to send the workload's requests."""
        self._source = self._workload.start()
        self._schedule_next()

    def _schedule_next(self) -> None:
        timed = next(self._source, None)
        while timed is not None and timed.iteration >= 0:
            self._by_iteration.append(timed)
            timed = next(self._source, None)
        if timed is None:
            self.exhausted = True
            return
        self._at(timed.arrival_ns, lambda: (self._arrive(timed), self._schedule_next()))

    def _at(self, when_ns: int, action: Callable[[], object]) -> None:
        """Call ``action`` at ``when_ns``, before any loop wakes at that instant."""
        event = simpy.Event(self.env)
        event._ok, event._value = True, None
        event.callbacks.append(lambda _: action())
        self.env.schedule(event, priority=URGENT, delay=max(when_ns - self.env.now, 0))

    def _arrive(self, timed: TimedRequest) -> None:
        self.sent[timed.request.rid] = (timed.arrival_ns, timed.session, timed.tenant)
        self.open += 1
        self._oracle.expect(timed)
        self.deliver(timed.request)

    def deliver(self, message: Message) -> None:
        """Put a message into the inbox now."""
        self._delivered.append(message)
        if self._waiting_for_message is not None:
            waiting, self._waiting_for_message = self._waiting_for_message, None
            waiting.succeed()

    # -- Inbox ---------------------------------------------------------------------------------------------------------

    async def recv(self, block: bool) -> tuple[int, list[Message]]:
        """See ports.Inbox."""
        await self._settle()
        if self._by_iteration:
            while self._by_iteration and self._by_iteration[0].iteration <= self.iteration:
                timed = self._by_iteration.popleft()
                self._arrive(timed._replace(arrival_ns=self._local_ns))
            block = block and not self._by_iteration
        self.iteration += 1
        if not self._delivered and block:
            self._waiting_for_message = simpy.Event(self.env)
            await wait(self._waiting_for_message)
            self._local_ns = self.env.now
        if not self._delivered:
            return self._local_ns, []
        messages = list(self._delivered)
        self._delivered.clear()
        return self._local_ns, messages

    def post_at(self, when_ns: int, message: Message) -> None:
        """See ports.Inbox."""
        self._at(when_ns, lambda: self.deliver(message))

    # -- Cpu -----------------------------------------------------------------------------------------------------------

    def charge(
        self,
        stage: Stage,
        rows: int = 0,
        new_tokens: int = 0,
        admitted: int = 0,
        waiting: int = 0,
        matched_tokens: int = 0,
    ) -> None:
        """See ports.Cpu: adds the modelled cost to the loop's own clock."""
        cost_ns = self._host.price(stage, rows, new_tokens, admitted, waiting, matched_tokens)
        if cost_ns:
            begin = self._local_ns
            self._local_ns = end = begin + cost_ns
            step = self._launches if stage <= Stage.SAMPLE else self._processed
            self._recorder.span(stage, step, begin, end)

    async def sleep(self, duration_ns: int) -> None:
        """See ports.Cpu."""
        self._local_ns += duration_ns
        await self._settle()

    async def _settle(self) -> None:
        """Pay the debt to SimPy's clock, unless nothing of anybody else happens until then."""
        if self.env.peek() <= self._local_ns:
            await wait(self.env.timeout(self._local_ns - self.env.now))

    # -- Executor --------------------------------------------------------------------------------------------------------

    def launch(self, batch: Batch, defer_sampling: bool = False) -> _Launched:
        """See ports.Executor. An in-order device: a batch starts when it is launched and the device is free."""
        shape = batch.shape
        if batch.prefills:
            gpu_ns, kernels, graph = self._cost_model.price(shape)
        else:
            gpu_ns, kernels, graph = self._cost_model.price_decode(
                shape.decodes, shape.context_tokens, shape.context_max
            )
        launch_ns = self._host.launch_ns(kernels, graph)
        begin = self._local_ns
        if launch_ns:
            self._local_ns = begin + launch_ns
            self._recorder.span(Stage.LAUNCH, self._launches, begin, begin + launch_ns)
        if graph:
            start = max(self._local_ns, self._device_free_ns)
            end = start + gpu_ns
        else:
            # Eager launches are pipelined with the device: it starts at the first kernel and is not faster than the host.
            start = max(begin + launch_ns // max(kernels, 1), self._device_free_ns)
            end = max(start + gpu_ns, self._local_ns)
        self._device_free_ns = end
        self.charge(Stage.SAMPLE, batch.rows)
        self._launches += 1
        token_ids, stopped = self._oracle.result(batch)
        return _Launched(self, StepResult(token_ids, stopped, begin, start, end, graph))

    async def device_done(self, result: StepResult) -> None:
        """Wait until the device has ended a batch."""
        self._local_ns = max(self._local_ns, result.end_ns)
        await self._settle()
        self.charge(Stage.WAIT, len(result.token_ids))

    # -- Outbox ----------------------------------------------------------------------------------------------------------

    def send_tokens(self, batch: Batch, result: StepResult) -> int:
        """See ports.Outbox; returns the loop's time of sending (ns)."""
        self.charge(Stage.SEND, batch.rows)
        self._processed += 1
        if self.tokens_sink is not None:
            self.tokens_sink(batch, result)
        return self._local_ns

    def send(self, output: RequestOutput | ControlOutput) -> None:
        """See ports.Outbox: the end of a request may make its user send the next."""
        if isinstance(output, ControlOutput):
            return
        self.open -= 1
        self.ended += 1
        for timed in self._workload.on_finish(output.rid, self._local_ns, output.output_ids):
            self._at(timed.arrival_ns, lambda timed=timed: self._arrive(timed))  # type: ignore[misc]


class _Launched:
    """A batch on the simulated device: its result and its end are known at launch."""

    __slots__ = ("_result", "_runtime")

    def __init__(self, runtime: VirtualRuntime, result: StepResult) -> None:
        self._runtime = runtime
        self._result = result

    def sample(self, masks: object) -> None:
        """See ports.Pending: the oracle does not sample."""

    async def result(self) -> StepResult:
        """See ports.Pending."""
        await self._runtime.device_done(self._result)
        return self._result


def where_it_waits(coroutine: types.CoroutineType[Any, Any, Any]) -> str:
    """The chain of functions in which a suspended coroutine waits, for deadlock reports."""
    chain: list[str] = []
    awaited: Any = coroutine
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is not None:
            chain.append(f"{frame.f_code.co_name} (line {frame.f_lineno})")
        awaited = getattr(awaited, "cr_await", None)
    return " > ".join(chain)


def run_to_the_end(env: simpy.Environment, loop: types.CoroutineType[Any, Any, None], runtime: VirtualRuntime) -> None:
    """Run the loop until nothing can happen any more. Raises the loop's own exception as it was (SimPy would re-make
    it), and Deadlock when requests are open but no event is left."""
    failure: list[BaseException] = []

    async def guarded() -> None:
        try:
            await loop
        except BaseException as error:
            failure.append(error)

    process = guarded()
    env.process(process)
    runtime.start()
    try:
        env.run()
        if failure:
            raise failure[0]
        if runtime.open or not runtime.exhausted:
            raise Deadlock(
                f"at {env.now} ns nothing can happen any more and {runtime.open} requests are open; "
                f"the loop waits in {where_it_waits(process)}"
            )
    finally:
        process.close()
