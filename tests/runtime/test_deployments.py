"""Deployments on paced threads and in virtual time: how they end, and what they leave."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest

from testbed import load_scenario, simulate
from testbed.api import execute
from testbed.deployment import build_engines
from testbed.deployment.paced import PacedDeployment
from testbed.runtime.wall import WallClock
from testbed.scenario.errors import InputError
from testbed.scenario.schema import Scenario

NAP_S = 0.2


def scenario(count: int = 20, rate_per_s: float = 400, **fields: Any) -> Scenario:
    lengths = {"prompt_tokens": {"kind": "fixed", "value": 40}, "output_tokens": {"kind": "fixed", "value": 6}}
    engine = {"kv_tokens": 4_000, **fields.pop("engine", {})}
    arrivals = {"kind": "constant", "rate_per_s": rate_per_s}
    document = {
        "model": "qwen3-0.6b",
        "device": {"constant": {"prefill_ns": 300_000, "decode_ns": 100_000}},
        "host": "none",
        "engine": engine,
        "workload": {"arrivals": arrivals, "lengths": lengths, "count": count},
        **fields,
    }
    return load_scenario(document).scenario


SEVERAL: dict[str, dict[str, Any]] = {
    "replicas": {"engine": {"parallel": {"dp": 2}}},
    "stages": {"engine": {"parallel": {"pp": 2}}},
    "pairs": {"disaggregation": {"link": {"gb_per_s": 10}}},
    "pairs with stages": {"disaggregation": {"prefill_stages": 2, "link": {"gb_per_s": 10}}},
}
several = pytest.mark.parametrize("fields", SEVERAL.values(), ids=SEVERAL)


@several
def test_both_times_serve_everybody(fields: dict[str, Any]) -> None:
    for run in (simulate(scenario(**fields), checks="full"), execute(scenario(**fields), paced=True)):
        assert run.records.requests["finish_reason"] == ["length"] * 20
        assert load_scenario({**run.scenario, "compare": None}).scenario == scenario(**fields)


@several
def test_a_request_to_end_is_heard_while_all_wait(fields: dict[str, Any]) -> None:
    """The next request is a minute away."""
    clock = WallClock()
    deployment = PacedDeployment(build_engines(scenario(3, 1 / 60, **fields)), clock, None)
    stop = threading.Timer(NAP_S, lambda: setattr(clock, "stopping", True))
    stop.start()
    deployment.run()
    assert deployment.traffic.ended < 3


@pytest.mark.parametrize("engine", [{"loop": "overlap_thread"}, {"parallel": {"pp": 2}}, {"parallel": {"dp": 2}}])
def test_a_request_to_end_is_heard_within_a_step(engine: dict[str, Any]) -> None:
    """The first step takes a minute, which nobody waits for."""
    clock, device = WallClock(), {"constant": {"prefill_ns": 60 * 10**9, "decode_ns": 0}}
    deployment = PacedDeployment(build_engines(scenario(device=device, engine=engine)), clock, None)
    threading.Timer(NAP_S, lambda: setattr(clock, "stopping", True)).start()
    deployment.run()
    assert clock.now_ns() < 20 * 10**9 and deployment.traffic.ended == 0


def test_a_failure_in_one_loop_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = build_engines(scenario(2_000, 50, **SEVERAL["replicas"]))

    def fail(now_ns: int) -> None:
        raise ValueError("this loop fails")

    monkeypatch.setattr(engines[1].scheduler, "get_next_batch_to_run", fail)
    with pytest.raises(ValueError, match="this loop fails"):
        PacedDeployment(engines, WallClock(), None).run()


def test_what_a_user_heard_is_recorded() -> None:
    """A prefill engine that is full answers, and the decode engine is told to give up: an error, not an abort."""
    pairs = {"disaggregation": {"link": {"gb_per_s": 10}}, "engine": {"max_queued_requests": 1}}
    run = simulate(scenario(rate_per_s=1e6, **pairs))
    assert set(run.records.requests["finish_reason"]) == {"length", "error"}


def test_a_loop_that_returns_is_refused(tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text("async def returns(loop):\n    await loop.recv_requests(block=True)\n")
    one = scenario(engine={"loop": f"{tmp_path}/mine.py:returns"})
    for run in (simulate, partial(execute, paced=True)):
        with pytest.raises(InputError, match="the event loop has returned"):
            run(one)


@pytest.mark.parametrize("parallel", [{}, {"dp": 2}])
def test_a_loop_of_ones_own_may_start_threads(parallel: dict[str, int], tmp_path: Any) -> None:
    own = "from testbed.loops.overlap_thread import event_loop_overlap_thread as theirs\n"
    (tmp_path / "threads.py").write_text(f"{own}async def mine(loop):\n    await theirs(loop)\n")
    one = scenario(engine={"loop": f"{tmp_path}/threads.py:mine", "parallel": parallel})
    for run in (simulate(one), execute(one, paced=True)):
        assert run.records.requests["finish_reason"] == ["length"] * 20
