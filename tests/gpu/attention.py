"""The decode attention kernel alone, against the speed of a copy: keys and values of every context read once.

Pages lie at random; caches are cold. The plan of the splits is made once a step, not once a layer, so it is timed
apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from testbed.kernels.decode_attention import _Case
from testbed.kernels.measure import gigabytes_per_second, share
from tests.gpu.ceilings import copy_gbs, us_of
from tests.gpu.setting import Row, is_gpu

BAR = 0.85
LARGE = 256 * 1024
"""Tokens of all contexts from which the bar holds, where each is at least ``LONG``."""
LONG = 512
SHAPES = ((1, 1024), (1, 8192), (64, 1024), (256, 512), (512, 512), (256, 1024), (64, 4096), (16, 16384), (2, 131072))
"""(batch, context)."""
HEADS = (("Llama-3.1-8B", 32, 8, 128), ("Qwen3-0.6B", 16, 8, 128))
"""(model, query heads, KV heads, head dimension)."""


def measure(device: torch.device) -> Iterator[Row]:
    """One row a shape; without a bar where the contexts are few or short."""
    shapes, heads = (SHAPES, HEADS) if is_gpu(device) else (((2, 40),), (("tiny", 4, 2, 16),))
    copy = copy_gbs(device)
    for name, query_heads, kv_heads, head_dim in heads:
        for batch, context in shapes:
            case = _Case([context] * batch, query_heads, kv_heads, head_dim, device.type)
            planned = us_of(case.plan, device)
            took = us_of(case.attend, device)
            rate = gigabytes_per_second(case.moved, took)
            judged = batch * context >= LARGE and context >= LONG
            yield Row(
                f"{name}, batch {batch}, context {context}",
                f"{took:.1f} us, {rate:.0f} GB/s = {share(rate, copy)} of copy; plan {planned:.1f} us",
                f"{BAR:.0%} of copy or more" if judged else "",
                rate >= BAR * copy if judged else None,
                {"us": took, "plan_us": planned, "of_copy": rate / copy},
            )
