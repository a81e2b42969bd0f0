"""What the device can do at best: a large copy within its memory, a large matrix product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from time import perf_counter_ns

import torch

from testbed.kernels import measure as kernels
from tests.gpu.setting import Row, is_gpu

TINY = 64


def us_of(work: Callable[[], object], device: torch.device) -> float:
    """Median device time (us), cold caches; on a CPU, of one call."""
    if is_gpu(device):
        return kernels.median_us(work)
    begin = perf_counter_ns()
    work()
    return (perf_counter_ns() - begin) / 1e3


@cache
def copy_gbs(device: torch.device) -> float:
    """GB/s of a copy: bytes read plus bytes written."""
    if is_gpu(device):
        return kernels.copy_ceiling()
    source = torch.randn(TINY, TINY)
    target = torch.empty_like(source)
    return kernels.gigabytes_per_second(2 * source.nbytes, us_of(lambda: target.copy_(source), device))


@cache
def matmul_tflops(device: torch.device) -> float:
    """TFLOP/s of a bfloat16 matrix product on random numbers."""
    if is_gpu(device):
        return kernels.matmul_ceiling()
    a, b = (torch.randn(TINY, TINY) for _ in range(2))
    return kernels.teraflops_per_second(2 * TINY**3, us_of(lambda: a @ b, device))


def measure(device: torch.device) -> Iterator[Row]:
    """Both ceilings. Every section that needs one measures it anew, minutes before its own figures."""
    copy, matmul = copy_gbs(device), matmul_tflops(device)
    yield Row("copy within device memory, 1 GiB", f"{copy:.0f} GB/s read plus written", values={"gb_per_s": copy})
    yield Row("matrix product, bf16, 8192 x 8192 x 8192", f"{matmul:.0f} TFLOP/s", values={"tflops": matmul})
