"""Pitfalls of pipelines (specification N 14, 30 to 36): what SGLang's versions got wrong, each switched on as a named
defect and found. 32 (a wrong process group) and the rest of 33 (a race of two streams) have nothing here that could
be wrong: a stage has one channel to its neighbour, in which whatever is sent arrives in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from testbed.batch import StepResult
from testbed.loops.pipeline import PipelineStage, StagesDisagree
from testbed.messages import AbortRequest
from testbed.metrics.recorder import Recorder
from testbed.runtime.channels import VirtualChannel
from testbed.runtime.modelled import Deadlock
from testbed.scheduler import invariants, retraction, scheduler
from testbed.scheduler.scheduler import Scheduler
from tests.loops.stages import PIPELINES, pipeline, run_stages
from tests.properties.test_mutants import around
from tests.properties.world import Job, burst

Patch = pytest.MonkeyPatch
LOOPS = pytest.mark.parametrize("loop", PIPELINES)


def long_prompts(loop: str, stages: int = 2, **fields: Any) -> None:
    """Chunks of long prompts travel through micro-batches that decode."""
    jobs = [Job(f"r{i}", ((f"p{i}", 150 + 31 * i),), 6 + i, iteration=5 * i) for i in range(4)]
    run_stages(pipeline(stages, chunked_prefill_size=64, **fields), jobs, loop=PIPELINES[loop])


def squeezed(loop: str, stages: int) -> None:
    """Micro-batches take memory from each other until only one request is left."""
    jobs = burst(6, prompt=20, outputs=60)
    config = pipeline(stages, clip_max_new_tokens=1)
    outcome = run_stages(config, jobs, loop=PIPELINES[loop], kv_tokens=90).first
    assert {output.status for output in outcome.outputs.values()} == {200}, "a request was given up"


def aborted(loop: str, stages: int) -> None:
    script = {at: [AbortRequest(f"r{at % 9}")] for at in range(7, 60, 4)}
    run_stages(pipeline(stages), burst(9, prompt=12, outputs=25), loop=PIPELINES[loop], script=script)


def battery() -> None:
    for loop in PIPELINES:
        for stages in (2, 3):
            long_prompts(loop, stages)
            squeezed(loop, stages)
            aborted(loop, stages)
        one_seat(loop)


def one_seat(loop: str) -> None:
    """23006: one request at a time, two stages, chunks of 64."""
    long_prompts(loop, max_running_requests=1)


# -- defects ----------------------------------------------------------------------------------------------------------


def n14_the_capacity_test_is_inverted(patch: Patch) -> None:
    """Somebody who is half computed goes on only where there is no seat (23006)."""

    def admit(original: Any, self: Scheduler, *args: Any, **fields: Any) -> Any:
        if self.chunked is not None and self._seats_in_micro_batch() > 0:
            return None
        return original(self, *args, **fields)

    around(patch, Scheduler, "new_prefill_batch", admit)


def n30_a_prompt_that_goes_on_elsewhere_is_merged(patch: Patch) -> None:
    """Whoever is not half computed now, whatever this micro-batch held of it."""

    def merge(original: Any, self: Scheduler, last: Any) -> None:
        now = [p._replace(last=p.request is not self.chunked and p.request.slot >= 0) for p in last.prefills]
        last.prefills = now
        original(self, last)

    around(patch, Scheduler, "_merge_last_batch", merge)


def n31_there_is_always_a_last_batch(patch: Patch) -> None:
    """While a prompt is half computed (13144)."""

    def decide(original: Any, self: Scheduler, now_ns: int) -> Any:
        if self.chunked is not None:
            assert self.last_batch.mode, "the chunk was in it"  # type: ignore[union-attr]
        return original(self, now_ns)

    around(patch, Scheduler, "get_next_batch_to_run", decide)


def n33_tokens_overtake(patch: Patch) -> None:
    """What arrives together is taken last come, first served (20341)."""

    async def recv(original: Any, self: VirtualChannel) -> Any:
        if len(self._items) > 1:
            self._items[0], self._items[-1] = self._items[-1], self._items[0]
        return await original(self)

    around(patch, VirtualChannel, "recv", recv)


def n34_a_share_of_nothing(patch: Patch) -> None:
    """1 // 2 requests for each micro-batch (23799)."""
    for module in (scheduler, invariants):
        patch.setattr(module, "seats_of", lambda requests, micro_batches: requests // micro_batches)


def n35_an_abort_sees_the_current_micro_batch(patch: Patch) -> None:
    around(patch, Scheduler, "running_of", lambda original, self, request: self.running)


def n36_a_stage_cuts_prompts_otherwise(patch: Patch) -> None:
    def prepare(original: Any, self: PipelineStage, loop: Any) -> None:
        original(self, loop)
        self.scheduler.chunk_size = 64 + 16 * self.is_last

    around(patch, PipelineStage, "__init__", prepare)


def the_last_request_is_given_up(patch: Patch) -> None:
    """Although others hold the memory, and will end."""
    patch.setattr(retraction, "_the_last_goes", lambda scheduler, wanted: False)


def all_micro_batches_count_the_same_steps(patch: Patch) -> None:
    around(patch, Recorder, "timeline", lambda original, self, micro_batch: self.advance_times)


def extra_rows_of_others_are_counted(patch: Patch) -> None:
    patch.setattr(scheduler, "ADVANCES", 1 << 50)
    around(patch, Scheduler, "running_of", _by_membership)


def _by_membership(original: Any, self: Scheduler, request: Any) -> Any:
    return next((one.running for one in self.micro_batches if request in one.running.requests), self.running)


def tokens_are_not_handed_on(patch: Patch) -> None:
    """Behind the second stage nobody hears of them."""

    def send(original: Any, self: VirtualChannel, item: Any) -> None:
        if self._sender.oracle is not None or not isinstance(item, StepResult):
            original(self, item)

    around(patch, VirtualChannel, "send", send)


MUTANTS: list[tuple[Callable[[Patch], None], str]] = [
    (n14_the_capacity_test_is_inverted, "nothing runs"),
    (n30_a_prompt_that_goes_on_elsewhere_is_merged, "pages are not partitioned"),
    (n31_there_is_always_a_last_batch, "NoneType"),
    (n33_tokens_overtake, "Error"),
    (n34_a_share_of_nothing, "nothing runs"),
    (n35_an_abort_sees_the_current_micro_batch, "pages are not partitioned"),
    (n36_a_stage_cuts_prompts_otherwise, "stage 1 of the pipeline decides otherwise than stage 0 at step 0"),
    (the_last_request_is_given_up, "a request was given up"),
    (all_micro_batches_count_the_same_steps, "AssertionError"),
    (extra_rows_of_others_are_counted, "work does not add up"),
    (tokens_are_not_handed_on, "token_ids"),
]


@pytest.mark.parametrize(("break_it", "found_as"), MUTANTS, ids=[mutant.__name__ for mutant, _ in MUTANTS])
def test_a_defect_is_found(break_it: Callable[[Patch], None], found_as: str, monkeypatch: Patch) -> None:
    break_it(monkeypatch)
    with pytest.raises(Exception) as caught:
        battery()
    assert found_as in f"{type(caught.value).__name__}: {caught.value}"


def test_nothing_is_found_where_nothing_is_broken() -> None:
    battery()


@LOOPS
def test_34_the_deadlock_report_names_every_stage(loop: str, monkeypatch: Patch) -> None:
    n34_a_share_of_nothing(monkeypatch)
    config = pipeline(2, max_running_requests=1)
    with pytest.raises(Deadlock) as caught:
        run_stages(config, burst(3), loop=PIPELINES[loop], prove=False)
    report = str(caught.value)
    assert "3 requests are open" in report
    assert "stage 0 waits in" in report and "recv_requests" in report and "stage 1 waits in" in report


@LOOPS
def test_36_the_disagreement_says_what_each_stage_decided(loop: str, monkeypatch: Patch) -> None:
    n36_a_stage_cuts_prompts_otherwise(monkeypatch)
    with pytest.raises(StagesDisagree) as caught:
        long_prompts(loop, 3)
    error = caught.value
    assert (error.stage, error.step) == (2, 0)
    assert error.mine is not None and error.mine.prefills == [(0, 0, 80)]
    assert error.theirs is not None and error.theirs.prefills == [(0, 0, 64)]
