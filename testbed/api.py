"""What notebooks and the command line call: a scenario in, a run out.

from testbed import load_scenario, simulate
run = simulate("scenarios/default.yaml")
run.requests.ttft_ms.describe()
"""

from __future__ import annotations

import gc
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import testbed
from testbed.costs import (
    CostModel,
    DeviceProfile,
    HostProfile,
    build_cost_model,
    build_host_profile,
    kv_capacity_tokens,
    load_device,
    load_host,
)
from testbed.engine.builder import InputBuilder
from testbed.engine.device import Device, open_device, processor_name
from testbed.engine.models.config import load_decoder_config
from testbed.engine.options import DeviceInfo, EngineOptions
from testbed.loops.base import LoopContext
from testbed.loops.select import LOOPS, EventLoop, find_loop
from testbed.memory import OutOfPages
from testbed.metrics.journal import Setting
from testbed.metrics.recorder import Recorder
from testbed.metrics.run import Run
from testbed.runtime import virtual, wall
from testbed.runtime.leap import Leaper
from testbed.runtime.modelled import OutOfMemory
from testbed.runtime.oracle import Oracle
from testbed.runtime.paced import PacedDevice
from testbed.runtime.real import RealDevice
from testbed.runtime.traffic import Traffic
from testbed.scenario.errors import InputError
from testbed.scenario.load import load_scenario, resolve
from testbed.scenario.models import ModelSpec, load_model
from testbed.scenario.plugins import is_plugin, load_callable, load_coroutine, own_faults
from testbed.scenario.schema import EngineConfig, Scenario
from testbed.scheduler.invariants import InvariantError
from testbed.scheduler.scheduler import Checks, Scheduler
from testbed.workload import Workload, build_workload

Progress = Callable[[int, int, int, int, int | None], None]
"""Called now and then with (virtual or wall time in ns, requests ended, running, waiting, requests in all if known)."""
PROGRESS_EVERY_STEPS = 512
"""Of a simulation."""
PROGRESS_EVERY_NS = 500_000_000
"""Of a run on the wall clock."""
SOME_TOKENS = 1 << 20
"""A KV capacity to check a scenario with before a device says what it holds."""


@dataclass(slots=True)
class Engine:
    """Everything a scenario names, built: what both clocks need before the first message."""

    scenario: Scenario
    model: ModelSpec
    device: DeviceProfile | None
    """None for a device of constant times."""
    cost_model: CostModel
    host: HostProfile
    kv_tokens: int
    context_length: int
    loop_name: str
    loop: EventLoop
    scheduler: Scheduler
    recorder: Recorder
    workload: Workload
    oracle: Oracle


def build_engine(
    scenario: Scenario,
    *,
    checks: Checks = "delta",
    real: DeviceInfo | None = None,
    recorder: Recorder | None = None,
) -> Engine:
    """Build what ``scenario`` names. ``real``: the device that will run it; its memory counts, not that of the modelled
    one. ``recorder``: None: one that keeps everything. Raises InputError for anything that cannot run."""
    base_dir = Path.cwd()
    config = scenario.engine
    model = load_model(scenario.model)
    device = load_device(scenario.device) if isinstance(scenario.device, str) else None
    kv_tokens = real.kv_tokens if real else _kv_tokens(scenario, model, device)
    context_length = real.context_length if real else config.context_length or model.max_positions
    loop_name, loop = build_loop(config)
    setting = Setting(
        loop=loop_name,
        vocab_size=model.vocab,
        kv_tokens=kv_tokens,
        context_length=context_length,
        seed=scenario.seed,
    )
    scheduler = build_scheduler(config, setting, checks=checks, recorder=recorder)
    capacity_tokens = scheduler.memory.allocator.capacity_tokens
    workload = build_workload(
        scenario.workload,
        seed=scenario.seed,
        context_length=scheduler.max_prompt_tokens,
        bound_by="engine.kv_tokens" if capacity_tokens < context_length else "engine.context_length",
        vocab_size=model.vocab,
        base_dir=base_dir,
    )
    return Engine(
        scenario=scenario,
        model=model,
        device=device,
        cost_model=build_cost_model(scenario),
        host=build_host_profile(scenario),
        kv_tokens=capacity_tokens,
        context_length=context_length,
        loop_name=loop_name,
        loop=loop,
        scheduler=scheduler,
        recorder=scheduler.recorder,
        workload=workload,
        oracle=Oracle(scenario.seed, model.vocab, scheduler.memory.slots.count),
    )


def build_loop(config: EngineConfig) -> tuple[str, EventLoop]:
    """The event loop that ``config`` names, and its resolved name. Raises InputError when there is none."""
    if is_plugin(config.loop):
        return config.loop, load_coroutine(config.loop, Path.cwd(), where="engine.loop", takes=("loop",))
    return find_loop(config.loop, config.parallel.pp)


def build_scheduler(
    config: EngineConfig, setting: Setting, *, checks: Checks = "delta", recorder: Recorder | None = None
) -> Scheduler:
    """The scheduler of an engine. Its journal begins with ``setting``: what replaying needs beside the scenario."""
    recorder = recorder or Recorder()
    recorder.journal.setting = setting
    return Scheduler(
        config,
        kv_tokens=setting.kv_tokens,
        context_length=setting.context_length,
        vocab_size=setting.vocab_size,
        seed=setting.seed,
        policy=_own_policy(config.policy, Path.cwd()),
        strategy=_own_strategy(config.batching, Path.cwd()),
        recorder=recorder,
        checks=checks,
    )


def simulate(
    scenario: Scenario | str | os.PathLike[str] | Mapping[str, Any],
    *,
    seed: int | None = None,
    progress: Progress | None = None,
    checks: Checks = "delta",
    leap: bool = True,
) -> Run:
    """Run a scenario in virtual time.

    ``checks="full"`` proves every invariant at every step (slow: for small pools). ``leap=False`` takes decode steps
    one by one even where nothing happens between them; the records are the same to the byte. Raises InputError for a
    scenario that cannot run, Deadlock when a strategy leaves requests waiting for ever, InvariantError for a defect
    of the program.
    """
    engine = build_engine(_one(scenario, seed), checks=checks)
    runtime = virtual.VirtualRuntime(
        cost_model=engine.cost_model,
        host=engine.host,
        recorder=engine.recorder,
        oracle=engine.oracle,
        workload=engine.workload,
    )
    if leap and engine.loop in LOOPS.values() and engine.scheduler.strategy_is_ours:
        runtime.leap = Leaper(engine.scheduler, runtime).try_leap
    if progress is not None:
        _report_progress(engine, runtime.traffic, progress, lambda: engine.scheduler.steps, PROGRESS_EVERY_STEPS)
    with own_faults(), _memory_rules(engine), _rare_collections():
        virtual.run_to_the_end(engine.loop(LoopContext(engine.scheduler, runtime)), runtime)
    return _run(engine, runtime.traffic, "simulated")


def execute(
    scenario: Scenario | str | os.PathLike[str] | Mapping[str, Any],
    *,
    paced: bool = False,
    seed: int | None = None,
    progress: Progress | None = None,
    checks: Checks = "delta",
) -> Run:
    """Run a scenario on the executor that it names: this machine's device (CUDA, else the CPU); with ``paced``, here or
    there, the cost model taking its time for real; or in virtual time as ``simulate``. On the wall clock the loop runs
    in this thread, and the host is this machine, or what ``host_inject`` names where that is slower.

    Ctrl-C ends the run; what is returned then holds the records so far. Raises InputError for what cannot run,
    DeviceLost when the device stops answering.
    """
    chosen = _one(scenario, seed)
    if chosen.executor == "simulated" and not paced:
        return simulate(chosen, progress=progress, checks=checks)
    if paced or chosen.executor == "paced":
        engine = build_engine(chosen, checks=checks)
        return _execute(engine, lambda clock: PacedDevice(clock, engine.cost_model, engine.oracle), "paced", progress)
    with open_device(check_real(chosen)) as device:
        return execute_on(device, chosen, progress=progress, checks=checks)


def execute_on(
    device: Device, scenario: Scenario, *, progress: Progress | None = None, checks: Checks = "delta"
) -> Run:
    """As ``execute``, on a device that is open already: one that was opened with ``check_real(scenario)``, or with
    that of a scenario which differs in loop, batching, policy or workload only."""
    engine = build_engine(scenario, checks=checks, real=device.info)
    builder = InputBuilder(
        engine.scheduler.memory.slots, scenario.engine.page_size, device.info.table_width, scenario.seed
    )
    forced, priced = scenario.tokens == "oracle", engine.cost_model if scenario.host_inject else None

    def real(clock: wall.WallClock) -> RealDevice:
        return RealDevice(clock, device, builder, engine.oracle, forced=forced, cost_model=priced)

    return _execute(engine, real, "real", progress, device.info)


def _execute(
    engine: Engine,
    device_of: Callable[[wall.WallClock], wall.Device],
    label: str,
    progress: Progress | None,
    info: DeviceInfo | None = None,
) -> Run:
    """Drive the loop over a device until the workload has ended, or somebody interrupts it."""
    scenario, inject = engine.scenario, None
    if scenario.host_inject is not None:
        inject = load_host(scenario.host_inject, tp=scenario.engine.parallel.tp, where="host_inject")
    clock, traffic = wall.WallClock(), Traffic(engine.workload, engine.oracle)
    runtime = wall.WallRuntime(
        clock=clock,
        device=device_of(clock),
        recorder=engine.recorder,
        clients=wall.ScheduledClients(clock, traffic),
        inject=inject,
    )
    if progress is not None:
        _report_progress(engine, traffic, progress, clock.now_ns, PROGRESS_EVERY_NS)
    with own_faults(), _memory_rules(engine), wall.stops_on_interrupt(clock):
        wall.run_to_the_end(engine.loop(LoopContext(engine.scheduler, runtime)))
    return _run(engine, traffic, label, info, interrupted=clock.stopping)


def check_real(scenario: Scenario) -> EngineOptions:
    """What a device is started with to run ``scenario``, once all is refused that can be refused without a device: it
    may take minutes to load. Raises InputError."""
    options = engine_options(scenario)
    kv_tokens = min(scenario.engine.kv_tokens or SOME_TOKENS, SOME_TOKENS)
    build_engine(scenario.model_copy(update={"engine": scenario.engine.model_copy(update={"kv_tokens": kv_tokens})}))
    return options


def engine_options(scenario: Scenario) -> EngineOptions:
    """What a device is started with to run ``scenario``. Raises InputError for what the engine does not do."""
    config = scenario.engine
    parallel = config.parallel
    if max(parallel.tp, parallel.pp, parallel.dp, parallel.ep) > 1:
        remedy = "use parallel: {tp: 1, pp: 1, dp: 1, ep: 1}; testbed simulate prices more"
        raise InputError("the engine runs on one device", where="engine.parallel", remedy=remedy)
    if config.quantization != "none" or config.kv_dtype not in ("auto", config.dtype):
        where = "engine.quantization" if config.quantization != "none" else "engine.kv_dtype"
        raise InputError(
            "the engine computes in one dtype, without quantisation",
            where=where,
            remedy="use quantization: none and kv_dtype: auto; testbed simulate prices the others",
        )
    decoder = load_decoder_config(scenario.model)
    decoder.check_context(config.context_length or decoder.context_limit)
    return EngineOptions(
        model=scenario.model,
        dtype=config.dtype,
        page_size=config.page_size,
        max_running_requests=config.max_running_requests,
        seed=scenario.seed,
        kv_tokens=config.kv_tokens,
        context_length=config.context_length,
        mem_fraction=config.mem_fraction_static,
        chunk_tokens=config.max_prefill_tokens if config.chunked_prefill_size == -1 else config.chunked_prefill_size,
        attention=config.attention,
        cuda_graph=config.cuda_graph,
        cuda_graph_max_bs=config.cuda_graph_max_bs,
    )


def _one(scenario: Scenario | str | os.PathLike[str] | Mapping[str, Any], seed: int | None) -> Scenario:
    if isinstance(scenario, Scenario):
        chosen = scenario
    else:
        loaded = load_scenario(scenario)
        if loaded.variants:
            raise loaded.located(
                InputError(
                    "several variants are several runs",
                    where="compare",
                    remedy="run each: for name, one in load_scenario(...).variants.items(): simulate(one)",
                )
            )
        chosen = loaded.scenario
    return chosen if seed is None else chosen.model_copy(update={"seed": seed})


@contextmanager
def _rare_collections() -> Iterator[None]:
    """A simulation makes millions of small objects and hardly a cycle: at its usual rate the collector walks what lives
    again and again, for 4 % of the time."""
    thresholds = gc.get_threshold()
    if gc.isenabled():
        gc.set_threshold(100_000, 50, 1_000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


@contextmanager
def _memory_rules(engine: Engine) -> Iterator[None]:
    """SGLang's own rules can admit more than memory holds, and its engine dies of it: then that is the scenario's
    fault. Under our rules it would be a defect, and stays one."""
    try:
        yield
    except OutOfPages as error:
        if engine.scheduler.rules.can_stall:
            raise OutOfMemory(str(error)) from error
        raise


def _own_strategy(name: str, base_dir: Path) -> Any:
    """The user's own batching strategy, made: a class is called without arguments."""
    if not is_plugin(name):
        return None
    with own_faults():
        strategy = load_callable(name, base_dir, where="engine.batching")()
    if not callable(getattr(strategy, "next_batch", None)):
        remedy = "give it def next_batch(self, scheduler)"
        raise InputError(f"{name} has no method 'next_batch'", where="engine.batching", remedy=remedy)
    return strategy


def _own_policy(name: str, base_dir: Path) -> Any:
    """The user's own policy: a function that sorts the waiting list."""
    if not is_plugin(name):
        return None
    return load_callable(name, base_dir, where="engine.policy", takes=("waiting", "scheduler"))


def _kv_tokens(scenario: Scenario, model: ModelSpec, device: DeviceProfile | None) -> int:
    if device is not None:
        return kv_capacity_tokens(model, device, scenario.engine)
    if scenario.engine.kv_tokens is None:
        raise InputError(
            "a device of constant times has no memory that a KV capacity would follow from",
            where="engine.kv_tokens",
            remedy="give engine.kv_tokens",
        )
    return scenario.engine.kv_tokens


def _report_progress(
    engine: Engine, traffic: Traffic, progress: Progress, reached: Callable[[], int], every: int
) -> None:
    """Call ``progress`` whenever ``reached`` has grown by ``every``."""
    scheduler, expected = engine.scheduler, engine.workload.expected_requests()
    due = every

    def step() -> None:
        nonlocal due
        if reached() >= due:  # a leap may pass it
            due = reached() + every
            progress(scheduler.now_ns, traffic.ended, len(scheduler.running), len(scheduler.waiting), expected)

    scheduler.on_step = step


def _run(
    engine: Engine, traffic: Traffic, label: str, info: DeviceInfo | None = None, *, interrupted: bool = False
) -> Run:
    """Collect what the run leaves behind; every request that was sent has ended, each once, unless the run was
    interrupted. ``info``: the real device."""
    if not interrupted:
        engine.scheduler.on_idle()
        if traffic.open or len(traffic.sent) != traffic.ended:
            raise InvariantError("ended_once", f"{len(traffic.sent)} requests were sent, {traffic.ended} ended")
    run = run_of(engine, traffic.sent, label, info)
    if interrupted:
        run.meta["interrupted"] = True
        expected = engine.workload.expected_requests()
        ended = f"{traffic.ended:,}" if expected is None else f"{traffic.ended:,} of {expected:,}"
        run.meta["notes"].insert(0, f"interrupted: {ended} requests had ended, {traffic.open:,} were under way")
    return run


def run_of(engine: Engine, sent: dict[str, tuple[int, str, str]], label: str, info: DeviceInfo | None = None) -> Run:
    """What an engine's recorder has kept until now. ``sent``: (arrival_ns, session, tenant) by request id, in order of
    arrival. ``info``: the real device."""
    scheduler, recorder = engine.scheduler, engine.recorder
    for name, count in scheduler.invariants.evaluations.items():
        recorder.count(f"check_{name}", count)
    recorder.count("steps", scheduler.steps)
    recorder.count("evicted_tokens", scheduler.cache.evicted_tokens_total)
    records = recorder.records(sent, scheduler.decision_log.bytes())
    _price_work(engine, records.steps)
    return Run(resolve(engine.scenario), records, _meta(engine, label, info))


def _price_work(engine: Engine, steps: dict[str, Any]) -> None:
    """FLOPs and bytes of every step, in one go."""
    names = ("new_tokens", "prefix_tokens", "decode_rows", "context_tokens", "rows")
    steps["flops"], steps["bytes"] = engine.cost_model.flops_and_bytes(*(steps[name] for name in names))


def _meta(engine: Engine, label: str, info: DeviceInfo | None) -> dict[str, Any]:
    scenario = engine.scenario
    unmeasured = [f"unmeasured: {what}" for what in engine.cost_model.unmeasured()] if info is None else []
    guesses = [f"guess: {what}" for what in engine.host.guesses()] if label == "simulated" else []
    meta: dict[str, Any] = {
        "label": label,
        "loop": engine.loop_name,
        "model": engine.model.name,
        "device": info.name if info else engine.device.name if engine.device is not None else "constant",
        "host": engine.host.name if label == "simulated" else scenario.host_inject or "this machine",
        "kv_tokens": engine.kv_tokens,
        "notes": [*engine.workload.notes(), *(info.notes if info else ()), *unmeasured, *guesses],
        "provenance": provenance(scenario.seed),
    }
    if engine.device is not None and info is None:
        # FLOPs and bytes are recorded for one device.
        meta["peak_flops"] = engine.device.peak(_compute_dtype(scenario)) * 1e9
        meta["peak_bytes_per_s"] = engine.device.bytes_per_ns * 1e9
    return meta


def provenance(seed: int) -> dict[str, Any]:
    """Where, when and with what a run was made: all that may differ between equal runs, and the seed."""
    packages = ("numpy", "simpy", "pandas", "pydantic")
    return {
        "command": " ".join(sys.argv),
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "testbed": testbed.__version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "machine": processor_name(),
    }


def _compute_dtype(scenario: Scenario) -> str:
    return scenario.engine.dtype if scenario.engine.quantization == "none" else scenario.engine.quantization
