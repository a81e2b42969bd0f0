"""What is said of a device that works behind others: the stages of a pipeline after the first answer no requests."""

from __future__ import annotations

import pytest

from testbed import simulate
from testbed.metrics.laws import Cause, device_time
from testbed.metrics.levels import levels
from testbed.metrics.window import Window, run_end_ns

STAGES = 3
GAP_S = 1.0
SCENARIO = {
    "model": "llama-3.1-8b",
    "device": {"constant": {"decode_ns": 3_000_000, "activation_ns": 500_000}},
    "host": "none",
    "engine": {"parallel": {"pp": STAGES}, "kv_tokens": 10_000, "prefix_cache": "none"},
    "workload": {
        "arrivals": {"kind": "constant", "rate_per_s": 1 / GAP_S},
        "lengths": {"prompt_tokens": 10, "output_tokens": 20},
        "count": 3,
    },
}


def test_no_stage_is_without_work_while_requests_are_in_the_system() -> None:
    """One request at a time: a stage is busy a third of it, and waits for the others, not for work."""
    run = simulate(SCENARIO)
    window = Window(0, run_end_ns(run.records))
    split = [device_time(run.records, window, stage) for stage in range(STAGES)]
    without = {one.total_ns(Cause.NO_WORK) for one in split}
    assert len(without) == 1
    served = sum(run.requests["finish_ns"] - run.requests["arrival_ns"])
    assert without == {window.duration_ns - served}
    assert run.aggregates()["bubble_no_work_percent"] == pytest.approx(100 * (1 - served / window.duration_ns))


def test_no_stage_holds_memory_once_all_have_left() -> None:
    run = simulate(SCENARIO)
    for stage in range(STAGES):
        state = levels(run.records, run.meta, stage)
        between = state.values["owned_tokens"][state.since_ns >= run.requests["finish_ns"].iloc[-1]]
        assert len(between) and not between.any()
