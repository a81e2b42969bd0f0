"""The overlapped loop against the normal one on the device, with our own host and with SGLang's host time injected.

64 requests at once, prompts of 256 tokens, 256 tokens out, greedy; tokens/s over the whole run, prefills included.
*Host* is the median of what a full decode step costs the loop's thread, every stage but the wait for the device;
*device* the median of its time there. If nothing else counted, a step would take host + device in the normal loop and
the larger of the two in the overlapped one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from testbed import load_scenario
from testbed.api import engine_options, execute_on
from testbed.engine.device import Device, open_device
from testbed.metrics.run import Run
from testbed.ports import Stage
from tests.gpu.setting import PAGE_SIZE, Row, is_gpu, shape_of

PRESETS = ("qwen3-0.6b", "llama-3.1-8b")
HOSTS = (None, "sglang-0.5")
LOOPS = ("normal", "overlap")
DEVICE_LANE = 1


class Size(NamedTuple):
    rows: int
    prompt: int
    outputs: int


class Timed(NamedTuple):
    """Of one run."""

    tokens_per_s: float
    host_us: float
    device_us: float


def measure(device: torch.device) -> Iterator[Row]:
    """Two rows a model, one for each host."""
    size = Size(64, 256, 256) if is_gpu(device) else Size(3, 8, 8)
    for preset in PRESETS:
        with shape_of(preset, device) as model:
            options = engine_options(load_scenario(_scenario(model, size, "normal", None)).scenario)
            with open_device(options, in_process=True) as opened:
                for host in HOSTS:
                    yield _compare(preset, opened, model, size, host)


def _compare(preset: str, opened: Device, model: str, size: Size, host: str | None) -> Row:
    normal, overlap = (_run(opened, _scenario(model, size, loop, host), size.rows) for loop in LOOPS)
    gain = overlap.tokens_per_s / normal.tokens_per_s - 1
    expected = (normal.host_us + normal.device_us) / max(overlap.host_us, overlap.device_us) - 1
    return Row(
        f"{preset}, batch {size.rows}, host: {host or 'our own'}",
        f"normal {normal.tokens_per_s:.0f}, overlap {overlap.tokens_per_s:.0f} tokens/s: {gain:+.1%} (host and device "
        f"times alone say {expected:+.1%}); host {normal.host_us:.0f} and {overlap.host_us:.0f} us a step, device "
        f"{normal.device_us:.0f} and {overlap.device_us:.0f}",
        values={
            f"{loop}_{name}": value
            for loop, timed in zip(LOOPS, (normal, overlap), strict=True)
            for name, value in timed._asdict().items()
        },
    )


def _scenario(model: str, size: Size, loop: str, host: str | None) -> dict[str, Any]:
    """One of the runs. All are greedy: the device is told nothing of its slots that another run could find there."""
    tokens = size.prompt + size.outputs + PAGE_SIZE
    tokens += -tokens % PAGE_SIZE
    return {
        "model": model,
        "device": "h100-sxm",
        "host_inject": host,
        "engine": {
            "loop": loop,
            "page_size": PAGE_SIZE,
            "max_running_requests": size.rows,
            "cuda_graph_max_bs": size.rows,
            "context_length": tokens,
            "kv_tokens": size.rows * tokens,
            "prefix_cache": "chunk",
        },
        "workload": {
            "count": size.rows,
            "arrivals": {"kind": "all_at_once"},
            "lengths": {
                "prompt_tokens": {"kind": "fixed", "value": size.prompt},
                "output_tokens": {"kind": "fixed", "value": size.outputs},
            },
        },
    }


def _run(opened: Device, scenario: dict[str, Any], rows: int) -> Timed:
    run = execute_on(opened, load_scenario(scenario).scenario)
    times = run.records.token_times_ns
    seconds = float(times.max() - run.requests["arrival_ns"].min()) / 1e9
    return Timed(len(times) / seconds, *_step_times(run, rows))


def _step_times(run: Run, rows: int) -> tuple[float, float]:
    """Median host and device time (us) of a decode step of all rows."""
    steps = run.steps
    full = steps[steps["decode_rows"] == rows]
    spans = run.spans
    waits = spans["label"] == Stage.WAIT.name.lower()
    host = spans[(spans["lane"] != DEVICE_LANE) & ~waits & spans["step"].isin(full["step"])]
    on_host = host.groupby("step")["duration_ns"].sum()
    return float(np.median(on_host)) / 1e3, float(np.median(full["end_ns"] - full["start_ns"])) / 1e3
