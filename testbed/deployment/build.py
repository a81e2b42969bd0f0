"""What a scenario names, built: one engine for each loop that it asks for.

``parallel.dp`` replicas, each of ``parallel.pp`` stages; or prefill and decode engines. Every loop has a scheduler, a
recorder and a device of its own; the workload and the tokens are everybody's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed.costs import (
    CostModel,
    DeviceProfile,
    HostProfile,
    build_cost_model,
    build_host_profile,
    kv_capacity_tokens,
    kv_page_bytes,
    load_device,
    stage_layers,
)
from testbed.costs.capacity import kv_dtype
from testbed.engine.options import DeviceInfo
from testbed.loops.select import EventLoop, Role, find_loop
from testbed.metrics.journal import Setting
from testbed.metrics.recorder import Recorder
from testbed.runtime.oracle import Oracle
from testbed.scenario.errors import InputError
from testbed.scenario.models import ModelSpec, load_model
from testbed.scenario.plugins import is_plugin, load_callable, load_coroutine, load_object
from testbed.scenario.schema import EngineConfig, Scenario
from testbed.scheduler.disaggregation import Terms
from testbed.scheduler.scheduler import Checks, Scheduler
from testbed.workload import Workload, build_workload


@dataclass(slots=True, frozen=True)
class Place:
    """Which loop of a deployment."""

    number: int = 0
    """In the order of ``places_of``: the ``replica`` of its records."""
    replica: int = 0
    role: Role = "null"
    stage: int = 0
    stages: int = 1

    @property
    def engine(self) -> str:
        """What other engines call the one that this loop belongs to."""
        return f"{'replica' if self.role == 'null' else self.role} {self.replica}"

    @property
    def is_last(self) -> bool:
        """Whether tokens are drawn here."""
        return self.stage == self.stages - 1

    @property
    def adapter(self) -> str:
        """What this loop's device is called on the links: other engines speak to the first stage's."""
        return self.engine + (f" stage {self.stage}" if self.stage else "")

    @property
    def name(self) -> str:
        """For reports."""
        return self.engine + (f" stage {self.stage}" if self.stages > 1 else "")


ALONE = Place()


def places_of(scenario: Scenario) -> Iterator[Place]:
    """Every loop that ``scenario`` asks for: the stages of the first replica, of the second, ...; or the prefill
    engines, then the decode engines."""
    parallel, parts = scenario.engine.parallel, scenario.disaggregation
    if parts is not None:
        stages = parts.prefill_stages
        for number in range(parts.prefill * stages):
            yield Place(number, number // stages, "prefill", number % stages, stages)
        for replica in range(parts.decode):
            yield Place(parts.prefill * stages + replica, replica, "decode")
        return
    for replica in range(parallel.dp):
        for stage in range(parallel.pp):
            yield Place(replica * parallel.pp + stage, replica, "null", stage, parallel.pp)


@dataclass(slots=True)
class Engine:
    """What one loop needs before the first message, on any clock."""

    scenario: Scenario
    place: Place
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
    """Build the only engine that ``scenario`` names. ``real``: the device that will run it; its memory counts, not that
    of the modelled one. ``recorder``: None: one that keeps everything. Raises InputError for anything that cannot run,
    and for a scenario of several loops."""
    names = [place.name for place in places_of(scenario)]
    if len(names) > 1:
        apart = scenario.disaggregation is not None
        one = "leave disaggregation out" if apart else "use parallel: {pp: 1, dp: 1}"
        raise InputError(
            f"the scenario asks for {len(names)} loops ({', '.join(names[:3])}{', ...' if names[3:] else ''}), not one",
            where="disaggregation" if apart else "engine.parallel",
            remedy=f"{one}; testbed simulate and testbed run --paced take several",
        )
    return _build(scenario, ALONE, checks=checks, real=real, recorder=recorder)


def _build(
    scenario: Scenario,
    place: Place,
    *,
    checks: Checks,
    real: DeviceInfo | None = None,
    recorder: Recorder | None = None,
    beside: Engine | None = None,
) -> Engine:
    """One engine. ``beside``: another one of the deployment, whose workload and tokens it shares."""
    model = load_model(scenario.model)
    model.check_stages(
        place.stages, "disaggregation.prefill_stages" if place.role == "prefill" else "engine.parallel.pp"
    )
    given, scenario = scenario, _at(scenario, place)
    config = scenario.engine
    device = load_device(scenario.device) if isinstance(scenario.device, str) else None
    kv_tokens = real.kv_tokens if real else _kv_tokens(scenario, model, device)
    context_length = real.context_length if real else config.context_length or model.max_positions
    loop_name, loop = build_loop(config, place.role)
    setting = Setting(
        loop=loop_name,
        vocab_size=model.vocab,
        kv_tokens=kv_tokens,
        context_length=context_length,
        seed=scenario.seed,
    )
    recorder, terms = recorder or Recorder(place.number), _terms(scenario, model, place)
    scheduler = build_scheduler(config, setting, checks=checks, recorder=recorder, terms=terms)
    capacity_tokens = scheduler.memory.allocator.capacity_tokens
    return Engine(
        scenario=given,
        place=place,
        model=model,
        device=device,
        cost_model=build_cost_model(scenario, place.stage),
        host=build_host_profile(scenario),
        kv_tokens=capacity_tokens,
        context_length=context_length,
        loop_name=loop_name,
        loop=loop,
        scheduler=scheduler,
        recorder=scheduler.recorder,
        workload=beside.workload if beside else _workload(scenario, model, scheduler, context_length),
        oracle=Oracle(
            scenario.seed, model.vocab, scheduler.memory.slots.count, stop_at=beside.oracle.stop_at if beside else None
        ),
    )


def _at(scenario: Scenario, place: Place) -> Scenario:
    """The scenario as the engine at ``place`` sees it: only prefill engines have stages beside decode engines."""
    if place.role != "prefill" or place.stages == 1:
        return scenario
    parallel = scenario.engine.parallel.model_copy(update={"pp": place.stages})
    return scenario.model_copy(update={"engine": scenario.engine.model_copy(update={"parallel": parallel})})


def build_engines(scenario: Scenario, *, checks: Checks = "delta") -> list[Engine]:
    """Every engine that ``scenario`` names, in the order of ``places_of``. Raises InputError like ``build_engine``."""
    engines: list[Engine] = []
    for place in places_of(scenario):
        engines.append(_build(scenario, place, checks=checks, beside=engines[0] if engines else None))
    return engines


def rings_of(engines: Sequence[Engine]) -> list[range]:
    """The numbers of the loops of each pipeline, in order of the stages."""
    firsts = [engine.place for engine in engines if engine.place.stage == 0 and engine.place.stages > 1]
    return [range(first.number, first.number + first.stages) for first in firsts]


def _workload(scenario: Scenario, model: ModelSpec, scheduler: Scheduler, context_length: int) -> Workload:
    return build_workload(
        scenario.workload,
        seed=scenario.seed,
        context_length=scheduler.max_prompt_tokens,
        bound_by="engine.kv_tokens"
        if scheduler.memory.allocator.capacity_tokens < context_length
        else "engine.context_length",
        vocab_size=model.vocab,
        base_dir=Path.cwd(),
    )


def build_loop(config: EngineConfig, role: Role = "null") -> tuple[str, EventLoop]:
    """The event loop that ``config`` names, and its resolved name. Raises InputError when there is none."""
    if is_plugin(config.loop):
        return config.loop, load_coroutine(config.loop, Path.cwd(), where="engine.loop", takes=("loop",))
    return find_loop(config.loop, config.parallel.pp, role)


def _terms(scenario: Scenario, model: ModelSpec, place: Place) -> Terms | None:
    """What the half of a pair has to know; None for an engine that prefills and decodes."""
    parts = scenario.disaggregation
    if parts is None or place.role == "null":
        return None
    engine = scenario.engine
    layers = stage_layers(model, engine.parallel)[place.stage]
    return Terms(
        place.role,
        place.engine,
        stage=place.stage,
        stages=place.stages,
        kv_bytes_per_token=kv_page_bytes(model, engine) // engine.page_size,
        stage_kv_bytes_per_token=model.kv_bytes_per_token(kv_dtype(engine), 1, layers),
        bootstrap_timeout_ns=int(parts.bootstrap_timeout_s * 1e9),
        transfer_timeout_ns=int(parts.transfer_timeout_s * 1e9),
        reserved_decode_tokens=parts.reserved_decode_tokens,
        host_gb_per_s=parts.host_gb_per_s,
    )


def build_scheduler(
    config: EngineConfig,
    setting: Setting,
    *,
    checks: Checks = "delta",
    recorder: Recorder | None = None,
    terms: Terms | None = None,
) -> Scheduler:
    """The scheduler of an engine. Its journal begins with ``setting``: what replaying needs beside the scenario.
    ``terms``: of one that prefills or decodes only."""
    recorder = recorder or Recorder()
    recorder.journal.setting = setting
    return Scheduler(
        config,
        kv_tokens=setting.kv_tokens,
        context_length=setting.context_length,
        vocab_size=setting.vocab_size,
        seed=setting.seed,
        policy=_own_policy(config.policy),
        strategy=_own_strategy(config.batching),
        recorder=recorder,
        checks=checks,
        terms=terms,
    )


def _own_strategy(name: str) -> Any:
    """The user's own batching strategy, made: a class is called without arguments."""
    if not is_plugin(name):
        return None
    return load_object(name, Path.cwd(), where="engine.batching", method="next_batch", takes=("scheduler",))


def _own_policy(name: str) -> Any:
    """The user's own policy: a function that sorts the waiting list."""
    if not is_plugin(name):
        return None
    return load_callable(name, Path.cwd(), where="engine.policy", takes=("waiting", "scheduler"))


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
