"""A pipeline of stages in virtual time: the small world of ``tests.properties``, with a scheduler, a loop and a device
for each stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from testbed.batch import Batch, StepResult
from testbed.costs import constant_host, load_host
from testbed.costs.model import ConstantCostModel
from testbed.loops.base import LoopContext
from testbed.loops.pipeline import event_loop_pipeline, event_loop_pipeline_async
from testbed.loops.select import EventLoop
from testbed.metrics.recorder import Recorder
from testbed.runtime.channels import connect_stages
from testbed.runtime.oracle import Oracle
from testbed.runtime.traffic import Traffic
from testbed.runtime.users import WorkloadUsers
from testbed.runtime.virtual import VirtualRuntime
from testbed.runtime.world import World
from testbed.scenario.schema import ConstantDevice, EngineConfig
from testbed.scheduler.scheduler import Checks, Scheduler
from tests.properties.world import (
    DEVICE,
    VOCABULARY,
    Job,
    Jobs,
    Moment,
    Outcome,
    Script,
    Watched,
    WatchedVirtual,
    drained,
    engine,
    live,
    proven,
    state_of,
)

PIPELINES: dict[str, EventLoop] = {"pipeline": event_loop_pipeline, "pipeline_async": event_loop_pipeline_async}
Steps = list[tuple[Batch, StepResult]]


def pipeline(stages: int, **fields: Any) -> EngineConfig:
    """The config of each stage."""
    return engine(**{"parallel": {"pp": stages}, **fields})


@dataclass
class Staged:
    """What a pipeline left behind; ``first`` is what its first stage, and so a user, has seen."""

    first: Outcome
    schedulers: list[Scheduler]
    steps: list[Steps]
    """Of each stage, in order of processing."""

    def logs(self) -> list[bytes]:
        return [scheduler.decision_log.bytes() for scheduler in self.schedulers]


def run_stages(
    config: EngineConfig,
    jobs: Sequence[Job],
    *,
    loop: EventLoop = event_loop_pipeline,
    kv_tokens: int = 4096,
    devices: Sequence[ConstantDevice] = (DEVICE,),
    host: str | int = "none",
    latency_ns: int = 0,
    activation_ns: int = 0,
    script: Script | None = None,
    checks: Checks = "full",
    before: Callable[[int, Scheduler], None] | None = None,
    prove: bool = True,
) -> Staged:
    """Run ``jobs`` to the end through ``config.parallel.pp`` stages. ``devices``: one a stage, the last one for the
    rest; ``before``: called with each stage and its scheduler; ``prove``: hold the outcome to what every run must
    satisfy, and every stage to the same decisions."""
    world, workload = World(), Jobs(jobs)
    profile = constant_host(host) if isinstance(host, int) else load_host(host)
    schedulers = [
        Scheduler(
            config,
            kv_tokens=kv_tokens,
            context_length=100_000,
            vocab_size=VOCABULARY,
            recorder=Recorder(stage),
            checks=checks,
        )
        for stage in range(config.parallel.pp)
    ]
    oracle = Oracle(0, VOCABULARY, schedulers[0].memory.slots.count)
    users = WorkloadUsers(world, Traffic(workload, oracle))
    runtimes = []
    for stage, scheduler in enumerate(schedulers):
        runtime = (VirtualRuntime if stage else WatchedVirtual)(
            world=world,
            users=None if stage else users,
            cost_model=ConstantCostModel(devices[min(stage, len(devices) - 1)]),
            host=profile,
            recorder=scheduler.recorder,
            oracle=oracle if scheduler is schedulers[-1] else None,
            activation_ns=lambda tokens: activation_ns,
        )
        runtimes.append(runtime)
    connect_stages(runtimes, latency_ns)
    front: Any = runtimes[0]
    front.traffic = users.traffic
    moments: list[Moment] = []
    front.prepare(schedulers[0], script or {}, _watch(schedulers[0], moments, prove))
    watched = [_listen(scheduler) for scheduler in schedulers]
    users.submit = front.deliver
    for stage, (scheduler, runtime) in enumerate(zip(schedulers, runtimes, strict=True)):
        if before:
            before(stage, scheduler)
        world.start(f"stage {stage}", loop(LoopContext(scheduler, runtime)))
    users.start()
    world.run()
    for scheduler in schedulers:
        scheduler.on_idle()
    steps, firsts = watched[0]
    first = Outcome(
        jobs=workload.sent,
        outputs={output.rid: output for output in front.outputs},
        sent=front.outputs,
        controls=front.controls,
        records=schedulers[0].recorder.records(users.traffic.sent, schedulers[0].decision_log.bytes()),
        scheduler=schedulers[0],
        batches=steps,
        iterations=front.iterations,
        seed=0,
        first_tokens=len(firsts),
        moments=moments,
    )
    staged = Staged(first, schedulers, [steps for steps, _ in watched])
    if prove:
        proven(first)
        same_everywhere(staged)
    return staged


def _watch(scheduler: Scheduler, moments: list[Moment], prove: bool) -> Callable[[Watched, bool, bool], None]:
    def watch(runtime: Watched, block: bool, early: bool) -> None:
        states = {rid: state_of(scheduler, request) for rid, request in scheduler.requests.items()}
        moments.append(Moment(scheduler.steps, len(scheduler.in_flight), runtime.traffic.open, states))
        if prove and not scheduler.rules.can_stall:
            live(runtime, block, early)

    return watch


def _listen(scheduler: Scheduler) -> tuple[Steps, list[int]]:
    """What will be processed, and the ranks of those whose first token comes."""
    steps: Steps = []
    firsts: list[int] = []
    process = scheduler.process_batch_result

    def processing(batch: Batch, result: StepResult) -> Any:
        steps.append((batch, result))
        pending = [p.request for p in batch.prefills if p.last and not p.request.sampled and p.request.max_new_tokens]
        ended = process(batch, result)
        firsts.extend(request.rank for request in pending if request.sampled)
        return ended

    scheduler.process_batch_result = processing  # type: ignore[method-assign]
    return steps, firsts


def same_everywhere(staged: Staged) -> None:
    """Every stage has decided the same, applied every result, and told nobody but the first one."""
    first = staged.schedulers[0]
    for scheduler, steps in zip(staged.schedulers, staged.steps, strict=True):
        assert scheduler.decision_log.bytes() == first.decision_log.bytes(), "stages differ"
        assert len(steps) == first.steps and not scheduler.in_flight, "a stage has not applied every result"
        drained(scheduler)
        assert all(one.rows == 0 for one in scheduler.micro_batches), "not drained: a micro-batch"
        assert scheduler.new_token_ratio == first.new_token_ratio
