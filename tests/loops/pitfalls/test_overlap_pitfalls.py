"""What has gone wrong in overlapped loops, by its number in the specification (section N): each defect is switched on
and must be found, under every design of overlap; without it the same world runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from testbed.batch import Batch
from testbed.costs.model import ConstantCostModel
from testbed.engine.builder import InputBuilder
from testbed.engine.inputs import ARRAYS
from testbed.engine.kv_cache import TokenRelay
from testbed.loops.base import LoopContext
from testbed.loops.overlap_thread import ForwardThread
from testbed.messages import AbortRequest, FlushCache, GrammarReady, GrammarSpec
from testbed.request import NEVER
from testbed.runtime.paced import PacedDevice
from testbed.scheduler import retraction
from testbed.scheduler.running import RunningBatch
from testbed.scheduler.scheduler import Scheduler
from testbed.tokens import oracle_key, token_ids
from tests.properties.draws import DESIGNS
from tests.properties.test_mutants import around, late_results_count_for_the_ended, without
from tests.properties.world import DEVICE, VOCABULARY, Job, Outcome, burst, engine, run

Patch = pytest.MonkeyPatch


class Pitfall(NamedTuple):
    number: int
    break_it: Callable[[Patch], None]
    world: Callable[[str], Any]
    """Runs a world under a loop, and holds it to what the defect breaks."""
    found_as: str
    """A part of what is reported."""


# -- 1: slots of tokens that are fed back come again too soon (sglang#13713, #13916) -----------------------------------


class Feedback:
    """The engine's token relay behind the modelled device: each row must be fed its request's last token."""

    def __init__(self, scheduler: Scheduler, runtime: Any) -> None:
        self.relay = TokenRelay(scheduler.memory.slots.count + 1, torch.device("cpu"))
        self.spare = scheduler.memory.slots.count
        self.launch_on = runtime.launch
        runtime.launch = self.launch

    def launch(self, batch: Batch, *how: Any) -> Any:
        if batch.decodes:
            fed = self.relay.take(tensor(batch.slots), tensor(batch.seq_lens - 1)).tolist()
            for request, length, token in zip(batch.decodes, batch.seq_lens.tolist(), fed, strict=True):
                index = length - 1 - request.prompt_tokens
                last = token_ids(oracle_key(0, request.rid), index, 1, VOCABULARY)[0]
                assert token == last, f"{request.rid} is fed a foreign token"
        pending = self.launch_on(batch, *how)
        slots = [p.request.slot if p.last else self.spare for p in batch.prefills] + batch.slots.tolist()
        lengths = [p.prefix_tokens + p.new_tokens for p in batch.prefills]
        lengths += batch.seq_lens.tolist() if batch.decodes else []
        self.relay.put(tensor(slots), tensor(lengths), tensor(pending.outcome.token_ids))
        return pending


def tensor(values: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.int32)


def long_prompts_between_decodes(loop: str) -> None:
    """Twenty chunks of the second prompt are launched between two steps of the first request."""
    jobs = [Job("r0", outputs=12, iteration=0), Job("r1", (("long", 320),), 5, iteration=3)]
    run(engine(loop=loop, max_running_requests=2, chunked_prefill_size=16), jobs, before=Feedback)


def a_ring_of_future_slots(patch: Patch) -> None:
    """Three places for each running request, dealt in turn: enough for prefills that are not cut."""
    ring, size, dealt = np.zeros(5 * 2, np.int32), 3 * 2, 0
    placeholders: dict[tuple[int, int], int] = {}

    def put(self: TokenRelay, slots: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> None:
        nonlocal dealt
        for row, token in zip(zip(slots.tolist(), positions.tolist(), strict=True), tokens.tolist(), strict=True):
            placeholders[row] = dealt
            ring[dealt] = token
            dealt = (dealt + 1) % size

    def take(self: TokenRelay, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows = zip(slots.tolist(), positions.tolist(), strict=True)
        return tensor([ring[placeholders[row]] for row in rows])

    patch.setattr(TokenRelay, "put", put)
    patch.setattr(TokenRelay, "take", take)


# -- 2: retracted while a result is pending (sglang#11970, #11981) -----------------------------------------------------


def pressed(loop: str) -> None:
    outcome = run(engine(loop=loop, clip_max_new_tokens=1), burst(6, prompt=15, outputs=30), kv_tokens=90)
    assert outcome.column("retractions").sum() > 0


def a_retracted_row_keeps_the_slot_of_its_pending_token(patch: Patch) -> None:
    original = retraction._retract

    def retract(scheduler: Any, request: Any) -> None:
        whole = scheduler.allocated_tokens
        scheduler.allocated_tokens = lambda request: whole(request) - len(scheduler.in_flight)
        original(scheduler, request)
        del scheduler.allocated_tokens

    patch.setattr(retraction, "_retract", retract)


# -- 3: the extra token of an ended request frees a page that it did not open (sglang#6888) ----------------------------


def pages_of_several_tokens(loop: str) -> None:
    for batching in ("prefill_first", "mixed_chunk"):
        jobs = [Job(f"r{i}", ((f"p{i}", 9 + i),), 3 + 2 * i) for i in range(6)]
        run(engine(loop=loop, batching=batching, page_size=16, chunked_prefill_size=16), jobs, kv_tokens=256)


def the_extra_token_frees_its_page(patch: Patch) -> None:
    def launch(original: Any, self: Scheduler, batch: Any) -> None:
        original(self, batch)
        places = (batch.seq_lens - 1) // 16 if batch.decodes else batch.slots
        batch.last_pages = self.memory.slots.pages[batch.slots, places].copy()

    def process(original: Any, self: Scheduler, batch: Any, result: Any, ended: Any) -> None:
        before = [request.finish_reason for request in batch.decodes]
        original(self, batch, result, ended)
        for row, reason in enumerate(before):
            if reason is not None:
                self.memory.allocator.free(batch.last_pages[row : row + 1])

    around(patch, Scheduler, "_launch", launch)
    around(patch, Scheduler, "_process_decodes", process)


# -- 4: aborted before it ran ------------------------------------------------------------------------------------------


def aborts_of_the_waiting(loop: str) -> None:
    script = {at: [AbortRequest(f"r{at}")] for at in range(3, 7)}
    outcome = run(engine(loop=loop, max_running_requests=2), burst(8, outputs=9), script=script)
    unborn = [output.rid for output in outcome.sent if output.finish_reason == "abort" and not len(output.output_ids)]
    ran = {p.request.rid for batch, _ in outcome.batches for p in batch.prefills}
    assert unborn and not ran & set(unborn)


def an_abort_of_the_waiting_frees_a_slot(patch: Patch) -> None:
    def abort(original: Any, self: Scheduler, rid: str) -> Any:
        request = self.requests.get(rid)
        if request is not None and request.slot == NEVER:
            row = self.running.requests[0].slot
            self.memory.allocator.free(self.memory.slots.pages[row, :1].copy())
        return original(self, rid)

    around(patch, Scheduler, "abort", abort)


# -- 6: what a delayed sampling needs is held for ever (sglang#20697) --------------------------------------------------


class CountedMasks:
    """Grammars that are ready at once, whose masks are counted while somebody holds them."""

    def __init__(self, scheduler: Scheduler, runtime: Any) -> None:
        self.runtime = runtime
        self.given: list[weakref.ref[NDArray[np.int32]]] = []
        runtime.grammars = self

    def compile(self, rank: int, spec: GrammarSpec) -> None:
        self.runtime.post_at(self.runtime.local_ns, GrammarReady(rank))

    def masks(self, batch: Batch) -> NDArray[np.int32]:
        masks = np.zeros((batch.rows, 1), np.int32)
        self.given.append(weakref.ref(masks))
        held = sum(reference() is not None for reference in self.given)
        assert held <= 3, f"{held} masks are held"
        return masks

    def accept(self, rank: int, token_id: int) -> None:
        pass

    def forget(self, rank: int) -> None:
        pass


def with_grammars(loop: str) -> None:
    jobs = [job._replace(grammar=GrammarSpec("json_object")) for job in burst(3, outputs=12)]
    run(engine(loop=loop), jobs, before=CountedMasks)


def masks_are_kept(patch: Patch) -> None:
    kept: list[Any] = []

    def sample(original: Any, self: LoopContext) -> None:
        if self.unsampled is not None:
            batch, pending = self.unsampled
            self.unsampled = None
            kept.append(self.grammars.masks(batch))
            pending.sample(kept[-1])

    around(patch, LoopContext, "_sample", sample)


# -- 9: flushed while a result is queued (sglang#12107) ----------------------------------------------------------------


def flushed_at_every_iteration(loop: str) -> None:
    jobs = [Job(f"r{i}", (("stem", 12), (f"own {i}", 3)), 4, iteration=3 * i) for i in range(6)]
    outcome = run(engine(loop=loop), jobs, script={at: [FlushCache()] for at in range(40)})
    answers = [output.success for output in outcome.controls]
    assert not any(flushed and moment.in_flight for flushed, moment in zip(answers, outcome.moments, strict=False)), (
        "flushed with a result in flight"
    )


def a_flush_does_not_look_at_results(patch: Patch) -> None:
    patch.setattr(Scheduler, "idle", property(lambda self: not (self.running.requests or self.waiting)))


# -- 10: the running batch grows in a snapshot that waits for its result -----------------------------------------------


def joins_at_every_step(loop: str) -> Outcome:
    return run(engine(loop=loop), [Job(f"r{i}", outputs=9, iteration=2 * i) for i in range(6)])


def merging_changes_the_snapshot(patch: Patch) -> None:
    def merge(original: Any, self: RunningBatch, requests: Any, front: bool = False) -> None:
        queued = self.requests
        original(self, requests, front)
        queued[:] = self.requests
        self.requests = queued

    around(patch, RunningBatch, "merge", merge)


# -- 12: the extra step counts -----------------------------------------------------------------------------------------


def the_extra_step_is_counted_as_output(patch: Patch) -> None:
    without(patch, Scheduler, "count_extra_rows")


PITFALLS = [
    Pitfall(1, a_ring_of_future_slots, long_prompts_between_decodes, "foreign token"),
    Pitfall(2, a_retracted_row_keeps_the_slot_of_its_pending_token, pressed, "not partitioned"),
    Pitfall(3, the_extra_token_frees_its_page, pages_of_several_tokens, "[pages]"),
    Pitfall(4, an_abort_of_the_waiting_frees_a_slot, aborts_of_the_waiting, "[pages]"),
    Pitfall(6, masks_are_kept, with_grammars, "masks are held"),
    Pitfall(9, a_flush_does_not_look_at_results, flushed_at_every_iteration, "[pages]"),
    Pitfall(10, merging_changes_the_snapshot, joins_at_every_step, "foreign tokens"),
    Pitfall(12, the_extra_step_is_counted_as_output, joins_at_every_step, "work does not add up"),
    Pitfall(12, late_results_count_for_the_ended, joins_at_every_step, "[ended_once]"),
]
NAMES = [f"N{pitfall.number}-{pitfall.break_it.__name__}" for pitfall in PITFALLS]


@pytest.mark.parametrize("loop", DESIGNS)
@pytest.mark.parametrize("pitfall", PITFALLS, ids=NAMES)
def test_a_defect_is_found(pitfall: Pitfall, loop: str, monkeypatch: Patch) -> None:
    pitfall.world(loop)
    pitfall.break_it(monkeypatch)
    with pytest.raises(Exception) as caught:
        pitfall.world(loop)
    assert pitfall.found_as in f"{type(caught.value).__name__}: {caught.value}"


# -- 5: a row is written while a launched step reads it (sglang#17850, #18744, #18803) ---------------------------------


class SlowToLaunch(PacedDevice):
    """Reads what a launch reads, a while after the batch was given to it: nothing of it may have changed."""

    def __init__(self, scheduler: Scheduler, *parts: Any) -> None:
        super().__init__(*parts)
        slots = scheduler.memory.slots
        self.given, self.read = (InputBuilder(slots, 1, slots.page_stride, 0) for _ in range(2))
        self.snapshots: dict[int, list[NDArray[np.int32]]] = {}
        launch = scheduler._launch

        def decided(batch: Batch) -> None:
            launch(batch)
            self.snapshots[batch.index] = self.given.build(batch).arrays()

        scheduler._launch = decided  # type: ignore[method-assign]

    def work(self, batch: Batch, *how: Any) -> Any:
        self.clock.wait_until(self.clock.now_ns() + 3_000_000)
        now = self.read.build(batch).arrays()
        for name, before, after in zip(ARRAYS, self.snapshots.pop(batch.index), now, strict=True):
            assert np.array_equal(before, after), f"{name} changed before the launch"
        return super().work(batch, *how)


def slow_launches(loop: str) -> None:
    jobs = [Job("aimed", (("p", 20),), 6, iteration=0), Job("other", (("q", 9),), 4, iteration=2), *burst(2)]

    def device(clock: Any, oracle: Any, scheduler: Scheduler) -> SlowToLaunch:
        return SlowToLaunch(scheduler, clock, ConstantCostModel(DEVICE), oracle)

    run(engine(loop=loop, chunked_prefill_size=8), jobs, script={1: [AbortRequest("aimed")]}, device_of=device)


@pytest.mark.parametrize("loop", DESIGNS)
def test_a_launch_reads_what_was_decided(loop: str) -> None:
    slow_launches(loop)


def test_a_loop_that_does_not_wait_for_the_launch_is_found(monkeypatch: Patch) -> None:
    """Only a design with a thread has something to wait for."""

    async def at_once(self: ForwardThread) -> None:
        pass

    monkeypatch.setattr(ForwardThread, "launched", at_once)
    with pytest.raises(AssertionError, match="changed before the launch"):
        slow_launches("overlap_thread")
