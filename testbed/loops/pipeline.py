"""The pipeline loops: every stage takes the same decisions by itself, for P micro-batches in turn (specification A.3).

A *slot* is one turn of one micro-batch. Stage s is one slot or more behind stage s - 1, from which it has what arrived
and when, and on what its device computes. Tokens exist on the last stage only: they go round the ring to the first one
and down, so the result of a micro-batch is applied by everybody right before its own next turn: P - 1 slots late in
time, never a step late.

What one stage sends to the next, in every slot, in this order (the other loop in brackets)::

    [tokens of an earlier slot]   stamp and messages   decision and activations   (tokens of an earlier slot)
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.batch import Batch, StepResult
from testbed.loops.base import LoopContext
from testbed.messages import Message
from testbed.ports import Channel, Pending
from testbed.scenario.errors import InputError
from testbed.scheduler.decisions import Decision, decision_at

NOTHING = b""
"""The decision of a slot that has nothing to run."""


async def event_loop_pipeline(
    loop: LoopContext, stage_of: Callable[[LoopContext], PipelineStage] | None = None
) -> None:
    """Blocking, as SGLang 0.5.1: what a device makes is waited for, then sent; a stage behind the first waits for it
    before it launches. ``stage_of``: None: ``PipelineStage``."""
    stage = (stage_of or PipelineStage)(loop)
    carried: StepResult | None = None
    while True:
        for m in range(stage.stages):
            await stage.recv_requests(stage.nothing_to_do())
            batch = stage.get_next_batch_to_run()
            decided = stage.log.last if batch else NOTHING
            activations = None if stage.is_first else stage.agreed(decided, await stage.previous.recv())
            launched = stage.slots[m] = await stage.launch(batch, activations) if batch else None
            if stage.is_last and launched:
                stage.next.send(await launched.done())
            received = None
            if following := stage.turn_to((m + 1) % stage.stages):
                received = following.drawn = await stage.previous.recv()
                await stage.process_batch_result(following.batch, following)
            if not stage.is_last:
                if carried:
                    stage.next.send(carried)
                stage.next.send((stage.now_ns, stage.messages))
                if launched:
                    await launched.done()
                stage.next.send((decided, launched.activations() if launched else None))
            carried = received
        if not any(stage.slots):
            stage.self_check_during_idle()


async def event_loop_pipeline_async(loop: LoopContext) -> None:
    """As SGLang since December 2025: everything is sent as soon as it is there, activations before they are computed,
    so that a stage's device finds its next step launched; the last stage launches before it waits for the tokens of
    the slot before, and does not wait for them to come round to it."""
    stage = PipelineStage(loop)
    while True:
        for m in range(stage.stages):
            await stage.recv_requests(stage.nothing_to_do())
            if not stage.is_last:
                stage.next.send((stage.now_ns, stage.messages))
            batch = stage.get_next_batch_to_run()
            decided = stage.log.last if batch else NOTHING
            activations = None if stage.is_first else stage.agreed(decided, await stage.previous.recv())
            before = stage.slots[m - 1]
            launched = stage.slots[m] = await stage.launch(batch, activations) if batch else None
            if not stage.is_last:
                stage.next.send((decided, launched.activations() if launched else None))
            elif before:
                stage.next.send(await before.done())
            if following := stage.turn_to((m + 1) % stage.stages):
                following.drawn = await (following.done() if stage.is_last else stage.previous.recv())
                if stage.place < stage.stages - 2:
                    stage.next.send(following.drawn)
                await stage.process_batch_result(following.batch, following)
        if not any(stage.slots):
            stage.self_check_during_idle()


class PipelineStage(LoopContext):
    """A loop's context at one stage of a pipeline. The first stage alone hears and answers the users; the others decide
    from what it has heard, at the times it has stamped.

    A grammar is compiled on the first stage, whose ``GrammarReady`` counts, and on the others, of which the last one
    makes masks. All tokens that a mask follows from are known at the launch: nothing is sampled late.
    """

    def __init__(self, loop: LoopContext) -> None:
        super().__init__(loop.scheduler, loop)
        ring = self.neighbours
        self.place, self.stages, self.previous, self.next = ring.stage, ring.stages, ring.previous, ring.next
        self.is_first, self.is_last = ring.stage == 0, ring.stage == ring.stages - 1
        self.slots: list[Launched | None] = [None] * ring.stages
        """What each micro-batch launched at its last turn."""
        self.log = self.scheduler.decision_log
        self.scheduler.recorder.keeps_requests = self.is_first
        if not self.is_first:
            self.inbox = HandedOn(self.previous)

    def nothing_to_do(self) -> bool:
        """Whether only a message can bring something to do: then every stage has applied every result, because each
        has an empty turn of all micro-batches behind it."""
        return self.is_first and not (self.scheduler.in_flight or self.scheduler.can_build_batch)

    def turn_to(self, m: int) -> Launched | None:
        """From here on it is micro-batch ``m``: the result of its last turn, and its next. Returns what is launched."""
        self.scheduler.select_micro_batch(m)
        return self.slots[m]

    def agreed(self, decided: bytes, handed_on: tuple[bytes, object]) -> object:
        """The activations that the stage before hands on with its decision. Raises StagesDisagree when this one has
        ``decided`` otherwise."""
        theirs, activations = handed_on
        if theirs != decided:
            step = self.scheduler.steps - bool(decided)
            before = self.log.bytes().removesuffix(decided)
            decisions = [decision_at(before + part, step) for part in (decided, theirs)]
            raise StagesDisagree(self.place, step, *decisions)
        return activations

    async def launch(self, batch: Batch, after: object) -> Launched:
        """Launch behind the activations of the stage before."""
        if self.scheduler.forward_sleep_ns:
            await self.cpu.sleep(self.scheduler.forward_sleep_ns)
        masked = batch.has_grammar and self.is_last
        launched = Launched(batch, self.executor.launch(batch, masked, after))
        if masked:
            launched.sample(self.grammars.masks(batch))
        return launched


class HandedOn:
    """The inbox of a stage behind the first: what the stage before took from its own, with the first one's stamp."""

    def __init__(self, previous: Channel) -> None:
        self._previous = previous

    def recv(self, block: bool) -> Coroutine[Any, Any, tuple[int, list[Message]]]:
        """See ports.Inbox: waits in any case."""
        return self._previous.recv()

    def post_at(self, when_ns: int, message: Message) -> None:
        """See ports.Inbox: the first stage's timers wake all."""


class Launched:
    """A batch on this stage's device: its times are made here, its tokens on the last stage."""

    __slots__ = ("_own", "_pending", "batch", "drawn")

    def __init__(self, batch: Batch, pending: Pending) -> None:
        self.batch = batch
        self._pending = pending
        self.drawn: StepResult | None = None
        self._own: StepResult | None = None

    def sample(self, masks: NDArray[np.int32] | None) -> None:
        """See ports.Pending."""
        self._pending.sample(masks)

    def activations(self) -> object:
        """See ports.Pending."""
        return self._pending.activations()

    async def done(self) -> StepResult:
        """Waits until this stage's device has done it."""
        if self._own is None:
            self._own = await self._pending.result()
        return self._own

    async def result(self) -> StepResult:
        """See ports.Pending: the times of this stage's device, and what the last one has drawn."""
        own, drawn = self._own or await self.done(), self.drawn
        assert drawn is not None, "tokens are received before they are applied"
        if drawn is own:
            return own
        times = own.launch_ns, own.start_ns, own.end_ns, own.graph
        return StepResult(drawn.token_ids, drawn.stopped, *times, drawn.logprobs, drawn.invalid)


class StagesDisagree(InputError):
    """Two stages have decided differently: from here on their KV would belong to different requests."""

    def __init__(self, stage: int, step: int, mine: Decision | None, theirs: Decision | None) -> None:
        self.stage, self.step, self.mine, self.theirs = stage, step, mine, theirs
        super().__init__(
            f"stage {stage} of the pipeline decides otherwise than stage {stage - 1} at step {step:,}: "
            f"{_told(mine)}; stage {stage - 1}: {_told(theirs)}",
            where="engine",
            remedy="a policy or a batching strategy of your own must decide the same on every stage: from its "
            "arguments alone, without a clock, a random number or state that stages share",
        )


def _told(decision: Decision | None) -> str:
    """In words, cut where it is long."""
    if decision is None:
        return "nothing to run"
    parts = {"prefills": decision.prefills, "decodes": decision.decodes, "retracted": decision.retracted}
    lists = [f"{name} {str(values)[:80]}" for name, values in (parts | {"pages": decision.pages}).items() if values]
    evicted = f", evicted {decision.evicted_tokens} tokens" if decision.evicted_tokens else ""
    return f"{decision.mode.name.lower()} of {', '.join(lists)}{evicted}"
