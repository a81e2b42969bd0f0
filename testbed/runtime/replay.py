"""A recorded run as a runtime: feeds back what each ``recv`` and each step returned, and compares every decision.

Time does not pass here, and nothing is computed: the loop and the scheduler do again what they did, from the journal.
Whoever made the run (virtual time, paced, a GPU elsewhere), its decisions must come out byte for byte.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from testbed.batch import Batch, BatchShape, StepResult
from testbed.loops.base import LoopContext
from testbed.loops.select import EventLoop
from testbed.memory import OutOfPages
from testbed.messages import ControlOutput, Message, RequestOutput
from testbed.metrics.columns import ints
from testbed.metrics.journal import Journal
from testbed.metrics.records import Records
from testbed.ports import Stage
from testbed.runtime.oracle import Oracle
from testbed.runtime.wall import LoopEnded, run_to_the_end
from testbed.scheduler.decisions import HEADER, Decision, decision_at, digest
from testbed.scheduler.invariants import InvariantError
from testbed.scheduler.scheduler import Scheduler

WORK_COLUMNS = ("stage", "step", "rows", "new_tokens", "admitted", "waiting", "matched_tokens")
STATE_COLUMNS = ("rows", "new_tokens", "running", "waiting", "free_tokens", "evictable_tokens", "evicted_tokens")
"""Columns of the step records that say in which state the scheduler was when it decided."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A replay at one of its steps, beside the run."""

    step: int
    now_ns: int
    """Stamp of the iteration that decided it."""
    reason: str
    recorded: Decision | None = None
    """What the run decided; None when it has no such step."""
    replayed: Decision | None = None
    recorded_state: dict[str, int] = field(default_factory=dict)
    """See ``STATE_COLUMNS``."""
    replayed_state: dict[str, int] = field(default_factory=dict)
    waiting: tuple[str, ...] = ()
    """Ids in the replayed scheduler's waiting queue, in order."""
    running: tuple[str, ...] = ()

    def explain(self) -> str:
        """Both sides, a line each thing that differs."""
        lines = [f"step {self.step}, decided at {self.now_ns / 1e6:.3f} ms: {self.reason}"]
        if self.recorded or self.replayed:
            lines.append(f"  {'':18}{'recorded':>24}{'replayed':>24}")
        for name in Decision.__slots__ if self.recorded and self.replayed else ():
            was, now = getattr(self.recorded, name), getattr(self.replayed, name)
            mark = "" if was == now else "  <-"
            lines.append(f"  {name:18}{_short(was):>24}{_short(now):>24}{mark}")
        for name in self.recorded_state:
            was, now = self.recorded_state[name], self.replayed_state.get(name)
            lines.append(f"  {name:18}{was:>24}{'' if now is None else now:>24}{'' if was == now else '  <-'}")
        lines.append(f"  waiting now: {_names(self.waiting)}")
        lines.append(f"  running now: {_names(self.running)}")
        return "\n".join(lines)


@dataclass(slots=True)
class Replayed:
    """A recorded run, gone through scheduler and loop again."""

    steps: int
    """Steps launched again."""
    recorded_steps: int
    """Steps in the run's decision log."""
    divergence: Standing | None
    """The first step that is not the run's; None: every decision is the recorded one."""
    shapes: list[BatchShape]
    """Of every step, in order of launch: what a cost model prices."""
    work: dict[str, NDArray[np.int64]]
    """What was charged to the host, one row a charge, in order: int64 [charges] by ``WORK_COLUMNS``. On the wall clock
    every charge closes a span: row i belongs to host span i of the run."""
    records: Records
    """Of the replay: the requests and steps as the scheduler told them again."""
    last: Standing
    """Where the replay ended."""

    def verdict(self) -> str:
        """One line."""
        steps = f"{self.steps:,} of {self.recorded_steps:,} steps replayed"
        if self.divergence is not None:
            return f"DIVERGES at step {self.divergence.step:,} ({steps})"
        return f"{steps}, every decision is the recorded one (digest {digest(self.records.decisions)[:16]})"


class _Diverged(Exception):
    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step, self.reason = step, reason


class ReplayRuntime:
    """The ports of one loop over a journal."""

    def __init__(self, scheduler: Scheduler, journal: Journal, records: Records, until_step: int | None) -> None:
        self.inbox = self.cpu = self.executor = self.outbox = self
        self.scheduler = scheduler
        self.journal = journal
        self.records = records
        self.shapes: list[BatchShape] = []
        self.work = array("q")
        self.now_ns = 0
        self._until = until_step
        self._deliveries = journal.deliveries()
        self.launches = self._processed = 0
        self._compared = len(HEADER)
        """Bytes of the decision log that are compared."""
        setting = journal.setting
        assert setting is not None
        self._oracle = Oracle(setting.seed, setting.vocab_size, scheduler.memory.slots.count)
        names = ("launch_ns", "start_ns", "end_ns", "graph")
        self._times = np.stack([ints(records.steps, name) for name in names], axis=1).tolist()

    # -- Inbox ------------------------------------------------------------------------------------------------------

    async def recv(self, block: bool) -> tuple[int, list[Message]]:
        """See ports.Inbox: what the run's ``recv`` returned. Raises LoopEnded behind the last one."""
        if self._until is not None and self.launches >= self._until:
            raise LoopEnded
        delivery = next(self._deliveries, None)
        if delivery is None:
            raise LoopEnded
        self.now_ns, messages = delivery
        return self.now_ns, messages

    def post_at(self, when_ns: int, message: Message) -> None:
        """See ports.Inbox: it is in the journal, when it came."""

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
        """See ports.Cpu: noted."""
        step = self.launches if stage <= Stage.SAMPLE else self._processed
        self.work.extend((stage, step, rows, new_tokens, admitted, waiting, matched_tokens))

    async def sleep(self, duration_ns: int) -> None:
        """See ports.Cpu: the stamps hold it."""

    # -- Executor -----------------------------------------------------------------------------------------------------

    def launch(self, batch: Batch, defer_sampling: bool = False) -> _Recorded:
        """See ports.Executor: nothing is computed; the decision is compared."""
        self.shapes.append(batch.shape)
        self._compare()
        self.charge(Stage.LAUNCH, batch.rows, sum(batch.shape.new_tokens))
        self.charge(Stage.SAMPLE, batch.rows)
        self.launches += 1
        return _Recorded(self, batch)

    def _compare(self) -> None:
        log = self.scheduler.decision_log.tail(self._compared)
        if self.records.decisions[self._compared : self._compared + len(log)] != log:
            ended = self._compared >= len(self.records.decisions)
            raise _Diverged(self.launches, "the run launches no more" if ended else "another decision")
        self._compared += len(log)

    def result_of(self, batch: Batch) -> StepResult:
        """What the run's device returned for a step."""
        step, journal = batch.index, self.journal
        if step >= len(journal.sent) or step >= len(self._times):
            raise _Diverged(step, "the run holds no result of this step")
        if journal.keeps_tokens:
            token_ids = journal.tokens[step]
        else:
            token_ids, _ = self._oracle.result(batch)
        if len(token_ids) != batch.rows:
            raise _Diverged(step, f"the device returned {len(token_ids)} tokens for {batch.rows} rows")
        launch, start, end, graph = self._times[step]
        self.charge(Stage.WAIT, len(token_ids))
        return StepResult(
            token_ids,
            journal.stopped.get(step, ()),
            launch,
            start,
            end,
            bool(graph),
            journal.logprobs.get(step),
            journal.invalid.get(step, ()),
        )

    # -- Outbox -------------------------------------------------------------------------------------------------------

    def send_tokens(self, batch: Batch, result: StepResult) -> int:
        """See ports.Outbox: sent when the run sent it."""
        self.charge(Stage.SEND, batch.rows)
        self._processed += 1
        return self.journal.sent[batch.index]

    def send(self, output: RequestOutput | ControlOutput) -> None:
        """See ports.Outbox: nobody listens."""

    # -- the end ------------------------------------------------------------------------------------------------------

    def check_complete(self) -> None:
        """Raise unless the run has no step that was not launched again."""
        if self._until is None and self._compared < len(self.records.decisions):
            raise _Diverged(self.launches, "the replay launches no more")

    def standing(self, step: int, reason: str) -> Standing:
        """Both sides at ``step``."""
        scheduler, steps = self.scheduler, self.records.steps
        reached = step < len(steps["step"])
        return Standing(
            step=step,
            now_ns=self.now_ns,
            reason=reason,
            recorded=decision_at(self.records.decisions, step),
            replayed=decision_at(scheduler.decision_log.bytes(), step),
            recorded_state={name: int(ints(steps, name)[step]) for name in STATE_COLUMNS} if reached else {},
            replayed_state=self._state(),
            waiting=tuple(request.rid for request in scheduler.waiting),
            running=tuple(request.rid for request in scheduler.running.requests),
        )

    def _state(self) -> dict[str, int]:
        batch = self.scheduler.last_batch
        if batch is None:
            return {}
        return dict(
            zip(
                STATE_COLUMNS,
                (batch.rows, sum(batch.shape.new_tokens), *batch.decided, batch.evicted_tokens),
                strict=True,
            )
        )


class _Recorded:
    __slots__ = ("_batch", "_runtime")

    def __init__(self, runtime: ReplayRuntime, batch: Batch) -> None:
        self._runtime = runtime
        self._batch = batch

    def sample(self, masks: object) -> None:
        """See ports.Pending: the run has sampled."""

    async def result(self) -> StepResult:
        """See ports.Pending."""
        return self._runtime.result_of(self._batch)


def replay_loop(
    loop: EventLoop, scheduler: Scheduler, journal: Journal, records: Records, until_step: int | None = None
) -> Replayed:
    """Drive ``scheduler``, as it was when the run began, through ``journal``; ``records`` are the run's.

    ``until_step``: stop once so many steps are launched.
    """
    runtime = ReplayRuntime(scheduler, journal, records, until_step)
    divergence = None
    try:
        run_to_the_end(loop(LoopContext(scheduler, runtime)))
        runtime.check_complete()
    except _Diverged as diverged:
        divergence = runtime.standing(diverged.step, diverged.reason)
    except (InvariantError, AssertionError, OutOfPages) as error:
        divergence = runtime.standing(runtime.launches, f"the scheduler cannot go on: {error}")
    table = np.frombuffer(runtime.work, dtype=np.int64).reshape(-1, len(WORK_COLUMNS))
    requests = records.requests
    sent = zip(ints(requests, "arrival_ns").tolist(), requests["session"], requests["tenant"], strict=True)
    return Replayed(
        steps=len(runtime.shapes),
        recorded_steps=max(len(ints(records.steps, "step")), len(runtime.shapes) if divergence is None else 0),
        divergence=divergence,
        last=divergence or runtime.standing(max(runtime.launches - 1, 0), "the last step launched again"),
        shapes=runtime.shapes,
        work={name: table[:, place] for place, name in enumerate(WORK_COLUMNS)},
        records=scheduler.recorder.records(
            dict(zip(requests["id"], sent, strict=True)), scheduler.decision_log.bytes()
        ),
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 22 else text[:19] + "..."


def _names(ids: tuple[str, ...]) -> str:
    shown = ", ".join(ids[:12])
    return f"{len(ids)} ({shown}{', ...' if len(ids) > 12 else ''})" if ids else "none"
