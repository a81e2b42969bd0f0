"""What the device can do at best: the ceilings that no operator of its profile may beat.

A copy is timed over working sets from a cache's to the memory's, because a small model lives in the caches; a matrix
product over sizes up to one that fills the device. The best of each is the ceiling.
"""

from __future__ import annotations

import os

import torch

from testbed.engine.measure.clock import Clock, clock_of

DTYPES = ("float32", "bfloat16", "float16")
ROUNDS = 5
LONGEST_NS = 50_000_000
"""Sizes grow while one call is expected to take less than this."""


def copy_rate(device: torch.device) -> float:
    """Bytes read plus bytes written in a ns (GB/s), at best."""
    clock, best = clock_of(device), 0.0
    source = torch.randn(1 << (28 if device.type == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    size = 1 << 12
    while size <= len(source):
        time_ns = _best_ns(clock, source[:size], target[:size])
        best = max(best, 8 * size / time_ns)
        size *= 2
    return best


def _best_ns(clock: Clock, source: torch.Tensor, target: torch.Tensor) -> int:
    work = clock.bind(lambda: target.copy_(source))
    repeats = max(1, min(50, (1 << 24) // len(source)))
    return max(1, min(clock.time_ns(work, repeats) for _ in range(ROUNDS)))


def matrix_rate(device: torch.device, dtype: str) -> float:
    """FLOP in a ns (1e-3 TFLOP/s) of a product of square matrices of random numbers, at best."""
    clock, best, size = clock_of(device), 0.0, 128
    while size <= 8192:
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)
        time_ns = _product_ns(clock, a, b, out)
        best = max(best, 2 * size**3 / time_ns)
        if time_ns > LONGEST_NS // 8:
            break
        size *= 2
    return best


def _product_ns(clock: Clock, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> int:
    work = clock.bind(lambda: torch.mm(a, b, out=out))
    return max(1, min(clock.time_ns(work, 2) for _ in range(ROUNDS)))


def memory_bytes(device: torch.device) -> int:
    """All memory of the device; of a CPU, that of its machine."""
    if device.type == "cuda":
        total: int = torch.cuda.get_device_properties(device).total_memory
        return total
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
