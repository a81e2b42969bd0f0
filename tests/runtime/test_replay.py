"""A recorded run goes through scheduler and loop again: the same decisions, records, tokens and ends in every world;
and a scheduler that was changed is found at the first step that differs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed import Run
from testbed.batch import Batch, BatchShape
from testbed.costs import load_host
from testbed.costs.model import ConstantCostModel
from testbed.deployment import build_loop, build_scheduler
from testbed.memory import PageAllocator
from testbed.messages import AbortRequest, Message
from testbed.ports import Stage
from testbed.runtime.replay import WORK_COLUMNS, Replayed, replay_loop
from testbed.scenario.schema import EngineConfig
from testbed.scheduler import retraction
from testbed.scheduler.decisions import first_difference, read_decisions
from testbed.scheduler.scheduler import Scheduler
from tests.properties.draws import World, worlds
from tests.properties.world import DEVICE, Job, Outcome, burst, engine, run
from tests.study.recorded import QUICK, as_run, everything

DRAWN = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def again(recorded: Run, **how: Any) -> tuple[Replayed, dict[str, list[int]], list[BatchShape]]:
    """The replay of a run, every request's tokens when it ended, and the shapes that the scheduler launched."""
    journal = recorded.records.journal
    assert journal is not None and journal.setting is not None
    config = EngineConfig(**recorded.scenario["engine"])
    scheduler = build_scheduler(config, journal.setting, checks="full")
    tokens: dict[str, list[int]] = {}
    shapes: list[BatchShape] = []
    output_of = scheduler.output_of
    decide = scheduler.get_next_batch_to_run

    def noted(request: Any) -> Any:
        output = output_of(request)
        if output.status != 400:
            tokens[request.rid] = output.output_ids.tolist()
        return output

    def deciding(now_ns: int) -> Batch | None:
        batch = decide(now_ns)
        if batch is not None:
            shapes.append(batch.shape)
        return batch

    scheduler.output_of = noted  # type: ignore[method-assign,assignment]
    scheduler.get_next_batch_to_run = deciding  # type: ignore[method-assign]
    return replay_loop(build_loop(config)[1], scheduler, journal, recorded.records, **how), tokens, shapes


def holds(outcome: Outcome, recorded: Run) -> None:
    found, tokens, shapes = again(recorded)
    assert found.divergence is None, found.last.explain()
    assert found.equal and found.records.decisions == recorded.records.decisions
    assert found.shapes == shapes
    if "leaps" not in recorded.records.counters:
        assert shapes == [batch.shape for batch, _ in outcome.batches]
    assert tokens == outcome.streams()
    for name, column in recorded.records.requests.items():
        assert list(found.records.requests[name]) == list(column), name


@DRAWN
@given(worlds(), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)), max_size=4), st.booleans())
def test_every_drawn_world_comes_out_again(world: World, aborts: list[tuple[int, int]], leap: bool) -> None:
    script: dict[int, list[Message]] = {}
    for at, which in aborts:
        script.setdefault(at, []).append(AbortRequest(f"r{which}"))
    outcome = run(world.config, world.jobs, kv_tokens=world.kv_tokens, script=script, leap=leap, checks="delta")
    holds(outcome, as_run(outcome, world.kv_tokens))


@settings(DRAWN, max_examples=25)
@given(worlds(), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), max_size=4))
def test_on_the_wall_clock_too(world: World, aborts: list[tuple[int, int]]) -> None:
    script: dict[int, list[Message]] = {}
    for at, which in aborts:
        script.setdefault(at, []).append(AbortRequest(f"r{which}"))
    jobs = [job._replace(iteration=2 * i) for i, job in enumerate(world.jobs)]
    outcome = run(world.config, jobs, kv_tokens=world.kv_tokens, script=script, paced=True, device=QUICK)
    recorded = as_run(outcome, world.kv_tokens)
    holds(outcome, recorded)
    assert recorded.records.journal is not None and recorded.records.journal.keeps_tokens
    one_charge_a_span(recorded, again(recorded)[0])


def one_charge_a_span(recorded: Run, found: Replayed) -> None:
    """Row i of the work is the run's i-th host span: the same stage of the same step."""
    spans, lane = recorded.records.spans, np.asarray(recorded.records.spans["lane"])
    host = {name: np.asarray(spans[name])[lane == 0] for name in ("name", "step")}
    assert host["name"].tolist() == found.work["stage"].tolist()
    assert host["step"].tolist() == found.work["step"].tolist()


def test_the_work_is_what_virtual_time_was_charged_for() -> None:
    """Priced by the host's profile, each row is the length of its span in a simulated run."""
    host = load_host("sglang-0.5")
    jobs = [Job(f"r{i}", (("stem", 12), (f"own {i}", 9 + i)), 5 + i, arrival_ns=40_000 * i) for i in range(8)]
    outcome = run(engine(chunked_prefill_size=16, policy="lpm"), jobs, host=host, kv_tokens=300)
    found, _, _ = again(as_run(outcome, 300))
    rows = zip(*(found.work[name].tolist() for name in WORK_COLUMNS), strict=True)
    costs = [ConstantCostModel(DEVICE).price(shape) for shape in found.shapes]
    prices = [
        host.price(Stage(stage), *sizes)
        + (host.launch_ns(costs[step].kernels, costs[step].graph) if stage == Stage.LAUNCH else 0)
        for stage, step, *sizes in rows
    ]
    spans, lane = outcome.records.spans, np.asarray(outcome.records.spans["lane"])
    took = (np.asarray(spans["end_ns"]) - np.asarray(spans["begin_ns"]))[lane == 0]
    assert [price for price in prices if price] == took.tolist()


@pytest.mark.parametrize("until_step", [1, 7, 30])
def test_until_a_step(until_step: int) -> None:
    recorded = everything(loop="overlap")
    found, _, _ = again(recorded, until_step=until_step)
    assert found.divergence is None and found.equal and found.steps == until_step
    assert recorded.records.decisions.startswith(found.records.decisions)
    assert found.last.step == until_step - 1 and found.last.recorded == found.last.replayed is not None
    assert found.last.recorded_state == found.last.replayed_state
    assert found.verdict().startswith(f"the first {until_step} of {found.recorded_steps} steps")


# -- a scheduler that was changed ------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def another_decay(patch: Patch) -> None:
    original = Scheduler.__init__

    def init(self: Scheduler, *arguments: Any, **fields: Any) -> None:
        original(self, *arguments, **fields)
        self.ratio_decay *= 40

    patch.setattr(Scheduler, "__init__", init)


def another_start_of_the_ratio(patch: Patch) -> None:
    original = Scheduler.__init__

    def init(self: Scheduler, *arguments: Any, **fields: Any) -> None:
        original(self, *arguments, **fields)
        self.ratio_init = self.new_token_ratio = 1.0

    patch.setattr(Scheduler, "__init__", init)


def another_tie_break(patch: Patch) -> None:
    original = retraction._order
    patch.setattr(retraction, "_order", lambda scheduler: [(rows := original(scheduler))[0], *rows[:0:-1]])


def pages_from_the_other_end(patch: Patch) -> None:
    def alloc(self: PageAllocator, pages: int) -> Any:
        self.free_pages -= pages
        return self._stack[self.free_pages : self.free_pages + pages][::-1].copy()

    patch.setattr(PageAllocator, "alloc", alloc)


def last_come_first(patch: Patch) -> None:
    original = Scheduler._order_waiting

    def ordered(self: Scheduler) -> None:
        original(self)
        self.waiting.sort(key=lambda request: -request.rank)

    patch.setattr(Scheduler, "_order_waiting", ordered)


CHANGES = [another_decay, another_start_of_the_ratio, another_tie_break, pages_from_the_other_end, last_come_first]


def busy(config: EngineConfig) -> Outcome:
    """Retraction and a queue, arrivals tied to iterations: what one program does after the other can be compared."""
    jobs = [job._replace(iteration=i) for i, job in enumerate(burst(14, prompt=11, outputs=30))]
    return run(config, jobs, kv_tokens=150, prove=False)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_a_changed_scheduler_is_found_at_the_first_step_that_differs(
    change: Any, loop: str, monkeypatch: Patch
) -> None:
    """The right step is the first difference to a run that the changed program makes by itself."""
    config = engine(loop=loop, clip_max_new_tokens=12)
    before = busy(config)
    assert before.column("retractions").sum() > 0
    change(monkeypatch)
    after = busy(config)
    first = first_difference(before.records.decisions, after.records.decisions)
    assert first is not None, "the change changes nothing here"
    monkeypatch.undo()
    change(monkeypatch)
    found, _, _ = again(as_run(before, 150))
    assert found.divergence is not None and not found.equal
    assert (found.divergence.step, found.divergence.recorded, found.divergence.replayed) == first
    assert found.verdict() == f"DIVERGES at step {first[0]} of {len(before.batches)}"
    text = found.last.explain()
    assert text.startswith(f"step {first[0]}, at ") and "  <-" in text
    assert found.last.recorded_state != {} != found.last.replayed_state
    assert [found.divergence.recorded] == list(read_decisions(before.records.decisions))[first[0] : first[0] + 1]


def test_both_states_are_shown(monkeypatch: Patch) -> None:
    before = busy(engine(loop="normal", clip_max_new_tokens=12))
    another_tie_break(monkeypatch)
    found, _, _ = again(as_run(before, 150))
    text = found.last.explain()
    steps, step = before.records.steps, found.last.step
    for name in ("rows", "free_tokens", "waiting"):
        assert f"\n  {name:18}{int(steps[name][step]):>12,}{found.last.replayed_state[name]:>12,}" in text
    recorded, replayed = found.last.recorded, found.last.replayed
    assert recorded is not None and replayed is not None and recorded.retracted != replayed.retracted
    shown = [", ".join(map(str, decision.retracted)) or "none" for decision in (recorded, replayed)]
    assert f"\n    recorded: {shown[0]}\n    replayed: {shown[1]}\n" in text
    assert f"waiting in the replay: {', '.join(found.last.waiting)}" in text
