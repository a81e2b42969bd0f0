"""The decode leap changes nothing but the time a simulation takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from testbed import Run, load_scenario, simulate
from testbed.batch import BatchShape, StepCost

ENGINES: list[dict[str, Any]] = [
    {},
    {"page_size": 16},
    {"preset": "sglang-0.5.1"},
    {"preset": "sglang-0.5.1", "page_size": 16},
    {"preset": "vllm-v1", "kv_tokens": 20_000},
    {"batching": "stall_free"},
    {"batching": "mixed_chunk", "chunked_prefill_size": 128},
    {"batching": "static"},
    {"kv_tokens": 4_000},
    {"kv_tokens": 4_000, "preset": "sglang-0.5.1"},
    {"kv_tokens": 4_000, "page_size": 64},
    {"prefix_cache": "chunk", "policy": "lof"},
    {"cuda_graph": False},
]


def run(engine: dict[str, Any], loop: str, max_new_tokens: Any, host: str, leap: bool) -> Run:
    scenario = {
        "model": "qwen3-0.6b",
        "host": host,
        "engine": {**engine, "loop": loop},
        "workload": {
            "arrivals": {"kind": "poisson", "rate_per_s": 12},
            "lengths": {"prompt_tokens": 300, "output_tokens": {"kind": "uniform", "low": 1, "high": 260}},
            "count": 60,
            "max_new_tokens": max_new_tokens,
        },
    }
    return simulate(load_scenario(scenario).scenario, leap=leap)


def differences(one: Run, other: Run) -> list[str]:
    """Names of the columns that are not equal to the byte."""
    found = [] if one.records.decisions == other.records.decisions else ["decisions"]
    if not np.array_equal(one.records.token_times_ns, other.records.token_times_ns):
        found.append("token_times_ns")
    for part in ("requests", "steps", "spans"):
        left, right = getattr(one.records, part), getattr(other.records, part)
        assert list(left) == list(right)
        found += [f"{part}.{name}" for name in left if not np.array_equal(left[name], right[name])]
    return found


@pytest.mark.parametrize("loop", ["normal", "overlap"])
@pytest.mark.parametrize("max_new_tokens", ["output", 512])
@pytest.mark.parametrize("engine", ENGINES, ids=[",".join(map(str, each.values())) or "default" for each in ENGINES])
def test_records_are_the_same_to_the_byte(engine: dict[str, Any], max_new_tokens: Any, loop: str) -> None:
    leaping = run(engine, loop, max_new_tokens, "sglang-0.5", leap=True)
    walking = run(engine, loop, max_new_tokens, "sglang-0.5", leap=False)
    assert differences(leaping, walking) == []


@pytest.mark.parametrize("host", ["none", "vllm-v0", "testbed"])
@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_whatever_the_host(loop: str, host: str) -> None:
    assert differences(run({}, loop, "output", host, leap=True), run({}, loop, "output", host, leap=False)) == []


def test_leaps_do_happen() -> None:
    leaping = run({}, "overlap", "output", "sglang-0.5", leap=True).records.counters
    walking = run({}, "overlap", "output", "sglang-0.5", leap=False).records.counters
    assert leaping["steps"] == walking["steps"] and leaping["check_pages"] >= leaping["steps"]
    assert leaping["steps_leapt"] > 0.5 * leaping["steps"] and "leaps" not in walking


@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_no_leap_over_arrivals_that_are_tied_to_iterations(loop: str) -> None:
    scenario = {
        "model": "qwen3-0.6b",
        "host": "sglang-0.5",
        "engine": {"loop": loop},
        "workload": {
            "arrivals": {"kind": "at_iteration", "iterations": [0, 50, 120]},
            "lengths": {"prompt_tokens": 300, "output_tokens": 300},
            "count": 3,
        },
    }
    leaping, walking = (simulate(load_scenario(scenario).scenario, leap=leap) for leap in (True, False))
    assert differences(leaping, walking) == []
    assert len(set(leaping.records.requests["arrival_ns"])) == 3


def test_tensor_parallel_launches_cost_by_row_too() -> None:
    """vLLM sends its scheduler output to the workers before each step: 40 + 0.35 us a row."""
    scenario = {
        "model": "qwen3-0.6b",
        "host": "vllm-v1",
        "engine": {"parallel": {"tp": 2}, "loop": "normal"},
        "workload": {"arrivals": "all_at_once", "lengths": {"prompt_tokens": 64, "output_tokens": 40}, "count": 20},
    }
    scenario["workload"]["arrivals"] = {"kind": "all_at_once"}  # type: ignore[index]
    leaping, walking = (simulate(load_scenario(scenario).scenario, leap=leap) for leap in (True, False))
    assert differences(leaping, walking) == []
    spans = leaping.records.spans
    launches = [
        end - begin
        for lane, name, begin, end in zip(spans["lane"], spans["name"], spans["begin_ns"], spans["end_ns"], strict=True)
        if lane == 0 and name == 3
    ]
    assert min(launches) > 20_000 + 40_000 + 20 * 350


class TurnsEager:
    """A user's own cost model: from 400 tokens of context on its steps are no graph, and cost nothing to launch
    at every third length."""

    def __init__(self, *parts: object) -> None:
        pass

    def price(self, shape: BatchShape) -> StepCost:
        longest = shape.context_max
        return StepCost(2_000_000, 0 if longest % 3 == 0 else longest, longest < 400)


@pytest.mark.parametrize("host", ["sglang-0.5", "none"])
@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_whatever_the_cost_model(loop: str, host: str) -> None:
    engine = {"loop": loop}
    workload = {
        "arrivals": {"kind": "poisson", "rate_per_s": 6},
        "lengths": {"prompt_tokens": 300, "output_tokens": 200},
        "count": 12,
    }
    own = f"{__file__}:TurnsEager"
    scenario = {"model": "qwen3-0.6b", "host": host, "cost_model": own, "engine": engine, "workload": workload}
    leaping, walking = (simulate(load_scenario(scenario).scenario, leap=leap) for leap in (True, False))
    assert differences(leaping, walking) == []
    assert leaping.records.counters["steps_leapt"] > 100


def test_progress_is_reported_across_leaps() -> None:
    scenario = {
        "model": "qwen3-0.6b",
        "host": "sglang-0.5",
        "workload": {
            "arrivals": {"kind": "all_at_once"},
            "lengths": {"prompt_tokens": 64, "output_tokens": 3000},
            "count": 4,
        },
    }
    seen: list[int] = []
    done = simulate(load_scenario(scenario).scenario, progress=lambda now_ns, *_: seen.append(now_ns))
    assert done.records.counters["steps_leapt"] > 2000
    assert len(seen) >= 3 and seen == sorted(set(seen))
