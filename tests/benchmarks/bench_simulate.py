"""Speed, apart from the tests: ``python -m pytest tests/benchmarks/bench_*.py``.

Times are compared as ratios to the reference loop of the same run (``extra_info``): machines are shared and noisy.
Nothing here passes or fails by time; ``tests/evidence/simulate_3.py`` holds the figures against their bars.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from testbed import load_scenario, simulate
from testbed.memory import PageAllocator, RadixCache
from tests.evidence.simulate_3 import at_once, azure, fixed
from tests.evidence.speed import reference_us


def in_references(benchmark: Any, units: int) -> None:
    """Note the time a unit of work took, in reference loops."""
    reference_s = reference_us() * 1e-6
    benchmark.extra_info["reference_us"] = round(reference_s * 1e6, 1)
    benchmark.extra_info["references_a_unit"] = round(benchmark.stats.stats.min / units / reference_s, 3)


@pytest.mark.parametrize("leap", [True, False], ids=["leaping", "walking"])
@pytest.mark.parametrize("rows", [1, 32, 256])
def bench_decode_step(benchmark: Any, rows: int, leap: bool) -> None:
    scenario = load_scenario(at_once(rows, 600)).scenario
    benchmark.group = "decode step"
    run = benchmark.pedantic(lambda: simulate(scenario, leap=leap), rounds=3, warmup_rounds=1)
    in_references(benchmark, run.records.counters["steps"])


@pytest.mark.parametrize(
    "scenario",
    [fixed(1000, 10.0, 1024, 128), azure(1000, "llama-3.1-8b", "h100-sxm")],
    ids=["1024 in, 128 out", "azure lengths"],
)
def bench_request(benchmark: Any, scenario: dict[str, Any]) -> None:
    loaded = load_scenario(scenario).scenario
    benchmark.group = "request"
    run = benchmark.pedantic(lambda: simulate(loaded), rounds=3, warmup_rounds=1)
    in_references(benchmark, len(run.records.requests["id"]))


@pytest.mark.parametrize("page_size", [1, 64])
def bench_radix_round_trip(benchmark: Any, page_size: int) -> None:
    """Match, insert and evict a prompt of 1,024 tokens, half of it cached, in a full tree."""
    allocator = PageAllocator(200_000, page_size)
    cache = RadixCache(allocator)
    shared = np.arange(512, dtype=np.int32)
    state = {"next": 1000}

    def round_trip() -> None:
        state["next"] += 1
        tokens = np.concatenate((shared, np.full(512, state["next"], dtype=np.int32)))
        matched = len(cache.match(tokens).pages)
        need = (len(tokens) // page_size - matched) * page_size
        if allocator.available_tokens < need:
            cache.evict(need)
        pages = np.concatenate((cache.match(tokens).pages, allocator.alloc(need // page_size)))
        cache.insert(tokens, pages)

    benchmark.group = "radix"
    benchmark.pedantic(round_trip, rounds=20, iterations=100)
    in_references(benchmark, 1)
