"""A pipeline's makespan is the closed form for equal stages, an independent calculation's for unequal ones.

Equal stages take (n + P - 1) slots; unequal ones what recurrences of ``tests/loops/test_pipeline.py`` say, which know
nothing of loops and channels. No run is faster than P x (filled micro-batches / P) / (1 + share of communication).
"""

from __future__ import annotations

import numpy as np

from tests.evidence.evidence import Evidence
from tests.loops.stages import PIPELINES, pipeline, run_stages
from tests.loops.test_pipeline import MODELS, constant, filled

STEP_NS, HOP_NS = 1_000, (0, 90, 400)


def equal_stages() -> tuple[int, list[str]]:
    """How many were tried, and what was wrong."""
    tried, wrong = 0, []
    for loop in PIPELINES:
        for stages in (2, 3, 4, 8):
            for outputs in (1, 2, 5, 20):
                config = pipeline(stages, max_running_requests=stages)
                staged = run_stages(config, filled(stages, outputs), loop=PIPELINES[loop], devices=[constant(STEP_NS)])
                found, expected = staged.first.makespan_ns(), (stages * outputs + stages - 1) * STEP_NS
                tried += 1
                if found != expected:
                    wrong.append(f"{loop}, {stages} stages, {outputs} tokens: {found} ns, not {expected}")
    return tried, wrong


def unequal_stages(count: int) -> tuple[int, list[str]]:
    """As ``equal_stages``, with costs drawn."""
    random, wrong = np.random.default_rng(0), []
    for _ in range(count):
        stages, outputs = int(random.integers(2, 5)), int(random.integers(1, 13))
        costs = tuple(random.integers(1, 900, stages).tolist())
        for loop, model in MODELS.items():
            config, devices = pipeline(stages, max_running_requests=stages), [constant(cost) for cost in costs]
            staged = run_stages(config, filled(stages, outputs), loop=PIPELINES[loop], devices=devices)
            found, expected = staged.first.makespan_ns(), model(costs, stages * outputs)
            if found != expected:
                wrong.append(f"{loop}, stages of {costs} ns, {outputs} tokens: {found} ns, not {expected}")
    return 2 * count, wrong


def bounded() -> tuple[float, list[str]]:
    """The highest throughput over its bound, and what was above it."""
    highest, wrong = 0.0, []
    for loop in PIPELINES:
        for stages in (2, 4):
            for filled_ones in range(1, stages + 1):
                for hop_ns in HOP_NS:
                    staged = run_stages(
                        pipeline(stages, max_running_requests=stages),
                        filled(filled_ones, 60),
                        loop=PIPELINES[loop],
                        devices=[constant(STEP_NS)],
                        activation_ns=hop_ns,
                    )
                    # throughput <= bound, with both sides multiplied out: whole numbers
                    least_ns, found_ns = 60 * (stages * STEP_NS + (stages - 1) * hop_ns), staged.first.makespan_ns()
                    highest = max(highest, least_ns / found_ns)
                    if found_ns < least_ns:
                        wrong.append(f"{loop}, {filled_ones} of {stages} filled, hops of {hop_ns} ns: above the bound")
    return highest, wrong


def check(smoke: bool) -> Evidence:
    """All equal stages, some or many unequal ones, and the bound."""
    equal, wrong = equal_stages()
    unequal, more = unequal_stages(20 if smoke else 400)
    highest, above = bounded()
    wrong += [*more, *above]
    return Evidence(
        figure=f"{equal} runs of equal and {unequal} of unequal stages: {len(wrong)} off by 1 ns or more; highest "
        f"throughput {highest:.4f} of its bound",
        bar="none; at most 1",
        passed=not wrong,
        details=tuple(wrong[:20]),
    )
