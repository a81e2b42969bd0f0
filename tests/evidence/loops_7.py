"""Speed of deployments inside ``simulate()``: eight replicas behind a router, and a step of a pipeline.

At full size the result is written to ``reports/speed_of_loops/README.md``.
"""

from __future__ import annotations

from typing import Any

from tests.evidence.evidence import Evidence, commit_page
from tests.evidence.simulate_3 import fixed
from tests.evidence.speed import best_of, cpu_name


def replicas(count: int, policy: str) -> dict[str, Any]:
    """100 requests a second of 512 and 256 tokens, on eight replicas."""
    return fixed(count, 100.0, 512, 256, parallel={"dp": 8}) | {"routing": {"policy": policy}}


def at_once(stages: int, output: int) -> dict[str, Any]:
    """Requests at once: after the prefills every step, whichever micro-batch's, is one of 32 rows."""
    rows = 32 * stages
    scenario = fixed(rows, 1.0, 128, output, kv_tokens=1_200_000, max_running_requests=rows, parallel={"pp": stages})
    scenario["engine"]["loop"] = "pipeline" if stages > 1 else "normal"
    scenario["workload"]["arrivals"] = {"kind": "all_at_once"}
    return scenario


def step_us(stages: int, times: int, scale: int) -> float:
    """CPU time (us) of one step on all stages, without the prefills' and without leaps, which a pipeline has not."""
    short, long = (best_of(times, at_once(stages, output // scale), leap=False) for output in (500, 3500))
    return (long["cpu_s"] - short["cpu_s"]) / (long["steps"] - short["steps"]) * 1e6


def check(smoke: bool) -> Evidence:
    """Measure, each figure the best of five processes (smoke: of one, a tenth of the size)."""
    times, scale = (1, 10) if smoke else (5, 1)
    details, rates = [], []
    for policy in ("round_robin", "shortest_queue", "power_of_two", "cache_aware"):
        run = best_of(times, replicas(20_000 // scale, policy))
        rates.append(run["requests"] / run["cpu_s"])
        details.append(f"eight replicas, {policy}: {rates[-1]:.0f} requests/CPU s (bar >= 1,000)")
    single, double = step_us(1, times, scale), step_us(2, times, scale)
    details.append(f"a step: {single:.1f} us, of a pipeline of two stages {double:.1f} us (bar <= twice)")
    details.append(f"seed 0; simulated h100-sxm, host sglang-0.5; on {cpu_name()}")
    passed = min(rates) >= 1000 and double <= 2 * single
    evidence = Evidence(
        figure=f"{min(rates):.0f} requests/CPU s, slowest policy; two stages cost {double / single:.2f} times one",
        bar=">= 1,000; <= 2",
        passed=passed or smoke,  # time is measured in CI, never asserted
        details=tuple(details),
    )
    if not smoke:
        commit_page("speed_of_loops", "Speed of deployments in simulate()", "loops.7", evidence)
    return evidence
