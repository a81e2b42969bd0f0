"""``testbed validate``: is the scenario right, and what does it imply?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from testbed.cli import options
from testbed.scenario.load import resolved_yaml

if TYPE_CHECKING:
    from testbed.scenario.schema import Scenario


def validate(scenario: options.ScenarioFile, settings: options.Settings = None) -> None:
    """Check a scenario; print the memory and loop it implies, then all its values."""
    loaded = options.read_scenario(scenario, settings)
    shown: list[tuple[str, str]] = []
    for name, one in (loaded.variants or {"": loaded.scenario}).items():
        with options.located(loaded, name):
            facts = list(implied(one))
        news = [fact for fact in facts if fact not in shown]
        print(f"# {name or one.name}{'' if news else ': as above'}")
        for label, words in news:
            print(f"# {label + ':':<12}{words}")
        shown += news
    print(f"\n{resolved_yaml(loaded.scenario)}", end="")


def implied(scenario: Scenario) -> Iterator[tuple[str, str]]:
    """What follows from a scenario, as (label, words); variants share most. Raises InputError when it cannot run."""
    from testbed.costs.capacity import kv_dtype, stage_layers, stage_weight_bytes
    from testbed.deployment import build_engines

    engines = build_engines(scenario)
    engine = engines[0]
    if len(engines) > 1:
        yield "loops", ", ".join(one.place.name for one in engines)
    for one in engines:
        if one.place.stage or one.place.replica:
            continue  # as the first of its kind
        config, whose = one.scheduler.config, "" if one.place.role == "null" else f"{one.place.role}: "
        yield "loop", whose + one.loop_name + (" (auto)" if config.loop == "auto" else "")
        layers = stage_layers(one.model, config.parallel)
        weights = [stage_weight_bytes(one.model, config, stage) / config.parallel.tp for stage in range(len(layers))]
        gigabytes = ", ".join(f"{size / 1e9:.2f}" for size in weights)
        yield "weights", f"{whose}{gigabytes} GB a device" + (", by stage" if len(layers) > 1 else "")
        token_bytes = one.model.kv_bytes_per_token(kv_dtype(config), config.parallel.tp, max(layers))
        kv_gigabytes = one.kv_tokens * token_bytes / 1e9
        yield "KV", f"{whose}{one.kv_tokens:,} tokens of {token_bytes:,} bytes = {kv_gigabytes:.2f} GB a device"
    yield "context", f"{engine.context_length:,} tokens"
    requests = engine.workload.expected_requests()
    yield "workload", "only the run can tell how many requests" if requests is None else f"{requests:,} requests"
    for note in engine.workload.notes():
        yield "workload", note
    for part in engine.cost_model.unmeasured():
        yield "unmeasured", part
    for part in engine.host.guesses():
        yield "guessed", part
