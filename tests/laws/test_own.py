"""Researchers bring their own strategy, policy, event loop and cost model as ``file.py:name``, without a fork."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from testbed import simulate
from testbed.metrics.laws import violations
from testbed.metrics.run import Run

OWN = Path(__file__).parent / "own" / "alternate.py"
WORKLOAD = {
    "arrivals": {"kind": "poisson", "rate_per_s": 100},
    "lengths": {
        "prompt_tokens": {"kind": "uniform", "low": 50, "high": 800},
        "output_tokens": {"kind": "uniform", "low": 1, "high": 60},
    },
    "count": 120,
}


def run(**fields: Any) -> Run:
    engine = {"max_running_requests": 4, **fields.pop("engine", {})}
    done = simulate(
        {"name": "own", "model": "qwen3-0.6b", "host": "sglang-0.5", "engine": engine, "workload": WORKLOAD, **fields}
    )
    assert violations(done.records) == []
    assert set(done.records.requests["finish_reason"]) == {"length"}
    return done


def test_own_strategy() -> None:
    """A prefill follows a prefill only where nobody could decode; under the built-in strategy others wait meanwhile."""
    stalls = {}
    for batching in ("prefill_first", f"{OWN}:Alternate"):
        steps = run(engine={"batching": batching, "chunked_prefill_size": 256, "loop": "normal"}).records.steps
        again = (steps["mode"][1:] == 1) & (steps["mode"][:-1] == 1)
        stalls[batching] = int((again & (steps["running"][1:] > 0)).sum())
    assert stalls["prefill_first"] > 0 == stalls[f"{OWN}:Alternate"]


@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_own_policy(loop: str) -> None:
    """The newest goes first: of requests that wait together, a later one is scheduled no later."""
    overtaken = {}
    for policy in ("fcfs", f"{OWN}:newest_first"):
        started = np.asarray(run(engine={"policy": policy, "loop": loop}).records.requests["first_scheduled_ns"])
        overtaken[policy] = int((np.diff(started) < 0).sum())
    assert overtaken["fcfs"] == 0
    assert overtaken[f"{OWN}:newest_first"] > 20


def test_own_loop() -> None:
    """It decides as the normal loop does, but pays for a second look at the inbox."""
    own, normal = (run(engine={"loop": loop}) for loop in (f"{OWN}:double_check", "normal"))
    assert own.meta["loop"] == f"{OWN}:double_check"
    assert own.records.requests["output_tokens"].tolist() == normal.records.requests["output_tokens"].tolist()
    received = [
        int((np.asarray(each.records.spans["name"])[each.records.spans["lane"] == 0] == 0).sum())
        for each in (own, normal)
    ]
    assert received[0] > 1.5 * received[1]


def test_own_cost_model() -> None:
    steps = run(cost_model=f"{OWN}:TokenCost").records.steps
    assert steps["gpu_ns"].tolist() == (1_000 * steps["new_tokens"] + 10_000 * steps["decode_rows"]).tolist()
