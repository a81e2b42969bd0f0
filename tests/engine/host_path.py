"""What a decode step costs the host: spans of a real run on the CPU backend, at a full batch."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from testbed.api import execute
from testbed.ports import Stage
from tests.engine.machine import write_config

PROMPT_TOKENS = 8
WARM_STEPS = 20


def host_stages(rows: int, steps: int, loop: str = "normal", page_size: int = 1) -> dict[Stage, float]:
    """Median host time (us) of each stage over ``steps`` decode steps of ``rows`` requests. The model is tiny and
    computes in a process of its own: what is seen is the loop's thread alone."""
    outputs = steps + WARM_STEPS
    with TemporaryDirectory() as folder:
        model = write_config(Path(folder), vocab_size=512, max_position_embeddings=outputs + 64)
        run = execute(
            {
                "model": str(model),
                "engine": {
                    "loop": loop,
                    "dtype": "float32",
                    "page_size": page_size,
                    "max_running_requests": rows,
                    "kv_tokens": rows * (PROMPT_TOKENS + outputs + 2 * page_size),
                    "max_prefill_tokens": rows * PROMPT_TOKENS,
                },
                "workload": {
                    "arrivals": {"kind": "all_at_once"},
                    "lengths": {"prompt_tokens": PROMPT_TOKENS, "output_tokens": outputs},
                    "count": rows,
                },
            }
        )
    return _medians(run.records.spans, run.records.steps, rows)


def _medians(spans: Any, steps: Any, rows: int) -> dict[Stage, float]:
    full = np.asarray(steps["step"])[(np.asarray(steps["decode_rows"]) == rows)][WARM_STEPS:-2]
    on_host = np.asarray(spans["lane"]) == 0
    names, of_step = np.asarray(spans["name"])[on_host], np.asarray(spans["step"])[on_host]
    took = (np.asarray(spans["end_ns"]) - np.asarray(spans["begin_ns"]))[on_host]
    chosen = np.isin(of_step, full)
    return {stage: float(np.median(took[chosen & (names == stage)])) / 1e3 for stage in Stage}
