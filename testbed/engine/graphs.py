"""CUDA graphs of the decode step: one for each of a list of batch sizes, so that a step is one launch of the host."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor

from testbed.batch import captured_sizes

DecodeForward = Callable[[Tensor, Tensor], Tensor]
"""(slots int32 [b], positions int32 [b]) to logits float32 [b, vocab]; nothing in it may wait for the host."""


class DecodeGraphs:
    """Captured decode steps. A batch takes the next larger graph; its padding rows use the spare slot, whose KV is page
    0, at position 0."""

    def __init__(self, forward: DecodeForward, largest: int, spare_slot: int, device: torch.device) -> None:
        """Captures at once, the largest first, so that all share the memory that it reserved."""
        self.sizes = captured_sizes(largest)
        self._spare = spare_slot
        self._slots = torch.full((largest,), spare_slot, dtype=torch.int32, device=device)
        self._positions = torch.zeros(largest, dtype=torch.int32, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        for size in reversed(self.sizes):
            inputs = (self._slots[:size], self._positions[:size])
            with torch.cuda.stream(stream):
                forward(*inputs)  # compiles kernels and lets libraries allocate, which a capture must not
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                logits = forward(*inputs)
            self._graphs[size] = (graph, logits)
        torch.cuda.current_stream(device).wait_stream(stream)

    def fits(self, rows: int) -> bool:
        """Whether there is a graph for so many rows."""
        return 0 < rows <= self.sizes[-1]

    def replay(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Logits of these rows, float32 [b, vocab]; valid until the next replay."""
        rows = len(slots)
        size = self.sizes[bisect_left(self.sizes, rows)]
        self._slots[:rows].copy_(slots)
        self._positions[:rows].copy_(positions)
        if size > rows:
            self._slots[rows:size].fill_(self._spare)
            self._positions[rows:size].zero_()
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:rows]
