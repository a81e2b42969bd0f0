"""``testbed validate``: is the scenario right, and what does it imply?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.cli import options
from testbed.scenario.errors import InputError
from testbed.scenario.load import resolved_yaml

if TYPE_CHECKING:
    from testbed.scenario.models import ModelSpec
    from testbed.scenario.schema import Scenario
    from testbed.workload.base import Workload

_REQUESTS_MAX = 100_000
"""How many requests are looked at to find the longest."""


def validate(scenario: options.ScenarioFile, settings: options.Settings = None) -> None:
    """Check a scenario; print it with all values, and the memory and loop it implies."""
    loaded = options.read_scenario(scenario, settings)
    print(resolved_yaml(loaded.scenario), end="")
    shown: list[tuple[str, str]] = []
    for name, one in (loaded.variants or {"": loaded.scenario}).items():
        with options.located(loaded):
            facts = list(implied(one))
        news = [fact for fact in facts if fact not in shown]
        print(f"\n# {name or one.name}{'' if news else ': as above'}")
        for label, words in news:
            print(f"# {label + ':':<12}{words}")
        shown += news


def implied(scenario: Scenario) -> Iterator[tuple[str, str]]:
    """What follows from a scenario, as (label, words); variants share most. Raises InputError when it cannot run."""
    from testbed.costs import build_cost_model, build_host_profile
    from testbed.scenario.models import load_model

    model = load_model(scenario.model)
    engine = scenario.engine
    costs = build_cost_model(scenario)
    weights = model.weight_bytes(engine.dtype, engine.quantization) / engine.parallel.tp
    yield "loop", _loop_name(scenario)
    yield "weights", f"{weights / 1e9:.2f} GB a device"
    capacity_tokens, token_bytes = _memory(scenario, model)
    kv_gigabytes = capacity_tokens * token_bytes / 1e9
    yield "KV", f"{capacity_tokens:,} tokens of {token_bytes:,} bytes = {kv_gigabytes:.2f} GB a device"
    yield from _workload(scenario, model, capacity_tokens)
    for part in costs.unmeasured():
        yield "unmeasured", part
    for part in build_host_profile(scenario).guesses():
        yield "guessed", part


def _loop_name(scenario: Scenario) -> str:
    from testbed.loops.select import find_loop
    from testbed.scenario.plugins import is_plugin, load_plugin

    loop = scenario.engine.loop
    if is_plugin(loop):
        load_plugin(loop, where="engine.loop")
        return loop
    name, _ = find_loop(loop, scenario.engine.parallel.pp)
    return name if name == loop else f"{name} ({loop})"


def _memory(scenario: Scenario, model: ModelSpec) -> tuple[int, int]:
    """KV capacity in tokens, and bytes of a token on one device."""
    from testbed.costs import kv_capacity_tokens, load_device
    from testbed.costs.capacity import kv_dtype

    engine = scenario.engine
    token_bytes = model.kv_bytes_per_token(kv_dtype(engine), engine.parallel.tp, model.layers)
    if isinstance(scenario.device, str):
        return kv_capacity_tokens(model, load_device(scenario.device), engine), token_bytes
    if engine.kv_tokens is None:
        remedy = "add engine: {kv_tokens: 100000}"
        raise InputError("a constant device has no memory size", where="device.constant", remedy=remedy)
    return engine.kv_tokens // engine.page_size * engine.page_size, token_bytes


def _workload(scenario: Scenario, model: ModelSpec, capacity_tokens: int) -> Iterator[tuple[str, str]]:
    from testbed.workload.build import build_workload

    context_tokens = scenario.engine.context_length or model.max_positions
    workload: Workload = build_workload(
        scenario.workload,
        seed=scenario.seed,
        context_length=context_tokens,
        vocab_size=model.vocab,
        base_dir=Path(),
    )
    longest_tokens = requests = 0
    for timed in islice(workload.start(), _REQUESTS_MAX):
        requests += 1
        longest_tokens = max(longest_tokens, len(timed.request.prompt) + timed.output_tokens)
    if longest_tokens > capacity_tokens:
        raise InputError(
            f"the longest request needs {longest_tokens:,} tokens of KV, the pool holds {capacity_tokens:,}",
            where="engine.kv_tokens" if scenario.engine.kv_tokens else "engine",
            remedy=f"give kv_tokens: {longest_tokens} or more, or shorter requests",
        )
    expected = workload.expected_requests()
    known = f"{expected:,} requests" if expected is not None else f"{requests:,} requests before any reaction"
    yield "workload", f"{known}, the longest seen {longest_tokens:,} tokens of {context_tokens:,}"
    for note in workload.notes():
        yield "workload", note
