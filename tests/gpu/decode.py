"""Decoding of Llama-3.1-8B in bf16 at 1k tokens of context, against the speed of a copy.

Two steps are in flight, as in the overlapped loop. The *period* is the time from the end of a step to the end of the
next, over all steps but the first three: tokens/s = batch / period. *Bytes* of a step are what it must read: every
weight once, but of an embedding that is not the head too; and the KV of all contexts. GB/s = bytes / period.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from testbed.engine.runner import ModelRunner
from testbed.kernels.measure import gigabytes_per_second, share
from testbed.scenario.models import ModelSpec, load_model
from tests.gpu.ceilings import copy_gbs
from tests.gpu.driver import Driver, device_ns, period_ns
from tests.gpu.setting import PAGE_SIZE, Row, is_gpu, opened, shape_of

PRESET = "llama-3.1-8b"
DTYPE = "bfloat16"
BAR, AIM = 0.75, 0.85


def bytes_read(spec: ModelSpec, context_tokens: float) -> float:
    """Of one decode step over contexts of so many tokens in all."""
    not_read = 0 if spec.tie_embeddings else spec.vocab * spec.hidden * 2
    return spec.weight_bytes(DTYPE) - not_read + context_tokens * spec.kv_bytes_per_token(DTYPE)


def measure(device: torch.device) -> Iterator[Row]:
    """One row a batch size; the bar is for one request."""
    batches, context, steps = ((1, 8, 64, 256), 1024, 64) if is_gpu(device) else ((1, 3), 40, 8)
    most_tokens = context + steps
    with (
        shape_of(PRESET, device) as model,
        opened(model, device, max(batches), most_tokens, chunk=most_tokens) as runner,
    ):
        for rows in batches:
            yield _row(runner, load_model(model), rows, context, steps, copy_gbs(device))


def _row(runner: ModelRunner, spec: ModelSpec, rows: int, context: int, steps: int, copy: float) -> Row:
    driver = Driver(runner, PAGE_SIZE, rows, context + steps)
    driver.fill(context - steps // 2, chunk=context)
    outputs = driver.decode(steps)
    period, on_device = period_ns(outputs), device_ns(outputs)
    rate = gigabytes_per_second(bytes_read(spec, rows * context), period / 1e3)
    graph = "a graph" if outputs[-1].graph else "eager"
    judged = rows == 1
    return Row(
        f"batch {rows}, context {context}, {graph}",
        f"{rows / period * 1e9:.1f} tokens/s, {period / 1e6:.3f} ms a step ({on_device / 1e6:.3f} on the device), "
        f"{rate:.0f} GB/s = {share(rate, copy)} of copy",
        f"{BAR:.0%} of copy or more (aim {AIM:.0%})" if judged else "",
        rate >= BAR * copy if judged else None,
        {"tokens_per_s": rows / period * 1e9, "period_ns": period, "device_ns": on_device, "of_copy": rate / copy},
    )
