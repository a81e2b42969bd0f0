"""Virtual time: the ports of one loop, its host thread and its device, in a ``World``.

Work is charged, not awaited: the loop's own clock runs ahead of SimPy's by what it has charged, and the debt is paid
when it awaits. If no event of anybody else lies in between, there is nobody to notice: the debt is carried on and no
event is made at all (``_settle``), which is what makes a step cost microseconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from testbed.batch import Batch, StepResult
from testbed.costs import CostModel, HostProfile
from testbed.messages import ControlOutput, GrammarReady, GrammarSpec, Message, RequestOutput
from testbed.metrics.recorder import Recorder
from testbed.ports import Neighbours, Peers, Stage, Threads
from testbed.request import NO_TOKENS
from testbed.runtime.alone import Alone
from testbed.runtime.modelled import Activations, Deadlock, device_time, price_batch, ready_ns
from testbed.runtime.oracle import FAR, Oracle
from testbed.runtime.router import RouterReports
from testbed.runtime.users import Users, WorkloadUsers
from testbed.runtime.virtual_threads import VirtualThreads
from testbed.runtime.world import World, wait

GRAMMAR_NS = 30_000_000
"""From a grammar's arrival until it is compiled: a small JSON schema in our server (median of 30, two busy cores)."""
STANDSTILL = 10_000
"""Iterations at one instant, without a launch, after which a loop is said to spin."""


class VirtualRuntime:
    """The ports of one loop in virtual time: all of them are this object, but those to other loops."""

    def __init__(
        self,
        *,
        world: World,
        users: Users | None,
        cost_model: CostModel,
        host: HostProfile,
        recorder: Recorder,
        oracle: Oracle | None,
        activation_ns: Callable[[int], int] = lambda tokens: 0,
    ) -> None:
        """``users``: None where the outputs go to nobody: a pipeline's stages behind the first. ``oracle``: None where
        no tokens are made: its stages before the last. ``activation_ns``: the time (ns) that the activations of so many
        tokens take to the next stage."""
        self.world = world
        self.env = world.env
        self.users = users
        self.inbox = self.cpu = self.executor = self.outbox = self.grammars = self
        self.neighbours: Neighbours = Alone()
        self.peers: Peers = Alone()
        self.reports: RouterReports | None = None
        self.threads: Threads = VirtualThreads(self)
        self.activation_ns = activation_ns
        self.cost_model = cost_model
        self.host = host
        self._span = recorder.span
        self._journal = recorder.journal
        self._prices: dict[int, int] = {}
        self._last_launched: _Launched | None = None
        self.leap: Callable[[], None] | None = None
        """Tried at the start of an iteration to which nothing has arrived (see ``leap.py``)."""
        self.oracle = oracle
        self.local_ns = 0
        """The loop's own clock; never behind ``env.now`` while the loop runs."""
        self._delivered: deque[Message] = deque()
        self._waiting_for_message: simpy.Event | None = None
        self.device_free_ns = 0
        self.launches = 0
        self.processed = 0
        self.iteration = 0
        """Iterations begun."""
        self._seen, self._standstill = (-1, -1), 0

    # -- what comes in ------------------------------------------------------------------------------------------------

    def deliver(self, message: Message) -> None:
        """Put a message into the inbox now."""
        self._delivered.append(message)
        if self._waiting_for_message is not None:
            waiting, self._waiting_for_message = self._waiting_for_message, None
            waiting.succeed()

    # -- Inbox ---------------------------------------------------------------------------------------------------------

    async def recv(self, block: bool) -> tuple[int, list[Message]]:
        """See ports.Inbox."""
        if self.env.peek() <= self.local_ns:
            await self._settle()
        elif not block and self.leap is not None and not self._delivered:
            self.leap()
            if self.env.peek() <= self.local_ns:
                await self._settle()
        if self.users is not None and self.users.tied_to_iterations:
            self._delivered.extend(self.users.due(self.iteration, self.local_ns))
            block = block and not self.users.tied_to_iterations
        self.iteration += 1
        if self.local_ns == self._seen[0] and self.launches == self._seen[1]:
            self._standstill += 1
            if self._standstill > STANDSTILL and not block:
                raise Deadlock(f"the loop spins: {STANDSTILL} iterations at {self.local_ns} ns without a launch")
        else:
            self._seen, self._standstill = (self.local_ns, self.launches), 0
        if block and not self._delivered:
            self._waiting_for_message = simpy.Event(self.env)
            await wait(self._waiting_for_message)
            self.local_ns = int(self.env.now)
        if not self._delivered:
            self._journal.stamp(self.local_ns)
            return self.local_ns, []
        messages = list(self._delivered)
        self._delivered.clear()
        self._journal.received(self.local_ns, messages)
        return self.local_ns, messages

    def post_at(self, when_ns: int, message: Message) -> None:
        """See ports.Inbox."""
        self.world.at(when_ns, lambda: self.deliver(message))

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
        if new_tokens or admitted or waiting or matched_tokens:
            cost_ns = self.host.price(stage, rows, new_tokens, admitted, waiting, matched_tokens)
        else:
            key = rows << 3 | stage
            known = self._prices.get(key)
            cost_ns = self.stage_price(stage, rows) if known is None else known
        if cost_ns:
            begin = self.local_ns
            self.local_ns = end = begin + cost_ns
            launched = stage < Stage.WAIT
            step = self.launches - (stage == Stage.SAMPLE) if launched else self.processed - (stage == Stage.FINISH)
            self._span((stage, step, begin, end))

    def stage_price(self, stage: Stage, rows: int) -> int:
        """The cost (ns) of a stage that depends on the batch size alone, remembered."""
        self._prices[rows << 3 | stage] = cost_ns = self.host.price(stage, rows)
        return cost_ns

    async def sleep(self, duration_ns: int) -> None:
        """See ports.Cpu."""
        self.local_ns += duration_ns
        if self.env.peek() <= self.local_ns:
            await self._settle()

    def horizon_ns(self) -> int:
        """When the next event of anybody else happens; FAR in the future when there is none."""
        return int(min(self.env.peek(), FAR))

    async def _settle(self) -> None:
        """Pay the debt to SimPy's clock. Called only when somebody else's event comes before the loop's own time: else
        nobody would notice, and the debt is carried on without an event."""
        await wait(self.env.timeout(self.local_ns - self.env.now))
        while self.env.now < self.local_ns:  # another thread of the loop has worked meanwhile
            await wait(self.env.timeout(self.local_ns - self.env.now))

    # -- Executor ----------------------------------------------------------------------------------------------------

    def launch(self, batch: Batch, defer_sampling: bool = False, after: object = None) -> _Launched:
        """See ports.Executor. An in-order device: a batch starts when it is launched, the device is free, and the
        activations of the stage before are there."""
        cost = price_batch(self.cost_model, batch)
        new_tokens = sum(batch.shape.new_tokens) if batch.prefills else 0
        launch_ns = self.host.launch_ns(cost.kernels, cost.graph)
        launch_ns += self.host.price(Stage.LAUNCH, batch.rows, new_tokens)
        begin = self.local_ns
        if launch_ns:
            self.local_ns = begin + launch_ns
            self._span((Stage.LAUNCH, self.launches, begin, self.local_ns))
        start, end = device_time(cost, begin, self.local_ns, max(self.device_free_ns, ready_ns(after)))
        self.device_free_ns = end
        token_ids, stopped = self.oracle.result(batch) if self.oracle is not None else (NO_TOKENS, ())
        self.launches += 1
        if not defer_sampling and self.oracle is not None:
            self.charge(Stage.SAMPLE, len(token_ids))
        result = StepResult(token_ids, stopped, begin, start, end, cost.graph)
        self._last_launched = _Launched(self, result, new_tokens + batch.shape.decodes)
        return self._last_launched

    @property
    def last_result(self) -> StepResult:
        """The result of the last launch (there was one)."""
        assert self._last_launched is not None
        return self._last_launched.outcome

    def replace_last_result(self, result: StepResult) -> None:
        """The batch in flight has been moved on by a leap: this is its result now."""
        assert self._last_launched is not None
        self._last_launched.outcome = result

    def moved(self, steps: int, now_ns: int, device_free_ns: int) -> None:
        """A leap has done ``steps`` iterations."""
        self.iteration += steps
        self.launches += steps
        self.processed += steps
        self.local_ns, self.device_free_ns = now_ns, device_free_ns

    # -- Grammars ----------------------------------------------------------------------------------------------------

    def compile(self, rank: int, spec: GrammarSpec) -> None:
        """See ports.Grammars: takes ``GRAMMAR_NS``, whatever it is."""
        self.post_at(self.local_ns + GRAMMAR_NS, GrammarReady(rank))

    def masks(self, batch: Batch) -> None:
        """See ports.Grammars: the oracle's tokens match nothing, and end when they would without a grammar."""

    def accept(self, rank: int, token_id: int) -> None:
        """See ports.Grammars."""

    def forget(self, rank: int) -> None:
        """See ports.Grammars."""

    # -- Outbox ------------------------------------------------------------------------------------------------------

    def send_tokens(self, batch: Batch, result: StepResult) -> int:
        """See ports.Outbox; returns the loop's time of sending (ns)."""
        if self.users is not None:
            self.charge(Stage.SEND, len(result.token_ids))
        self.processed += batch.index >= 0  # a prebuilt batch is no step
        return self.local_ns

    def send(self, output: RequestOutput | ControlOutput) -> None:
        """See ports.Outbox."""
        if self.users is not None:
            self.users.hear(output, self.local_ns)


class _Launched:
    """A batch on the simulated device: its result and its end are known at launch."""

    __slots__ = ("_runtime", "_tokens", "outcome")

    def __init__(self, runtime: VirtualRuntime, outcome: StepResult, tokens: int) -> None:
        self._runtime = runtime
        self._tokens = tokens
        self.outcome = outcome

    def activations(self) -> Activations:
        """See ports.Pending."""
        return Activations(self.outcome.end_ns + self._runtime.activation_ns(self._tokens))

    def sample(self, masks: NDArray[np.int32] | None) -> None:
        """See ports.Pending: the batch has not ended before it was sampled."""
        runtime, result = self._runtime, self.outcome
        runtime.charge(Stage.SAMPLE, len(result.token_ids))
        if result.end_ns < runtime.local_ns:
            self.outcome = result._replace(end_ns=runtime.local_ns)
            runtime.device_free_ns = runtime.local_ns

    async def result(self) -> StepResult:
        """See ports.Pending."""
        runtime, result = self._runtime, self.outcome
        if runtime.local_ns < result.end_ns:
            runtime.local_ns = result.end_ns
        if runtime.users is not None and runtime.env.peek() <= runtime.local_ns:  # else nobody hears when it is done
            await runtime._settle()
        runtime.charge(Stage.WAIT, len(result.token_ids))
        return result


def run_to_the_end(loop: Coroutine[Any, Any, None], runtime: VirtualRuntime, users: WorkloadUsers) -> None:
    """A deployment of one loop: run it until nothing can happen any more. Raises the loop's own exception, and Deadlock
    when requests are open but no event is left."""
    users.submit = runtime.deliver
    runtime.world.start("the loop", loop)
    users.start()
    runtime.world.run()
