"""What the benchmarks of the kernels share: a median time, the two ceilings of the device, rows of a table.

A kernel that moves bytes is held against a copy, one that multiplies against a matrix product, both measured on the
same device minutes before: shares of a datasheet's peak would flatter or blame the wrong thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from testbed.kernels.interpreter import INTERPRETED

AheadOfTime = Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]
"""What ``ahead_of_time()`` of a kernel's module yields: (jit function, signature, constants, options), as the head of
``tests/kernels/test_ahead_of_time.py`` explains."""


def benchmark(table: Callable[[], None], tiny: Callable[[], None]) -> None:
    """The main of a benchmark: ``table`` on a GPU; without one say so, and run ``tiny`` where the interpreter is on."""
    if torch.cuda.is_available() and not INTERPRETED:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        table()
        return
    print("No GPU: nothing is measured.")
    if INTERPRETED:
        tiny()
        print("A tiny size ran in the interpreter.")


def median_us(work: Callable[[], object]) -> float:
    """Median device time (us) of ``work``, the L2 cache cold.

    ``work`` is captured in a CUDA graph and replayed, so the time of Python and of launches stays out: it must neither
    allocate outside of torch nor look at the device's results.
    """
    from triton.testing import do_bench

    work()  # compiles and warms up before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    milliseconds: float = do_bench(graph.replay, warmup=10, rep=100, return_mode="median")
    return milliseconds * 1e3


def copy_ceiling() -> float:
    """GB/s of a large copy within device memory: bytes read plus bytes written."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return gigabytes_per_second(2 * source.nbytes, median_us(lambda: target.copy_(source)))


def matmul_ceiling(dtype: torch.dtype = torch.bfloat16) -> float:
    """TFLOP/s of a large matrix product of torch, random operands."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return teraflops_per_second(2 * size**3, median_us(lambda: torch.mm(a, b, out=out)))


def gigabytes_per_second(moved: int, us: float) -> float:
    """GB/s from bytes and microseconds."""
    return moved / us * 1e-3


def teraflops_per_second(flops: float, us: float) -> float:
    """TFLOP/s from operations and microseconds."""
    return flops / us * 1e-6


def print_row(*cells: str | int | float) -> None:
    """One line of a table: words and counts as they are, figures with one digit."""
    print("  ".join(f"{_cell(cell):>12}" for cell in cells), flush=True)


def _cell(cell: str | int | float) -> str:
    return f"{cell:.1f}" if isinstance(cell, float) else str(cell)


def share(rate: float, ceiling: float) -> str:
    """``rate`` as per cent of the measured ceiling."""
    return f"{100 * rate / ceiling:.1f} %"
