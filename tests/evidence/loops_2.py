"""Decisions of every rank are equal in virtual time and on paced threads, with arrivals tied to steps.

Scenarios press on memory: chunks, retractions and evictions occur, and are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from testbed import load_scenario, simulate
from testbed.api import execute
from testbed.metrics.run import Run
from testbed.scenario.schema import Scenario
from testbed.scheduler.decisions import split_logs
from tests.evidence.evidence import Evidence


def scenarios(seeds: int) -> Iterator[tuple[str, Scenario]]:
    """(what it is, scenario): every pipeline loop, number of stages and strategy, for several seeds."""
    for seed in range(seeds):
        for stages in (2, 3, 4):
            for loop in ("pipeline", "pipeline_async"):
                for batching in ("prefill_first", "stall_free"):
                    engine = {"parallel": {"pp": stages}, "loop": loop, "batching": batching}
                    yield f"{loop}, {stages} stages, {batching}, seed {seed}", scenario(seed, engine)


def scenario(seed: int, engine: dict[str, Any]) -> Scenario:
    """Requests that come with the iterations of the first loop, and more than memory holds."""
    small = {"kv_tokens": 1_500, "chunked_prefill_size": 96, "page_size": 1 + 3 * (seed % 2)}
    small |= {"max_running_requests": 48, "init_new_token_ratio": 0.05}  # more is admitted than will fit
    return load_scenario(
        {
            "model": "qwen3-0.6b",
            "device": {"constant": {"prefill_ns": 150_000, "decode_ns": 60_000}},
            "host": "none",
            "seed": seed,
            "engine": {**small, **engine},
            "workload": {
                "arrivals": {"kind": "at_iteration", "every": 2, "batch": 3},
                "lengths": {
                    "prompt_tokens": {"kind": "uniform", "low": 8, "high": 300},
                    "output_tokens": {"kind": "uniform", "low": 4, "high": 90},
                },
                "max_new_tokens": {"ratio": 2.0},
                "count": 60,
            },
        }
    ).scenario


def differences(virtual: Run, paced: Run) -> Iterator[str]:
    """In words; nothing where all is equal."""
    logs = [split_logs(run.records.decisions) for run in (virtual, paced)]
    if len(set(logs[0])) > 1 or len(set(logs[1])) > 1:
        yield "the ranks differ among themselves"
    if logs[0] != logs[1]:
        yield "virtual time and the paced threads differ"


def check(smoke: bool) -> Evidence:
    """Run each scenario in both times; smoke size has one seed."""
    seen: Counter[str] = Counter()
    wrong = []
    for name, one in scenarios(1 if smoke else 6):
        virtual = simulate(one)
        found = list(differences(virtual, execute(one, paced=True)))
        wrong += [f"{name}: {what}" for what in found]
        steps = virtual.records.steps
        seen.update(runs=1, steps=len(steps["step"]), retractions=sum(steps["retracted"]))
        seen.update(evicted_tokens=sum(steps["evicted_tokens"]))
    missing = [what for what in ("retractions", "evicted_tokens") if not seen[what]]
    return Evidence(
        figure=f"{seen['runs'] - len({each.split(':')[0] for each in wrong})} of {seen['runs']} scenarios have equal "
        f"decisions; {seen['steps']:,} steps of all ranks",
        bar="all",
        passed=not wrong and not missing,
        details=(
            *wrong,
            *(f"never happened: {what}" for what in missing),
            f"{seen['retractions']:,} retractions, {seen['evicted_tokens']:,} evicted tokens",
        ),
    )
