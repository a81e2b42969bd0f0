"""The pipeline loops: every stage takes the same decisions by itself, for P micro-batches in turn (specification A.3).

A *slot* is one turn of one micro-batch. Stage s is one slot or more behind stage s - 1, from which it has what arrived
and when, and on what its device computes. Tokens exist on the last stage only: they go round the ring to the first one
and down, so the result of a micro-batch is applied by everybody right before its own next turn: P - 1 slots late in
time, never a step late.

What one stage sends to the next, in every slot, in this order (the other loop in brackets)::

    [tokens of an earlier slot]   stamp and messages   decision and activations   (tokens of an earlier slot)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from testbed.batch import Batch, StepResult
from testbed.loops.base import LoopContext
from testbed.messages import Message
from testbed.ports import Inbox, Neighbours, Pending
from testbed.scenario.errors import InputError
from testbed.scheduler.decisions import HEADER, Decision, decision_at


async def event_loop_pipeline(loop: LoopContext) -> None:
    """Blocking, as SGLang 0.5.1: what a device makes is waited for, then sent; a stage behind the first waits for it
    before it launches."""
    stage = PipelineStage(loop)
    carried: StepResult | None = None
    while True:
        for m in range(stage.stages):
            await stage.recv_requests(stage.nothing_to_do())
            batch = stage.get_next_batch_to_run()
            activations = await stage.recv_activations()
            launched = stage.slots[m] = await stage.launch(batch, activations) if batch else None
            if stage.is_last and launched:
                stage.send(await launched.done())
            received = None
            if following := stage.turn_to((m + 1) % stage.stages):
                received = await stage.recv_tokens(following)
                await stage.process_batch_result(following.batch, following)
            if not stage.is_last:
                if carried:
                    stage.send(carried)
                stage.send_requests()
                if launched:
                    await launched.done()
                stage.send_activations(launched)
            carried = received
        if not any(stage.slots):
            stage.self_check_during_idle()


async def event_loop_pipeline_async(loop: LoopContext) -> None:
    """As SGLang since December 2025: everything is sent as soon as it is there, activations before they are computed,
    so that a stage's device finds its next step launched; the last stage launches before it waits for the tokens of
    the slot before."""
    stage = PipelineStage(loop)
    while True:
        for m in range(stage.stages):
            await stage.recv_requests(stage.nothing_to_do())
            if not stage.is_last:
                stage.send_requests()
            batch = stage.get_next_batch_to_run()
            activations = await stage.recv_activations()
            before = stage.slots[m - 1]
            launched = stage.slots[m] = await stage.launch(batch, activations) if batch else None
            if not stage.is_last:
                stage.send_activations(launched)
            elif before:
                stage.send(await before.done())
            if following := stage.turn_to((m + 1) % stage.stages):
                received = await stage.recv_tokens(following)
                if not stage.is_last:
                    stage.send(received)
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
        self.stages = self.neighbours.stages
        self.is_first = self.neighbours.stage == 0
        self.is_last = self.neighbours.stage == self.stages - 1
        self.inbox = self._arrivals = StageInbox(loop.inbox, self.neighbours)
        self.slots: list[Launched | None] = [None] * self.stages
        """What each micro-batch launched at its last turn."""
        self._decided = b""
        self._logged = len(HEADER)
        self.scheduler.recorder.keeps_requests = self.is_first

    def nothing_to_do(self) -> bool:
        """Whether only a message can bring something to do: then every stage has applied every result, because each
        has an empty turn of all micro-batches behind it."""
        return not (self.scheduler.can_build_batch or self.scheduler.in_flight)

    def turn_to(self, m: int) -> Launched | None:
        """From here on it is micro-batch ``m``: the result of its last turn, and its next. Returns what is launched."""
        self.scheduler.select_micro_batch(m)
        return self.slots[m]

    async def launch(self, batch: Batch, after: object) -> Launched:
        """Launch behind the activations of the stage before."""
        if self.scheduler.forward_sleep_ns:
            await self.cpu.sleep(self.scheduler.forward_sleep_ns)
        masked = batch.has_grammar and self.is_last
        launched = Launched(batch, self.executor.launch(batch, masked, after))
        if masked:
            launched.sample(self.grammars.masks(batch))
        return launched

    # -- the ring -----------------------------------------------------------------------------------------------------

    def send(self, item: object) -> None:
        """To the next stage."""
        self.neighbours.next.send(item)

    def send_requests(self) -> None:
        """Hand on the stamp and the messages of this slot."""
        self.send(self._arrivals.taken)

    def send_activations(self, launched: Launched | None) -> None:
        """Hand on what was decided in this slot, and what the next stage computes on."""
        self.send((self._decided, launched.activations() if launched else None))

    async def recv_activations(self) -> object:
        """What the stage before hands on of this slot; None at the first. Raises StagesDisagree when it has decided
        otherwise."""
        log = self.scheduler.decision_log
        self._decided = log.tail(self._logged)
        self._logged += len(self._decided)
        if self.is_first:
            return None
        theirs, activations = await self.neighbours.previous.recv()
        if theirs != self._decided:
            step = self.scheduler.steps - bool(self._decided)
            before = log.bytes()[: self._logged - len(self._decided)]
            decisions = [decision_at(before + part, step) for part in (self._decided, theirs)]
            raise StagesDisagree(self.neighbours.stage, step, *decisions)
        return activations

    async def recv_tokens(self, launched: Launched) -> StepResult:
        """What the last stage has drawn for ``launched``."""
        launched.drawn = await self.neighbours.previous.recv()
        return launched.drawn


class StageInbox:
    """What wakes a stage: the first one's own inbox; behind it, what the stage before took from its."""

    def __init__(self, inbox: Inbox, ring: Neighbours) -> None:
        self._inbox = inbox
        self._ring = ring
        self.taken: tuple[int, list[Message]] = (0, [])

    async def recv(self, block: bool) -> tuple[int, list[Message]]:
        """See ports.Inbox. The stamp is the first stage's."""
        self.taken = await (self._ring.previous.recv() if self._ring.stage else self._inbox.recv(block))
        return self.taken

    def post_at(self, when_ns: int, message: Message) -> None:
        """See ports.Inbox: the first stage's timers wake all."""
        if self._ring.stage == 0:
            self._inbox.post_at(when_ns, message)


class Launched:
    """A batch on this stage's device: its times are made here, its tokens on the last stage."""

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
        own, drawn = await self.done(), self.drawn
        assert drawn is not None, "tokens are received before they are applied"
        return own._replace(
            token_ids=drawn.token_ids, stopped=drawn.stopped, logprobs=drawn.logprobs, invalid=drawn.invalid
        )


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
