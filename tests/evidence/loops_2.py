"""Decisions of every rank are equal in virtual time and on paced threads, with arrivals tied to steps.

The requests of a pipeline come with the iterations of its first loop. Between prefill and decode engines every message
comes with the iteration of its receiver in which it came in virtual time: whoever is early waits. Scenarios press on
memory: chunks, retractions and evictions occur, and are counted. At full size the result is written to
``reports/loops_decisions/README.md``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from testbed import load_scenario, simulate
from testbed.api import execute
from testbed.deployment import Engine, build_engines, paced
from testbed.deployment.simulated import Simulation
from testbed.messages import Message, Timer
from testbed.metrics.journal import Journal
from testbed.metrics.run import Run
from testbed.runtime.users import Users
from testbed.runtime.wall import WallClock
from testbed.runtime.wall_world import Mailbox, WallWorld
from testbed.scenario.schema import Scenario
from testbed.scheduler.decisions import split_logs
from tests.evidence.evidence import Evidence, commit_page


def scenarios(seeds: int) -> Iterator[tuple[str, Scenario]]:
    """(what it is, scenario): every pipeline loop, number of stages and strategy, for several seeds."""
    for seed in range(seeds):
        for stages in (2, 3, 4):
            for loop in ("pipeline", "pipeline_async"):
                for batching in ("prefill_first", "stall_free"):
                    engine = {"parallel": {"pp": stages}, "loop": loop, "batching": batching}
                    yield f"{loop}, {stages} stages, {batching}, seed {seed}", scenario(seed, engine)


def pairs(seeds: int) -> Iterator[tuple[str, Scenario]]:
    """As ``scenarios``, of prefill and decode engines."""
    for seed in range(seeds):
        for prefill, decode, stages in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)):
            for loop in ("normal", "overlap"):
                one = scenario(seed, {"loop": loop, "kv_tokens": 640}, {"kind": "poisson", "rate_per_s": 2_000})
                parts = {"prefill": prefill, "decode": decode, "prefill_stages": stages}
                parts |= {"reserved_decode_tokens": 2, "link": {"gb_per_s": 50}}
                changed = load_scenario(one.model_dump() | {"compare": None, "disaggregation": parts}).scenario
                yield f"{prefill}:{decode}, {stages} stages, {loop}, seed {seed}", changed


class Tied(Mailbox):
    """Hands out in each iteration what virtual time handed out in it, once all of that is here."""

    def __init__(self, world: WallWorld, name: str, users: Users | None, journal: Journal) -> None:
        super().__init__(world, name, users)
        self._expected: dict[int, list[tuple[Any, ...]]] = {}
        for index, message in journal.arrivals:
            if not isinstance(message, Timer):
                self._expected.setdefault(index, []).append(identity(message))

    def delivered(self, now_ns: int, iteration: int) -> list[Message]:
        wanted = self._expected.pop(iteration, [])
        if not wanted:
            return []

        def here() -> bool:
            names = [identity(message) for message in self._messages]
            return all(name in names for name in wanted)

        self._world.wait_for(self._name, here)
        with self._world.at_rest():
            found = {identity(message): message for message in reversed(self._messages)}
            taken = [found[name] for name in wanted]
            for message in taken:
                self._messages.remove(message)
        return taken


def identity(message: Message) -> tuple[Any, ...]:
    """What of a message is the same in any time."""
    fields = ("rid", "room", "stage", "index", "sender")
    return (type(message).__name__, *(getattr(message, field, None) for field in fields))


def together(one: Scenario) -> tuple[list[Engine], list[Engine]]:
    """The engines of a deployment after a run in virtual time, and after one on threads that was tied to it."""
    virtual, real = build_engines(one), build_engines(one)
    Simulation(virtual).run()
    journals = {engine.place.name: engine.recorder.journal for engine in virtual}
    with patch.object(paced, "Mailbox", lambda world, name, users: Tied(world, name, users, journals[name])):
        paced.PacedDeployment(real, WallClock(), None).run()
    return virtual, real


def scenario(seed: int, engine: dict[str, Any], arrivals: dict[str, Any] | None = None) -> Scenario:
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
                "arrivals": arrivals or {"kind": "at_iteration", "every": 2, "batch": 3},
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
    seeds = 1 if smoke else 6
    for name, one in scenarios(seeds):
        virtual = simulate(one)
        found = list(differences(virtual, execute(one, paced=True)))
        wrong += [f"{name}: {what}" for what in found]
        steps = virtual.records.steps
        seen.update(runs=1, steps=len(steps["step"]), retractions=sum(steps["retracted"]))
        seen.update(evicted_tokens=sum(steps["evicted_tokens"]))
    for name, one in pairs(seeds):
        virtual_engines, real_engines = together(one)
        for before, after in zip(virtual_engines, real_engines, strict=True):
            if before.scheduler.decision_log.bytes() != after.scheduler.decision_log.bytes():
                wrong.append(f"{name}: {before.place.name} decides otherwise on the paced thread")
            counters = before.recorder.counters
            seen.update(steps=before.scheduler.steps, retractions_of_pairs=counters.get("retractions", 0))
        seen.update(runs=1)
    missing = [what for what in ("retractions", "retractions_of_pairs", "evicted_tokens") if not seen[what]]
    unequal = len({each.rsplit(": ", 1)[0] for each in wrong})
    evidence = Evidence(
        figure=f"{seen['runs'] - unequal} of {seen['runs']} scenarios have equal "
        f"decisions; {seen['steps']:,} steps of all ranks",
        bar="all",
        passed=not wrong and not missing,
        details=(
            *wrong,
            *(f"never happened: {what}" for what in missing),
            f"{seen['retractions']:,} retractions in pipelines, {seen['retractions_of_pairs']:,} in decode engines, "
            f"{seen['evicted_tokens']:,} evicted tokens",
            f"seeds 0 to {seeds - 1}; constant device, host none",
        ),
    )
    if not smoke:
        commit_page("loops_decisions", "The same decisions in virtual time and on paced threads", "loops.2", evidence)
    return evidence
