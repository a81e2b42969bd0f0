"""The wall clock: the ports without SimPy. An ``await`` blocks the loop's own thread, so a coroutine of a loop is
driven by one ``send(None)``: no event library, no second thread.

What computes is a ``Device``: the modelled one that takes its time for real (``paced.py``) or the engine's
(``real.py``). Who asks is ``Clients``: a workload in this process (``ScheduledClients``), or a server's sockets. The
loop, its host time and its races with the clock are real with all of them.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from testbed.batch import Batch, StepCost, StepResult
from testbed.costs import HostProfile
from testbed.messages import ControlOutput, GrammarReady, GrammarSpec, Message, RequestOutput
from testbed.metrics.recorder import Recorder
from testbed.ports import Grammars, Inbox, Neighbours, Peers, Reports, Stage, Threads
from testbed.runtime.alone import Alone
from testbed.runtime.modelled import Deadlock, LoopReturned, NoPort
from testbed.runtime.oracle import FAR
from testbed.runtime.traffic import Traffic
from testbed.workload.base import TimedRequest

SPIN_NS = 300_000
"""The last part of a wait is spun: ``time.sleep`` wakes late by some 100 us."""
NAP_NS = 50_000_000
"""A long wait is slept in pieces, so that a request to stop is seen."""


class LoopEnded(Exception):
    """Nothing more will come: the loop's coroutine ends here."""


class WallClock:
    """Time in ns since the clock was made."""

    def __init__(self) -> None:
        self.origin_ns = time.perf_counter_ns()
        self.stopping = False
        """Somebody wants the run to end (Ctrl-C): the next ``recv`` ends the loop, or a wait for a modelled step."""

    def now_ns(self) -> int:
        """The time."""
        return time.perf_counter_ns() - self.origin_ns

    def wait_until(self, when_ns: int) -> None:
        """Block; returns early when the run is to end."""
        while not self.stopping:
            ahead = when_ns - self.now_ns() - SPIN_NS
            if ahead <= 0:
                break
            time.sleep(min(ahead, NAP_NS) * 1e-9)
        while self.now_ns() < when_ns and not self.stopping:
            pass


class Work(Protocol):
    """One batch on a device."""

    cost: StepCost | None
    """What the cost model says of it; None where nobody asks."""

    def start(self) -> None:
        """Give it to the device; returns without waiting. This is the host's work of a launch."""
        ...

    def launched(self, begin_ns: int, end_ns: int) -> None:
        """The launch took the host from ``begin_ns`` to ``end_ns``."""
        ...

    def sample(self, masks: NDArray[np.int32] | None) -> None:
        """Second phase of a launch with deferred sampling: see ports.Pending."""
        ...

    def activations(self) -> object:
        """See ports.Pending."""
        ...

    def wait(self) -> StepResult:
        """Block until the device has done it. Times of the result are the runtime's."""
        ...


class Device(Protocol):
    """What computes, in the order of its launches."""

    def work(self, batch: Batch, defer_sampling: bool, after: object = None) -> Work:
        """A batch to be started. What is computed here (prices, the oracle's tokens) is part of the launch. ``after``:
        see ports.Executor."""
        ...


class Clients(Protocol):
    """Whoever sends messages to the loop, and hears what became of them."""

    @property
    def tied_to_iterations(self) -> bool:
        """Whether a later iteration will bring a message, so that the loop must not block."""
        ...

    def delivered(self, now_ns: int, iteration: int) -> list[Message]:
        """Everything sent by now, and not handed out yet."""
        ...

    def wait(self, until_ns: int | None) -> None:
        """Block until something is sent, or until ``until_ns``. Raises LoopEnded when nothing ever will be."""
        ...

    def tokens(self, batch: Batch, result: StepResult) -> None:
        """The tokens of a step."""
        ...

    def hear(self, output: RequestOutput | ControlOutput, now_ns: int) -> None:
        """The end of a request, or the answer to a control message."""
        ...


class ScheduledClients:
    """A workload's users: they send when the clock says so, and nobody reads their tokens as they come."""

    def __init__(self, clock: WallClock, traffic: Traffic) -> None:
        self._clock, self._traffic = clock, traffic
        self._due: list[tuple[int, int, TimedRequest]] = []
        """Heap of (when, serial, request)."""
        self._serial = 0
        self._next_of_source = 0
        """Serial of the workload's next request: when it is sent, the one after it is put into the heap."""
        self._take_next()

    @property
    def tied_to_iterations(self) -> bool:
        """See Clients."""
        return self._traffic.tied_to_iterations

    def _push(self, timed: TimedRequest) -> None:
        self._serial += 1
        heappush(self._due, (timed.arrival_ns, self._serial, timed))

    def _take_next(self) -> None:
        timed = self._traffic.next_timed()
        if timed is not None:
            self._push(timed)
            self._next_of_source = self._serial

    def delivered(self, now_ns: int, iteration: int) -> list[Message]:
        """See Clients."""
        messages: list[Message] = []
        if self._traffic.tied_to_iterations:
            messages.extend(self._traffic.due(iteration, now_ns))
        while self._due and self._due[0][0] <= now_ns:
            _, serial, timed = heappop(self._due)
            messages.append(self._traffic.send(timed))
            if serial == self._next_of_source:
                self._take_next()
        return messages

    def wait(self, until_ns: int | None) -> None:
        """See Clients. Raises Deadlock when requests are open and nothing will wake the loop."""
        if self._due:
            until_ns = min(self._due[0][0], until_ns or FAR)
        if until_ns is None:
            if self._traffic.open:
                raise Deadlock(f"{self._traffic.open} requests are open, and nothing will wake the loop")
            raise LoopEnded
        self._clock.wait_until(until_ns)

    def tokens(self, batch: Batch, result: StepResult) -> None:
        """See Clients."""

    def hear(self, output: RequestOutput | ControlOutput, now_ns: int) -> None:
        """See Clients: the end of a request may make its user send the next."""
        if isinstance(output, RequestOutput):
            for timed in self._traffic.end(output, now_ns):
                self._push(timed)


class WallRuntime:
    """The ports of one loop on the wall clock, over a device. Times are ns of ``clock``."""

    def __init__(
        self,
        *,
        clock: WallClock,
        device: Device,
        recorder: Recorder,
        clients: Clients,
        inject: HostProfile | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """``inject``: spin each stage of the loop until this profile's time is spent, to study a slower host than
        ours. ``grammars``: None: a request with one is refused."""
        self.inbox = self.cpu = self.executor = self.outbox = self
        self.neighbours: Neighbours = Alone()
        self.peers: Peers = Alone()
        self.reports: Reports | None = None
        self.threads: Threads = Alone()
        self.grammars = grammars or NoGrammars(self)
        self.clock = clock
        self.now_ns = clock.now_ns
        self._clients = clients
        self._device = device
        self._recorder = recorder
        self._journal = recorder.journal
        self._journal.keeps_tokens = True
        self._inject = inject
        self._timers: list[tuple[int, int, Message]] = []
        """Heap of (when, serial, message)."""
        self._serial = 0
        self._launches = 0
        self._processed = 0
        self.iteration = 0
        self._mark_ns = clock.now_ns()
        """Where the open span began."""

    # -- Inbox ------------------------------------------------------------------------------------------------------

    async def recv(self, block: bool) -> tuple[int, list[Message]]:
        """See ports.Inbox. Raises LoopEnded when nothing is open and nothing will come, or the run is to end."""
        if self.clock.stopping:
            raise LoopEnded
        now = self.now_ns()
        messages = self._delivered(now)
        self.iteration += 1
        if block and not messages and not self._clients.tied_to_iterations:
            self._clients.wait(self._timers[0][0] if self._timers else None)
            self._mark_ns = now = self.now_ns()
            messages = self._delivered(now)
        self._journal.received(now, messages)
        return now, messages

    def _delivered(self, now_ns: int) -> list[Message]:
        """Everything that was due by now."""
        messages = self._clients.delivered(now_ns, self.iteration)
        while self._timers and self._timers[0][0] <= now_ns:
            messages.append(heappop(self._timers)[2])
        return messages

    def post_at(self, when_ns: int, message: Message) -> None:
        """See ports.Inbox."""
        self._serial += 1
        heappush(self._timers, (when_ns, self._serial, message))

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
        launched = stage < Stage.WAIT
        step = self._launches - (stage == Stage.SAMPLE) if launched else self._processed - (stage == Stage.FINISH)
        self._recorder.span((stage, step, self._mark_ns, now))
        self._mark_ns = now

    async def sleep(self, duration_ns: int) -> None:
        """See ports.Cpu. The time is in nobody's span."""
        self.clock.wait_until(self.now_ns() + duration_ns)
        self.begin_span()

    def begin_span(self) -> None:
        """The loop has waited for something, which is in nobody's span."""
        self._mark_ns = self.now_ns()

    # -- Executor -----------------------------------------------------------------------------------------------------

    def launch(self, batch: Batch, defer_sampling: bool = False, after: object = None) -> _Running:
        """See ports.Executor."""
        begin = self._mark_ns
        work = self._device.work(batch, defer_sampling, after)
        work.start()
        least = 0
        if self._inject is not None and work.cost is not None:
            new_tokens = sum(batch.shape.new_tokens) if batch.prefills else 0
            least = self._inject.launch_ns(work.cost.kernels, work.cost.graph)
            least += self._inject.price(Stage.LAUNCH, batch.rows, new_tokens)
        self._close_span(Stage.LAUNCH, least)
        work.launched(begin, self._mark_ns)
        self._launches += 1
        if not defer_sampling:
            self.charge(Stage.SAMPLE, batch.rows)
        return _Running(self, work, batch.rows)

    def wait_for(self, work: Work) -> StepResult:
        """Wait until the device has ended a batch. Raises LoopEnded when the run is to end before that."""
        result = work.wait()
        if self.clock.stopping and self.now_ns() < result.end_ns:
            raise LoopEnded
        self._mark_ns = max(self._mark_ns, result.end_ns)
        self.charge(Stage.WAIT, len(result.token_ids))
        return result

    # -- Outbox -------------------------------------------------------------------------------------------------------

    def send_tokens(self, batch: Batch, result: StepResult) -> int:
        """See ports.Outbox; returns the time of sending (ns)."""
        self._clients.tokens(batch, result)
        self.charge(Stage.SEND, batch.rows)
        self._processed += batch.index >= 0  # a prebuilt batch is no step
        return self._mark_ns

    def send(self, output: RequestOutput | ControlOutput) -> None:
        """See ports.Outbox."""
        self._clients.hear(output, self.now_ns())


class _Running:
    """A launched batch."""

    __slots__ = ("_rows", "_runtime", "_work")

    def __init__(self, runtime: WallRuntime, work: Work, rows: int) -> None:
        self._runtime = runtime
        self._work = work
        self._rows = rows

    def sample(self, masks: NDArray[np.int32] | None) -> None:
        """See ports.Pending. The span holds the making of the masks."""
        self._work.sample(masks)
        self._runtime.charge(Stage.SAMPLE, self._rows)

    def activations(self) -> object:
        """See ports.Pending."""
        return self._work.activations()

    async def result(self) -> StepResult:
        """See ports.Pending."""
        return self._runtime.wait_for(self._work)


class NoGrammars:
    """Where none can be compiled."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox

    def compile(self, rank: int, spec: GrammarSpec) -> None:
        """See ports.Grammars."""
        self._inbox.post_at(0, GrammarReady(rank, "this engine compiles no grammars"))

    def masks(self, batch: Batch) -> None:
        """See ports.Grammars."""

    def accept(self, rank: int, token_id: int) -> None:
        """See ports.Grammars."""

    def forget(self, rank: int) -> None:
        """See ports.Grammars."""


@contextmanager
def stops_on_interrupt(clock: WallClock) -> Iterator[None]:
    """The first Ctrl-C ends the run at its next iteration, the second at once."""
    if threading.current_thread() is not threading.main_thread():  # signals go to the main one
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: object) -> None:
        clock.stopping = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_to_the_end(loop: Coroutine[Any, Any, None]) -> None:
    """Drive a loop until its runtime says that nothing more will come. Raises NoPort if the loop ever suspends: on the
    wall clock every ``await`` blocks; LoopReturned if it returns."""
    try:
        loop.send(None)
    except LoopEnded:
        return
    except StopIteration:
        raise LoopReturned from None
    finally:
        loop.close()
    raise NoPort
