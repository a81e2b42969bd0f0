"""One prefill of 8k tokens of Llama-3.1-8B in bf16, against the speed of a matrix product.

Operations are those that causal attention needs: two for each weight of a layer's matrices and token, and for each
pair of a query and a key at or before it 4 x heads x head_dim a layer; the head counts once, for the last token. Time
is the step's on the device, from its first kernel to its last.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from testbed.kernels.measure import share, teraflops_per_second
from testbed.scenario.models import ModelSpec, load_model
from tests.gpu.ceilings import matmul_tflops
from tests.gpu.driver import Driver
from tests.gpu.setting import PAGE_SIZE, Row, is_gpu, opened, shape_of

PRESET = "llama-3.1-8b"
BAR = 0.6
REPEATS = 7


def flops(spec: ModelSpec, tokens: int) -> float:
    """Operations of a dense model's prefill of so many tokens."""
    pairs = tokens * (tokens + 1) / 2
    a_layer = 2 * spec.layer_linear_parameters * tokens + 4 * spec.heads * spec.head_dim * pairs
    return spec.layers * a_layer + 2 * spec.vocab * spec.hidden


def measure(device: torch.device) -> Iterator[Row]:
    """One row."""
    tokens = 8192 if is_gpu(device) else 64
    with shape_of(PRESET, device) as model, opened(model, device, 1, tokens + PAGE_SIZE, chunk=tokens) as runner:
        driver = Driver(runner, PAGE_SIZE, 1, tokens + PAGE_SIZE)
        times = []
        for _ in range(REPEATS):
            driver.lengths[:] = 0
            outputs = driver.prefill(0, tokens).wait()
            times.append(outputs.end_ns - outputs.start_ns)
        took = float(np.median(times[1:]))
        rate, ceiling = teraflops_per_second(flops(load_model(model), tokens), took / 1e3), matmul_tflops(device)
        yield Row(
            f"one prompt of {tokens} tokens in one step",
            f"{took / 1e6:.1f} ms, {tokens / took * 1e9:.0f} tokens/s, {rate:.0f} TFLOP/s = {share(rate, ceiling)} of "
            "the matrix product",
            f"{BAR:.0%} of the matrix product or more",
            rate >= BAR * ceiling,
            {"ns": took, "tflops": rate, "of_matmul": rate / ceiling},
        )
