"""How long work takes on the device: by the host's clock on a CPU, by events around replayed CUDA graphs on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter_ns
from typing import Protocol

import numpy as np
import torch

Work = Callable[[], object]


class Clock(Protocol):
    """Times work. It must not look at the device's results."""

    def bind(self, work: Work) -> Work:
        """``work`` made ready to be timed: compiled, and on CUDA a graph. It keeps no memory of its own."""
        ...

    def time_ns(self, work: Work, repeats: int) -> int:
        """Device time of one call, which ``bind`` returned: the median of ``repeats`` (CUDA: their mean), behind one
        that warms the caches as the layer before does in life."""
        ...


class HostClock:
    """For a device that is done when the call returns."""

    def bind(self, work: Work) -> Work:
        """See Clock."""

        def inferring() -> None:
            with torch.inference_mode():
                work()

        return inferring

    def time_ns(self, work: Work, repeats: int) -> int:
        """See Clock."""
        work()
        times = []
        for _ in range(repeats):
            begin = perf_counter_ns()
            work()
            times.append(perf_counter_ns() - begin)
        return int(np.median(times))


class CudaClock:
    """For a GPU: without the host's time of launching, but for work that no graph can hold."""

    def __init__(self, device: torch.device, *, graphs: bool) -> None:
        """``graphs``: the backend's operations do not wait for the device."""
        self._graphs = graphs
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def bind(self, work: Work) -> Work:
        """See Clock. All graphs share their memory: only one works at a time, and nobody reads its results."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # which copies what the work reads
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            work()  # compiles kernels, which a capture must not
            self._stream.synchronize()
            if not self._graphs:
                return work
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                work()
        return partial(_replay, graph, work)

    def time_ns(self, work: Work, repeats: int) -> int:
        """See Clock. The first call keeps the device busy until the others are queued behind it."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            work()
            begin.record()
            for _ in range(repeats):
                work()
            end.record()
        end.synchronize()
        return round(begin.elapsed_time(end) * 1e6 / repeats)


def _replay(graph: torch.cuda.CUDAGraph, work: Work) -> None:
    """``work`` is kept with its graph, which reads and writes the same tensors."""
    graph.replay()


def clock_of(device: torch.device, *, graphs: bool = True) -> Clock:
    """The clock of a device; ``graphs``: see CudaClock."""
    return CudaClock(device, graphs=graphs) if device.type == "cuda" else HostClock()
