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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np

import testbed
from testbed.costs import HostProfile, load_host
from testbed.deployment import Engine, build_engine, build_engines
from testbed.deployment.paced import PacedDeployment
from testbed.deployment.simulated import Simulation
from testbed.engine.builder import InputBuilder
from testbed.engine.device import Device, open_device, processor_name
from testbed.engine.models.config import load_decoder_config
from testbed.engine.options import DeviceInfo, EngineOptions
from testbed.loops.base import LoopContext
from testbed.memory import OutOfPages
from testbed.metrics.loops import ANY
from testbed.metrics.recorder import records_of
from testbed.metrics.run import Run
from testbed.runtime import wall
from testbed.runtime.modelled import OutOfMemory
from testbed.runtime.paced import PacedDevice
from testbed.runtime.real import RealDevice
from testbed.runtime.traffic import Traffic
from testbed.runtime.wall_threads import runtime_for
from testbed.scenario.errors import InputError
from testbed.scenario.load import load_scenario, resolve
from testbed.scenario.plugins import own_faults
from testbed.scenario.schema import Scenario
from testbed.scheduler.decisions import join_logs
from testbed.scheduler.invariants import InvariantError
from testbed.scheduler.scheduler import Checks

Progress = Callable[[int, int, int, int, int | None], None]
"""Called now and then with (virtual or wall time in ns, requests ended, running, waiting, requests in all if known)."""
PROGRESS_EVERY_STEPS = 512
"""Of a simulation."""
PROGRESS_EVERY_NS = 500_000_000
"""Of a run on the wall clock."""
SOME_TOKENS = 1 << 20
"""A KV capacity to check a scenario with before a device says what it holds."""


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
    engines = build_engines(_one(scenario, seed), checks=checks)
    simulation = Simulation(engines, leap=leap)
    traffic = simulation.traffic
    if progress is not None:
        _report_progress(
            engines, traffic, progress, lambda: sum(e.scheduler.steps for e in engines), PROGRESS_EVERY_STEPS
        )
    with _time_that_records_hold(), own_faults(), _memory_rules(engines[0]), _rare_collections():
        simulation.run()
    return _run(engines, traffic, "simulated")


@contextmanager
def _time_that_records_hold() -> Iterator[None]:
    """Virtual time costs nothing, so a rate or a latency of a wrong unit soon leads out of what records can hold."""
    try:
        yield
    except OverflowError as error:
        raise InputError(
            "the run goes on for more than the 292 years that 64 bits of nanoseconds hold",
            where="scenario",
            remedy="look for a rate that is far too low, or a time that is far too long; each names its unit",
        ) from error


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
        engines = build_engines(chosen, checks=checks)
        if len(engines) > 1:
            return _execute_paced(engines, progress)
        engine = engines[0]
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
    clock, traffic = wall.WallClock(), Traffic(engine.workload, engine.oracle)
    runtime = runtime_for(engine.loop)(
        clock=clock,
        device=device_of(clock),
        recorder=engine.recorder,
        clients=wall.ScheduledClients(clock, traffic),
        inject=_injected(engine.scenario),
    )
    if progress is not None:
        _report_progress([engine], traffic, progress, clock.now_ns, PROGRESS_EVERY_NS)
    with own_faults(), _memory_rules(engine), wall.stops_on_interrupt(clock):
        wall.run_to_the_end(engine.loop(LoopContext(engine.scheduler, runtime)))
    return _run([engine], traffic, label, info, interrupted=clock.stopping)


def _execute_paced(engines: Sequence[Engine], progress: Progress | None) -> Run:
    """Drive several loops, a thread each, until the workload has ended, or somebody interrupts it."""
    clock = wall.WallClock()
    deployment = PacedDeployment(engines, clock, _injected(engines[0].scenario))
    if progress is not None:
        _report_progress(engines, deployment.traffic, progress, clock.now_ns, PROGRESS_EVERY_NS)
    with own_faults(), _memory_rules(engines[0]), wall.stops_on_interrupt(clock):
        deployment.run()
    return _run(engines, deployment.traffic, "paced", interrupted=clock.stopping)


def _injected(scenario: Scenario) -> HostProfile | None:
    """The host whose time is spent where it is longer than this machine's own."""
    if scenario.host_inject is None:
        return None
    return load_host(scenario.host_inject, tp=scenario.engine.parallel.tp, where="host_inject")


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


def _report_progress(
    engines: Sequence[Engine], traffic: Traffic, progress: Progress, reached: Callable[[], int], every: int
) -> None:
    """Call ``progress`` whenever ``reached`` has grown by ``every``."""
    schedulers, expected = [engine.scheduler for engine in engines], engines[0].workload.expected_requests()
    due = every

    def step() -> None:
        nonlocal due
        if reached() >= due:  # a leap may pass it
            due = reached() + every
            running = sum(batch.rows for one in schedulers for batch in one.micro_batches)
            waiting = sum(len(one.waiting) for one in schedulers)
            progress(max(one.now_ns for one in schedulers), traffic.ended, running, waiting, expected)

    for scheduler in schedulers:
        scheduler.on_step = step


def _run(
    engines: Sequence[Engine],
    traffic: Traffic,
    label: str,
    info: DeviceInfo | None = None,
    *,
    interrupted: bool = False,
) -> Run:
    """Collect what the run leaves behind; every request that was sent has ended, each once, unless the run was
    interrupted. ``info``: the real device."""
    if not interrupted:
        for engine in engines:
            engine.scheduler.on_idle()
        if traffic.open or len(traffic.sent) != traffic.ended:
            raise InvariantError("ended_once", f"{len(traffic.sent)} requests were sent, {traffic.ended} ended")
    run = run_of(engines, traffic.sent, label, info)
    if interrupted:
        run.meta["interrupted"] = True
        expected = engines[0].workload.expected_requests()
        ended = f"{traffic.ended:,}" if expected is None else f"{traffic.ended:,} of {expected:,}"
        run.meta["notes"].insert(0, f"interrupted: {ended} requests had ended, {traffic.open:,} were under way")
    return run


def run_of(
    engines: Sequence[Engine], sent: dict[str, tuple[int, str, str]], label: str, info: DeviceInfo | None = None
) -> Run:
    """What the engines' recorders have kept until now. ``sent``: (arrival_ns, session, tenant) by request id, in order
    of arrival. ``info``: the real device."""
    for engine in engines:
        scheduler, recorder = engine.scheduler, engine.recorder
        for name, count in scheduler.invariants.evaluations.items():
            recorder.count(f"check_{name}", count)
        recorder.count("steps", scheduler.steps)
        recorder.count("evicted_tokens", scheduler.cache.evicted_tokens_total)
    logs = join_logs([engine.scheduler.decision_log.bytes() for engine in engines])
    records = records_of([engine.recorder for engine in engines], sent, logs)
    _price_work(engines, records.steps)
    return Run(resolve(engines[0].scenario), records, _meta(engines, label, info))


def _price_work(engines: Sequence[Engine], steps: dict[str, Any]) -> None:
    """FLOPs and bytes of every step, in one go an engine."""
    names = ("new_tokens", "prefix_tokens", "decode_rows", "context_tokens", "rows")
    parts = []
    for engine in engines:
        mine = steps["replica"] == engine.place.number
        parts.append(engine.cost_model.flops_and_bytes(*(steps[name][mine] for name in names)))
    steps["flops"], steps["bytes"] = (np.concatenate(columns) for columns in zip(*parts, strict=True))


def _loop_facts(engine: Engine) -> dict[str, Any]:
    """See ``Loop``. Who has the requests of a prefill engine's answered is chosen for each of them."""
    place = engine.place
    answers = ANY if place.role == "prefill" else place.number - place.stage
    facts = {"name": place.name, "kv_tokens": engine.kv_tokens, "stage": place.stage, "answers": answers}
    return facts | ({"role": place.role} if place.role != "null" else {})


def _meta(engines: Sequence[Engine], label: str, info: DeviceInfo | None) -> dict[str, Any]:
    engine = engines[0]
    scenario = engine.scenario
    unmeasured = [f"unmeasured: {what}" for what in engine.cost_model.unmeasured()] if info is None else []
    guesses = [f"guess: {what}" for what in engine.host.guesses()] if label == "simulated" else []
    meta: dict[str, Any] = {
        "label": label,
        "loop": ", ".join(dict.fromkeys(one.loop_name for one in engines)),
        "model": engine.model.name,
        "device": info.name if info else engine.device.name if engine.device is not None else "constant",
        "host": engine.host.name if label == "simulated" else scenario.host_inject or "this machine",
        "kv_tokens": engine.kv_tokens,
        **({"loops": [_loop_facts(one) for one in engines]} if len(engines) > 1 else {}),
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
