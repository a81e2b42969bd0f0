"""Speed of the engine on a CPU: what the host does in a step. As in ``bench_simulate``, nothing passes or fails by
time; ``python -m tests.evidence engine.8`` holds the figure against its bar. Kernels have benchmarks of their own."""

from __future__ import annotations

from typing import Any

import pytest

from tests.benchmarks.bench_simulate import in_references
from tests.engine.host_path import host_stages

STEPS = 200


@pytest.mark.parametrize("loop", ["normal", "overlap"])
@pytest.mark.parametrize("rows", [1, 32, 256])
def bench_host_path(benchmark: Any, rows: int, loop: str) -> None:
    """A real run of decode steps with a tiny model; ``extra_info`` has the host's microseconds a step, by stage."""
    benchmark.group = "host path of a decode step"
    stages = benchmark.pedantic(lambda: host_stages(rows, STEPS, loop), rounds=3)
    benchmark.extra_info.update({f"{stage.name.lower()}_us": round(took, 1) for stage, took in stages.items()})
    in_references(benchmark, STEPS)
