"""What a decode step costs the host: spans of a real run on the CPU backend, at a full batch."""

from __future__ import annotations

from typing import Any

import numpy as np

from testbed.ports import Stage
from tests.engine.machine import runs_on, tiny_device
from tests.properties.world import VOCABULARY, burst, engine, run

WARM_STEPS = 20


def host_stages(rows: int, steps: int, loop: str = "normal", page_size: int = 1) -> dict[Stage, float]:
    """Median host time (us) of each stage over ``steps`` decode steps of ``rows`` requests. The model is tiny and
    computes in a process of its own: what is seen is the loop's thread alone."""
    prompt, outputs = 8, steps + WARM_STEPS
    kv_tokens = rows * (prompt + outputs + page_size)
    kv_tokens += -kv_tokens % page_size
    config = engine(
        loop=loop,
        max_running_requests=rows,
        page_size=page_size,
        max_prefill_tokens=rows * prompt,
        prefix_cache="chunk",
    )
    small = {"vocab_size": VOCABULARY, "hidden_size": 16, "max_position_embeddings": outputs + 64}
    with tiny_device(
        kv_tokens, page_size=page_size, max_running_requests=rows, in_process=False, config=small
    ) as device:
        outcome = run(
            config,
            burst(rows, prompt, outputs),
            kv_tokens=kv_tokens,
            context_length=outputs + 64,
            checks="delta",
            prove=False,
            device_of=runs_on(device),
        )
    return _medians(outcome.records.spans, outcome.records.steps, rows)


def _medians(spans: Any, steps: Any, rows: int) -> dict[Stage, float]:
    full = np.asarray(steps["step"])[(np.asarray(steps["decode_rows"]) == rows)][WARM_STEPS:-2]
    on_host = np.asarray(spans["lane"]) == 0
    names, of_step = np.asarray(spans["name"])[on_host], np.asarray(spans["step"])[on_host]
    took = (np.asarray(spans["end_ns"]) - np.asarray(spans["begin_ns"]))[on_host]
    chosen = np.isin(of_step, full)
    return {stage: float(np.median(took[chosen & (names == stage)])) / 1e3 for stage in Stage}
