"""A small world: one scheduler, one loop, one modelled device, jobs with known answers, messages at chosen iterations.

Every run here proves, besides the scheduler's own invariants at every step, what a user may count on: each request ends
once with exactly its tokens, work adds up, nothing is left behind, and no device idles beside a request that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from testbed.batch import Batch, StepResult
from testbed.costs import HostProfile, constant_host, load_host
from testbed.costs.model import ConstantCostModel
from testbed.loops.base import LoopContext
from testbed.loops.overlap_thread import event_loop_overlap_thread
from testbed.loops.select import EventLoop, find_loop
from testbed.messages import ControlOutput, GenerateRequest, GrammarSpec, Message, Prompt, RequestOutput, Segment
from testbed.metrics import laws
from testbed.metrics.recorder import Recorder
from testbed.metrics.records import Records
from testbed.request import NEVER, Request
from testbed.runtime import virtual, wall, wall_threads
from testbed.runtime.leap import Leaper
from testbed.runtime.oracle import Oracle
from testbed.runtime.paced import PacedDevice
from testbed.runtime.traffic import Traffic
from testbed.runtime.users import WorkloadUsers
from testbed.runtime.world import World
from testbed.scenario.schema import ConstantDevice, EngineConfig
from testbed.scheduler.batching import BatchingStrategy
from testbed.scheduler.policies import Policy
from testbed.scheduler.scheduler import Checks, Scheduler
from testbed.tokens import oracle_key, stream_key, token_ids
from testbed.workload.base import TimedRequest
from tests.sglang_steps.case import SGLANG_RULES

VOCABULARY = 50_021
DEVICE = ConstantDevice(prefill_ns=7_000, decode_ns=3_000, prefill_token_ns=11, decode_row_ns=5)


class Job(NamedTuple):
    """A request whose answer is known: ``prompt`` is (stream, tokens) parts, ``outputs`` its true length."""

    rid: str
    prompt: tuple[tuple[str, int], ...] = (("p", 8),)
    outputs: int = 4
    max_new_tokens: int | None = None
    """None: exactly ``outputs``, as a client that ignores EOS sends."""
    arrival_ns: int = 0
    iteration: int = -1
    priority: int | None = None
    extra_key: str = ""
    grammar: GrammarSpec | None = None

    @property
    def prompt_tokens(self) -> int:
        return sum(count for _, count in self.prompt)

    def timed(self) -> TimedRequest:
        limit = self.outputs if self.max_new_tokens is None else self.max_new_tokens
        prompt = Prompt([Segment(stream_key("prompt", name), 0, count) for name, count in self.prompt])
        heeds_none = limit == self.outputs
        message = GenerateRequest(
            self.rid, prompt, limit, heeds_none, self.priority, self.extra_key, grammar=self.grammar
        )
        return TimedRequest(self.arrival_ns, message, self.outputs, iteration=self.iteration)


def engine(sglang: bool = False, **fields: Any) -> EngineConfig:
    """An engine's config; ``sglang``: with the rules that its recorded steps were made with."""
    if sglang:
        fields = {"rules": SGLANG_RULES, "retract_to": "back", **fields}
    return EngineConfig(**{"max_running_requests": 8, **fields})


class Jobs:
    """A workload of jobs; ``answer`` may send more when one ends."""

    def __init__(self, jobs: Sequence[Job], answer: Callable[[str, int], Sequence[Job]] | None = None) -> None:
        self.jobs = list(jobs)
        self.sent = list(jobs)
        self._answer = answer

    def start(self) -> Iterator[TimedRequest]:
        tied = sorted((job for job in self.jobs if job.iteration >= 0), key=lambda job: job.iteration)
        free = sorted((job for job in self.jobs if job.iteration < 0), key=lambda job: job.arrival_ns)
        return iter([job.timed() for job in [*tied, *free]])

    def on_finish(self, rid: str, now_ns: int, output_ids: NDArray[np.int32]) -> Sequence[TimedRequest]:
        more = list(self._answer(rid, now_ns)) if self._answer else []
        self.sent.extend(more)
        return [job._replace(arrival_ns=max(job.arrival_ns, now_ns)).timed() for job in more]

    def expected_requests(self) -> int | None:
        return None

    def notes(self) -> list[str]:
        return []


Script = Mapping[int, Sequence[Message]]
"""Messages by the iteration of the loop that they reach first (before the requests of that iteration)."""


class Watched:
    """What both runtimes add here: messages by iteration, everything that is sent, and a look at each iteration."""

    scheduler: Scheduler
    traffic: Traffic
    script: dict[int, Sequence[Message]]
    watch: Callable[[Watched, bool, bool], None]
    outputs: list[RequestOutput]
    controls: list[ControlOutput]
    iterations: int

    def prepare(self, scheduler: Scheduler, script: Script, watch: Callable[[Watched, bool, bool], None]) -> None:
        self.scheduler, self.script, self.watch = scheduler, dict(script), watch
        self.outputs, self.controls = [], []
        self.iterations = 0

    async def recv(self, block: bool) -> tuple[int, list[Message]]:
        early = self.script.pop(self.iterations, ())
        self.iterations += 1
        self.watch(self, block, bool(early))
        now_ns, messages = await super().recv(block and not early)  # type: ignore[misc]
        journal = self.scheduler.recorder.journal  # has the others of this iteration at its end
        place = len(journal.arrivals) - len(messages)
        journal.arrivals[place:place] = [(len(journal.stamps) - 1, message) for message in early]
        return now_ns, [*early, *messages]

    def send(self, output: RequestOutput | ControlOutput) -> None:
        if isinstance(output, ControlOutput):
            self.controls.append(output)
        else:
            self.outputs.append(output)
        super().send(output)  # type: ignore[misc]


class WatchedVirtual(Watched, virtual.VirtualRuntime):
    pass


class WatchedThreads(Watched, wall_threads.ThreadedWallRuntime):
    pass


class WatchedWall(Watched, wall.WallRuntime):
    pass


DeviceOf = Callable[[wall.WallClock, Oracle, Scheduler], wall.Device]
"""Makes the device of a run on the wall clock."""


class Moment(NamedTuple):
    """The begin of an iteration."""

    steps: int
    """Launches so far."""
    in_flight: int
    open: int
    """Requests sent and not ended."""
    states: dict[str, str]
    """Where each request is."""


def state_of(scheduler: Scheduler, request: Request) -> str:
    if request.slot == NEVER:
        return "retracted" if request.retractions else "waiting"
    if request is scheduler.chunked:
        return "chunked"
    if request.pending_prefills:
        return "prefill in flight"
    if scheduler.in_flight and request.in_running:
        return "decode in flight"
    return "running" if request.in_running else "prefilled"


@dataclass
class Outcome:
    """What a run left behind."""

    jobs: list[Job]
    outputs: dict[str, RequestOutput]
    sent: list[RequestOutput]
    controls: list[ControlOutput]
    records: Records
    scheduler: Scheduler
    batches: list[tuple[Batch, StepResult]]
    iterations: int
    seed: int
    first_tokens: int = 0
    """Tokens that came from the last chunk of a prefill."""
    requests: dict[int, Request] = field(default_factory=dict)
    """Every request that was scheduled, by rank."""
    moments: list[Moment] = field(default_factory=list)
    """How things stood when each iteration began."""

    def streams(self) -> dict[str, list[int]]:
        return {rid: output.output_ids.tolist() for rid, output in self.outputs.items()}

    def column(self, name: str) -> NDArray[np.int64]:
        return self.records.requests[name]  # type: ignore[return-value]

    def makespan_ns(self) -> int:
        return int(self.column("finish_ns").max())


class Idle(AssertionError):
    """The device idles, nothing is in flight, and a request waits that could run."""


def live(runtime: Watched, block: bool, early: bool) -> None:
    """Under our own rules nothing can wait while nothing is in flight and nothing more can be decided."""
    scheduler = runtime.scheduler
    if block and not early and (scheduler.waiting or scheduler.chunked or scheduler.failed):
        raise Idle(f"{len(scheduler.waiting)} requests wait (chunked: {scheduler.chunked is not None}), nothing runs")


def run(
    config: EngineConfig,
    jobs: Sequence[Job],
    *,
    kv_tokens: int = 4096,
    context_length: int = 100_000,
    device: ConstantDevice = DEVICE,
    host: HostProfile | str | int = "none",
    script: Script | None = None,
    answer: Callable[[str, int], Sequence[Job]] | None = None,
    loop: EventLoop | None = None,
    policy: Policy | None = None,
    strategy: BatchingStrategy | None = None,
    paced: bool = False,
    inject: HostProfile | None = None,
    checks: Checks = "full",
    prove: bool = True,
    seed: int = 0,
    key_of: Callable[[str], int] | None = None,
    before: Callable[[Scheduler, Any], None] | None = None,
    leap: bool = False,
    device_of: DeviceOf | None = None,
) -> Outcome:
    """Run ``jobs`` to the end; ``prove``: and hold the outcome to everything that ``proven`` lists."""
    recorder = Recorder()
    scheduler = Scheduler(
        config,
        kv_tokens=kv_tokens,
        context_length=context_length,
        vocab_size=VOCABULARY,
        seed=seed,
        policy=policy,
        strategy=strategy,
        recorder=recorder,
        checks=checks,
    )
    workload = Jobs(jobs, answer)
    oracle = Oracle(seed, VOCABULARY, scheduler.memory.slots.count, key_of)
    moments: list[Moment] = []

    def watch(runtime: Watched, block: bool, early: bool) -> None:
        states = {rid: state_of(scheduler, request) for rid, request in scheduler.requests.items()}
        moments.append(Moment(scheduler.steps, len(scheduler.in_flight), runtime.traffic.open, states))
        if not config.rules.can_stall and strategy is None:
            live(runtime, block, early)

    batches: list[tuple[Batch, StepResult]] = []
    process = scheduler.process_batch_result
    requests: dict[int, Request] = {}
    first_tokens: list[int] = []

    def processing(batch: Batch, result: StepResult) -> Any:
        batches.append((batch, result))
        pending = [p.request for p in batch.prefills if p.last and not p.request.sampled and p.request.max_new_tokens]
        requests.update((p.request.rank, p.request) for p in batch.prefills)
        ended = process(batch, result)
        first_tokens.extend(request.rank for request in pending if request.sampled)
        return ended

    scheduler.process_batch_result = processing  # type: ignore[method-assign]
    loop = loop or find_loop(config.loop)[1]
    runtime: Any
    if paced or device_of:
        clock = wall.WallClock()
        modelled = PacedDevice(clock, ConstantCostModel(device), oracle)
        real = device_of(clock, oracle, scheduler) if device_of else modelled
        traffic = Traffic(workload, oracle)
        clients = wall.ScheduledClients(clock, traffic)
        watched = WatchedThreads if loop is event_loop_overlap_thread else WatchedWall
        runtime = watched(clock=clock, device=real, recorder=recorder, clients=clients, inject=inject)
        runtime.traffic = traffic
        runtime.prepare(scheduler, script or {}, watch)
        if before:
            before(scheduler, runtime)
        wall.run_to_the_end(loop(LoopContext(scheduler, runtime)))
    else:
        profile = constant_host(host) if isinstance(host, int) else load_host(host) if isinstance(host, str) else host
        time = World()
        users = WorkloadUsers(time, Traffic(workload, oracle))
        model = ConstantCostModel(device)
        runtime = WatchedVirtual(
            world=time, users=users, cost_model=model, recorder=recorder, oracle=oracle, host=profile
        )
        runtime.traffic = users.traffic
        if leap:
            runtime.leap = Leaper(scheduler, runtime).try_leap
        runtime.prepare(scheduler, script or {}, watch)
        if before:
            before(scheduler, runtime)
        virtual.run_to_the_end(loop(LoopContext(scheduler, runtime)), runtime, users)
    scheduler.on_idle()
    records = recorder.records(runtime.traffic.sent, scheduler.decision_log.bytes())
    outcome = Outcome(
        jobs=workload.sent,
        outputs={output.rid: output for output in runtime.outputs},
        sent=runtime.outputs,
        controls=runtime.controls,
        records=records,
        scheduler=scheduler,
        batches=batches,
        iterations=runtime.iterations,
        seed=seed,
        first_tokens=len(first_tokens),
        requests=requests,
        moments=moments,
    )
    if prove:
        proven(outcome, key_of)
    return outcome


# -- what every run must satisfy --------------------------------------------------------------------------------


def proven(outcome: Outcome, key_of: Callable[[str], int] | None = None) -> None:
    """Hold an outcome to the laws that no configuration may break."""
    ended_once(outcome)
    right_tokens(outcome, key_of)
    drained(outcome.scheduler)
    times_add_up(outcome)
    work_adds_up(outcome)


def ended_once(outcome: Outcome) -> None:
    """Every request that was sent ends exactly once."""
    assert sorted(output.rid for output in outcome.sent) == sorted(job.rid for job in outcome.jobs)


def right_tokens(outcome: Outcome, key_of: Callable[[str], int] | None = None) -> None:
    """The oracle's tokens, in order, as many as the request's end says; one time stamp for each."""
    offsets = outcome.records.token_offsets
    at = {rid: i for i, rid in enumerate(outcome.records.requests["id"])}
    room = outcome.scheduler.max_request_tokens
    for job in outcome.jobs:
        output = outcome.outputs[job.rid]
        key = key_of(job.rid) if key_of else oracle_key(outcome.seed, job.rid)
        expected = token_ids(key, 0, len(output.output_ids), VOCABULARY)
        assert np.array_equal(output.output_ids, expected), f"{job.rid}: foreign tokens"
        assert output.prompt_tokens == job.prompt_tokens
        row = at[job.rid]
        times = outcome.records.token_times_ns[offsets[row] : offsets[row + 1]]
        assert len(times) == len(output.output_ids) == outcome.column("output_tokens")[row], f"{job.rid}: token times"
        assert (np.diff(times) >= 0).all()
        if output.status != 200:
            assert output.message
            continue
        limit = min(job.outputs if job.max_new_tokens is None else job.max_new_tokens, room - job.prompt_tokens - 1)
        assert len(output.output_ids) == min(job.outputs, limit), f"{job.rid}: {len(output.output_ids)} tokens"
        assert output.finish_reason == ("length" if len(output.output_ids) == limit else "stop")
        assert 0 <= output.cached_tokens < job.prompt_tokens
        assert output.cached_tokens % outcome.scheduler.config.page_size == 0


def drained(scheduler: Scheduler) -> None:
    """Nothing is left: queues, pages, slots, locks."""
    memory = scheduler.memory
    assert scheduler.idle and len(scheduler.running) == scheduler.running.finished_rows, "not drained"
    cached = memory.cache.evictable_tokens // memory.page_size
    assert memory.allocator.free_pages + cached == memory.allocator.num_pages, "not drained: pages"
    assert memory.cache.protected_tokens == memory.owned_pages == memory.allocator.quarantined_pages == 0, "not drained"
    assert memory.slots.available == memory.slots.count, "not drained: slots"
    scheduler.invariants.full()


def times_add_up(outcome: Outcome) -> None:
    """Little's law, timing closure and utilisation to the nanosecond; no part of a life is negative."""
    assert laws.violations(outcome.records) == []
    ended = outcome.column("finish_ns") >= 0
    for part in laws.TIME_PARTS:
        assert (outcome.column(part)[ended] >= 0).all(), part


def work_adds_up(outcome: Outcome) -> None:
    """Every token that was computed was sent, or is counted as extra; every uncached prompt token was computed once, or
    again after a retraction."""
    sent = sum(len(output.output_ids) for output in outcome.sent)
    decoded = int(outcome.records.steps["decode_rows"].sum() - outcome.records.steps["extra_rows"].sum())  # type: ignore[union-attr]
    assert decoded + outcome.first_tokens == sent, "work does not add up"


def burst(count: int, prompt: int = 8, outputs: int = 4, **fields: Any) -> list[Job]:
    """``count`` requests at once, their prompts their own."""
    return [Job(f"r{i}", ((f"p{i}", prompt),), outputs, **fields) for i in range(count)]


def numbered(jobs: Iterable[Job]) -> list[Job]:
    """The same jobs under fresh names."""
    return [job._replace(rid=f"r{i}") for i, job in enumerate(jobs)]
