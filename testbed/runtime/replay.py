"""A recorded run as a runtime: feeds back what each ``recv`` and each step returned, and compares every decision.

Time does not pass here, and nothing is computed: the loop and the scheduler do again what they did, from the journal.
Whoever made the run (virtual time, paced, a GPU elsewhere), its decisions must come out byte for byte.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from testbed.batch import Batch, BatchShape, StepLogprobs, StepResult
from testbed.loops.base import LoopContext
from testbed.loops.select import EventLoop
from testbed.memory import OutOfPages
from testbed.messages import ControlOutput, GrammarSpec, Message, RequestOutput
from testbed.metrics.columns import ints
from testbed.metrics.journal import Journal
from testbed.metrics.records import Records
from testbed.ports import Stage
from testbed.runtime.alone import Alone
from testbed.runtime.oracle import Oracle
from testbed.runtime.wall import LoopEnded, run_to_the_end
from testbed.scheduler.decisions import HEADER, Decision, decision_at, digest
from testbed.scheduler.invariants import InvariantError
from testbed.scheduler.scheduler import Scheduler

WORK_COLUMNS = ("stage", "step", "rows", "new_tokens", "admitted", "waiting", "matched_tokens")
STATE_COLUMNS = ("rows", "new_tokens", "running", "waiting", "free_tokens", "evictable_tokens", "new_token_ratio")
"""Columns of the step records that say in which state the scheduler was when it decided."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A replay at one of its steps, beside the run."""

    step: int
    now_ns: int
    """Stamp of the iteration in which the replay stands."""
    reason: str
    recorded: Decision | None = None
    """What the run decided; None when it has no such step."""
    replayed: Decision | None = None
    recorded_state: dict[str, float] = field(default_factory=dict)
    """See ``STATE_COLUMNS``."""
    replayed_state: dict[str, float] = field(default_factory=dict)
    waiting: tuple[str, ...] = ()
    """Ids in the replayed scheduler's waiting queue, in order."""
    running: tuple[str, ...] = ()

    def explain(self) -> str:
        """Both sides, a line each figure, then the lists in which they differ."""
        sides = (_figures(self.recorded, self.recorded_state), _figures(self.replayed, self.replayed_state))
        other = _other_lists(self.recorded, self.replayed)
        lines = [f"step {self.step:,}, at {self.now_ns / 1e6:,.3f} ms: {self.reason}"]
        lines.append(f"  {'':18}{'recorded':>12}{'replayed':>12}")
        for name in {**sides[0], **sides[1]}:
            was, now = (side.get(name, "-") for side in sides)
            lines.append(f"  {name:18}{was:>12}{now:>12}{'' if was == now and name not in other else '  <-'}")
        for name, (start, was_list, now_list) in other.items():
            lines.append(f"  {name}, from number {start} on")
            lines += [f"    recorded: {_items(was_list)}", f"    replayed: {_items(now_list)}"]
        if other:
            lines.append("  (requests by order of arrival, prefills as (request, tokens known, tokens computed))")
        queues = (("waiting", self.waiting), ("running", self.running))
        return "\n".join([*lines, *(f"  {name} in the replay: {_items(ids)}" for name, ids in queues)])


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
    differing: tuple[str, ...] = ()
    """Columns of the run's records that come out otherwise although every decision is the recorded one: the records or
    the journal were changed, or this program keeps records in another way. Empty where the replay ended early."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs, in decisions and records, as far as the replay went."""
        return self.divergence is None and not self.differing

    def verdict(self) -> str:
        """One line."""
        if self.divergence is not None:
            return f"DIVERGES at step {self.divergence.step:,} of {self.recorded_steps:,}"
        if self.steps < self.recorded_steps:
            return f"the first {self.steps:,} of {self.recorded_steps:,} steps: every decision is the recorded one"
        steps = f"{self.steps:,} steps, every decision is the recorded one"
        if self.differing:
            return f"{steps}, but the RECORDS DIFFER: {', '.join(self.differing)}"
        return f"{steps} (digest {digest(self.records.decisions)[:16]})"


class _Diverged(Exception):
    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step, self.reason = step, reason


class ReplayRuntime:
    """The ports of one loop over a journal."""

    def __init__(self, scheduler: Scheduler, journal: Journal, records: Records, until_step: int | None) -> None:
        self.inbox = self.cpu = self.executor = self.outbox = self.grammars = self
        self.neighbours = self.peers = self.threads = Alone()
        self.reports = None
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
        launched = stage < Stage.WAIT
        step = self.launches - (stage == Stage.SAMPLE) if launched else self._processed - (stage == Stage.FINISH)
        self.work.extend((stage, step, rows, new_tokens, admitted, waiting, matched_tokens))

    async def sleep(self, duration_ns: int) -> None:
        """See ports.Cpu: the stamps hold it."""

    # -- Executor -----------------------------------------------------------------------------------------------------

    def launch(self, batch: Batch, defer_sampling: bool = False, after: object = None) -> _Recorded:
        """See ports.Executor: nothing is computed; the decision is compared."""
        self.shapes.append(batch.shape)
        self._compare()
        # As when the run was made: at its result a request may have lost the slot that the oracle looks at.
        token_ids = None if self.journal.keeps_tokens else self._oracle.result(batch)[0]
        self.charge(Stage.LAUNCH, batch.rows, sum(batch.shape.new_tokens))
        self.launches += 1
        if not defer_sampling:
            self.charge(Stage.SAMPLE, batch.rows)
        return _Recorded(self, batch, token_ids)

    def _compare(self) -> None:
        log = self.scheduler.decision_log.last
        if self.records.decisions[self._compared : self._compared + len(log)] != log:
            ended = self._compared >= len(self.records.decisions)
            raise _Diverged(self.launches, "the run launches no more" if ended else "another decision")
        self._compared += len(log)

    def result_of(self, batch: Batch, token_ids: NDArray[np.int32] | None) -> StepResult:
        """What the run's device returned for a step; ``token_ids`` where the journal keeps none. Raises LoopEnded where
        the run was ended while it waited for that."""
        step, journal = batch.index, self.journal
        if step >= len(journal.sent) or step >= len(self._times):
            if next(self._deliveries, None) is None:
                raise LoopEnded
            raise _Diverged(step, "the run holds no result of this step")
        if token_ids is None:
            token_ids = journal.tokens[step]
        stopped, invalid = journal.stopped.get(step, ()), journal.invalid.get(step, ())
        logprobs = journal.logprobs.get(step)
        if len(token_ids) != batch.rows:
            raise _Diverged(step, f"the device returned {len(token_ids)} tokens for {batch.rows} rows")
        if max((*stopped, *invalid), default=0) >= batch.rows or not _fit(logprobs, batch):
            raise _Diverged(step, "the device returned something else than this step asks for")
        launch, start, end, graph = self._times[step]
        self.charge(Stage.WAIT, len(token_ids))
        return StepResult(token_ids, stopped, launch, start, end, bool(graph), logprobs, invalid)

    # -- Grammars -----------------------------------------------------------------------------------------------------

    def compile(self, rank: int, spec: GrammarSpec) -> None:
        """See ports.Grammars: that it is ready is in the journal, when it was."""

    def masks(self, batch: Batch) -> None:
        """See ports.Grammars: the tokens are in the journal."""

    def accept(self, rank: int, token_id: int) -> None:
        """See ports.Grammars."""

    def forget(self, rank: int) -> None:
        """See ports.Grammars."""

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
            recorded_state={name: np.asarray(steps[name])[step].item() for name in STATE_COLUMNS} if reached else {},
            replayed_state=self._state(step),
            waiting=tuple(request.rid for request in scheduler.waiting),
            running=tuple(request.rid for request in scheduler.running.requests),
        )

    def _state(self, step: int) -> dict[str, float]:
        launched = (*self.scheduler.in_flight, self.scheduler.last_batch)
        batch = next((batch for batch in launched if batch is not None and batch.index == step), None)
        if batch is None:
            return {}
        state = (batch.rows, sum(batch.shape.new_tokens), *batch.decided, batch.new_token_ratio)
        return dict(zip(STATE_COLUMNS, state, strict=True))


class _Recorded:
    __slots__ = ("_batch", "_runtime", "_token_ids")

    def __init__(self, runtime: ReplayRuntime, batch: Batch, token_ids: NDArray[np.int32] | None) -> None:
        self._runtime = runtime
        self._batch = batch
        self._token_ids = token_ids

    def sample(self, masks: NDArray[np.int32] | None) -> None:
        """See ports.Pending: the run has sampled."""
        self._runtime.charge(Stage.SAMPLE, self._batch.rows)

    def activations(self) -> object:
        """See ports.Pending: nothing is computed."""
        return None

    async def result(self) -> StepResult:
        """See ports.Pending."""
        return self._runtime.result_of(self._batch, self._token_ids)


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
    again = scheduler.recorder.records(dict(zip(requests["id"], sent, strict=True)), scheduler.decision_log.bytes())
    whole = divergence is None and until_step is None
    return Replayed(
        steps=len(runtime.shapes),
        recorded_steps=len(runtime.shapes) if whole else len(ints(records.steps, "step")),
        divergence=divergence,
        last=divergence or runtime.standing(max(runtime.launches - 1, 0), "the last step launched again"),
        shapes=runtime.shapes,
        work={name: table[:, place] for place, name in enumerate(WORK_COLUMNS)},
        records=again,
        differing=_differing(records, again) if whole else (),
    )


def _fit(found: StepLogprobs | None, batch: Batch) -> bool:
    """Whether these log-probabilities have a place for every row that keeps some of a step of this shape."""
    if found is None:
        return True
    rows, new_tokens = batch.rows, sum(batch.shape.new_tokens)
    drawn = [*(prefill.request for prefill in batch.prefills if prefill.last), *batch.decodes]
    wanted = any(request.top_logprobs for request in drawn if request.logprobs is not None)
    return (
        found.tokens.shape == (rows,)
        and found.prompt.shape in ((0,), (new_tokens,))
        and found.top.shape == found.top_ids.shape
        and found.top.ndim == 2
        and (len(found.top) == rows or not wanted)
    )


def _differing(recorded: Records, again: Records) -> tuple[str, ...]:
    """Columns of requests and steps that are not equal; times of steps are the run's own, their work is not made."""
    found = [
        f"{table}.{name}"
        for table in ("requests", "steps")
        for name, column in getattr(again, table).items()
        if not np.array_equal(column, getattr(recorded, table)[name])
    ]
    same_tokens = np.array_equal(again.token_offsets, recorded.token_offsets)
    if not same_tokens or not np.array_equal(again.token_times_ns, recorded.token_times_ns):
        found.append("tokens.time_ns")
    return tuple(found)


_LISTS = ("prefills", "decodes", "retracted", "pages")


def _figures(decision: Decision | None, state: dict[str, float]) -> dict[str, str]:
    """What ``explain`` shows of one side; lists by their length."""
    figures: dict[str, float] = {}
    if decision is not None:
        figures = {name: len(getattr(decision, name)) for name in _LISTS}
        figures["evicted_tokens"] = decision.evicted_tokens
    shown = {
        name: f"{value:,}" if isinstance(value, int) else f"{value:.4f}" for name, value in (figures | state).items()
    }
    return shown if decision is None else {"mode": decision.mode.name.lower(), **shown}


def _other_lists(
    recorded: Decision | None, replayed: Decision | None
) -> dict[str, tuple[int, Sequence[object], Sequence[object]]]:
    """Lists of two decisions that are not equal: (first place that differs, both from there on) by name."""
    if recorded is None or replayed is None:
        return {}
    found = {}
    for name in _LISTS:
        was, now = getattr(recorded, name), getattr(replayed, name)
        if was != now:
            pairs = enumerate(zip(was, now, strict=False))
            start = next((place for place, (one, other) in pairs if one != other), min(len(was), len(now)))
            found[name] = (start, was[start:], now[start:])
    return found


def _items(values: Sequence[object]) -> str:
    shown = ", ".join(map(str, values[:12]))
    return f"{shown}, ... ({len(values):,})" if len(values) > 12 else shown or "none"
