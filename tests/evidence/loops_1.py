"""The same requests give the same tokens under every loop and layout, with forced retractions and random aborts.

Each workload runs once with the normal loop on one engine and nobody who aborts; what every other deployment gives is
held to that: whole for those who stay, the beginning of it for those who are aborted. Pools are small, every invariant
is proved at every step of every loop, and a layout that never retracted or aborted shows nothing. At full size the
result is written to ``reports/loops_tokens/README.md``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from testbed import load_scenario
from testbed.deployment import build_engines
from testbed.deployment.simulated import Simulation
from testbed.messages import AbortRequest
from testbed.workload.base import TimedRequest
from tests.evidence.evidence import Evidence, commit_page

Outputs = dict[str, list[int]]
PAIRS = {"reserved_decode_tokens": 2, "link": {"gb_per_s": 50}}
LAYOUTS: dict[str, dict[str, Any]] = {
    **{name: {"engine.loop": name} for name in ("normal", "overlap", "overlap_thread", "overlap_suspended")},
    "tp 2": {"engine.parallel.tp": 2},
    **{
        f"pp {stages}, {loop}": {"engine.parallel.pp": stages, "engine.loop": loop}
        for stages in (2, 4)
        for loop in ("pipeline", "pipeline_async")
    },
    **{f"dp 2, {loop}": {"engine.parallel.dp": 2, "engine.loop": loop} for loop in ("normal", "overlap")},
    **{
        f"disaggregated {prefill}:1, {loop}": {"disaggregation": {"prefill": prefill, **PAIRS}, "engine.loop": loop}
        for prefill in (1, 2)
        for loop in ("normal", "overlap")
    },
    "disaggregated 1:1, pipeline": {"disaggregation": {"prefill_stages": 2, **PAIRS}},
}


class Listening:
    """A workload that keeps what its users get."""

    def __init__(self, workload: Any) -> None:
        self._workload = workload
        self.start, self.expected_requests, self.notes = workload.start, workload.expected_requests, workload.notes
        self.outputs: Outputs = {}

    def on_finish(self, rid: str, now_ns: int, output_ids: Any) -> Sequence[TimedRequest]:
        assert rid not in self.outputs, f"{rid} ended twice"
        self.outputs[rid] = output_ids.tolist()
        sent: Sequence[TimedRequest] = self._workload.on_finish(rid, now_ns, output_ids)
        return sent


def scenario(seed: int, count: int, layout: dict[str, Any]) -> dict[str, Any]:
    """Requests that come faster than they are served, in a pool that holds a tenth of them."""
    return {
        "model": "qwen3-0.6b",
        "device": "h100-sxm",
        "host": "testbed",
        "seed": seed,
        "engine": {
            "kv_tokens": 960,
            "page_size": (1, 4, 16)[seed % 3],
            "chunked_prefill_size": 128,
            "max_running_requests": 48,
            "rules": {"reserve": "none"},
        },
        "workload": {
            "arrivals": {"kind": "poisson", "rate_per_s": 300},
            "lengths": {
                "prompt_tokens": {"kind": "uniform", "low": 8, "high": 300},
                "output_tokens": {"kind": "uniform", "low": 4, "high": 150},
            },
            "max_new_tokens": {"ratio": 2.0},
            "count": count,
        },
    }


def run(
    seed: int, count: int, layout: dict[str, Any], aborts: Sequence[tuple[int, str]]
) -> tuple[Outputs, Counter[str]]:
    """What users got, and how often things happened."""
    overrides = [f"{field}={value}" for field, value in layout.items()]
    one = load_scenario(scenario(seed, count, layout), overrides).scenario
    engines = build_engines(one, checks="full")
    engines[0].workload = heard = Listening(engines[0].workload)  # type: ignore[assignment]
    simulation = Simulation(engines)
    for when_ns, rid in aborts:
        simulation.send_at(when_ns, AbortRequest(rid))
    simulation.run()
    happened: Counter[str] = Counter()
    for engine in engines:
        engine.scheduler.on_idle()
        happened.update({name: engine.recorder.counters.get(name, 0) for name in ("retractions", "aborts")})
    return heard.outputs, happened


def aborts_of(seed: int, rids: Sequence[str], until_ns: int) -> list[tuple[int, str]]:
    """A fifth of the requests, each at a random time."""
    random = np.random.default_rng(seed)
    chosen = random.choice(len(rids), len(rids) // 5, replace=False)
    return [(int(random.integers(until_ns)), rids[index]) for index in chosen]


def differences(name: str, got: Outputs, twin: Outputs, aborted: set[str]) -> list[str]:
    """In words; nothing where all is as it should be."""
    wrong = [f"{name}: {rid} never ended" for rid in twin.keys() - got.keys()]
    for rid, tokens in got.items():
        if rid not in aborted and tokens != twin[rid]:
            wrong.append(f"{name}: {rid} has other tokens")
        elif tokens != twin[rid][: len(tokens)]:
            wrong.append(f"{name}: {rid}, which was aborted, has other tokens")
    return wrong


def check(smoke: bool) -> Evidence:
    """Every layout for several workloads; at smoke size one, and a few requests."""
    seeds, count = (1, 40) if smoke else (12, 200)
    wrong: list[str] = []
    happened = {name: Counter[str]() for name in LAYOUTS}
    runs = tokens = 0
    for seed in range(seeds):
        twin, _ = run(seed, count, LAYOUTS["normal"], ())
        aborts = aborts_of(seed, sorted(twin), int(count / 300 * 2e9))
        for name, layout in LAYOUTS.items():
            got, events = run(seed, count, layout, aborts)
            wrong += differences(f"{name}, seed {seed}", got, twin, {rid for _, rid in aborts})
            happened[name] += events
            runs += 1
            tokens += sum(map(len, got.values()))
    for name, events in happened.items():
        wrong += [f"{name}: no {what}" for what in ("retractions", "aborts") if not events[what]]
    evidence = Evidence(
        figure=f"{runs} runs of {len(LAYOUTS)} layouts, {tokens:,} tokens; {len(wrong)} differences",
        bar="none, and retractions and aborts in each layout",
        passed=not wrong,
        details=(
            *wrong[:20],
            *(f"{name}: {one['retractions']} retractions, {one['aborts']} aborts" for name, one in happened.items()),
            f"seeds 0 to {seeds - 1}, {count} requests each; simulated h100-sxm, host testbed",
        ),
    )
    if not smoke:
        commit_page("loops_tokens", "The same tokens under every loop and layout", "loops.1", evidence)
    return evidence
