"""A device opened to be measured: its operators one by one, and whole steps as a loop launches them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from testbed.engine.build import LocalDevice, build_runner
from testbed.engine.device import Device, open_device
from testbed.engine.measure import ceilings
from testbed.engine.measure.clock import Work, clock_of
from testbed.engine.measure.operators import OperatorBench, needs_of
from testbed.engine.measure.steps import StepBench, StepShape
from testbed.engine.options import EngineOptions
from testbed.sampling import SamplingParams

HOLD_CYCLES = 50_000_000
"""Cycles for which a GPU is kept busy, some 25 ms: the host queues four eager steps meanwhile."""


@dataclass(frozen=True)
class Ceilings:
    """What the device can do at best."""

    copy_rate: float
    """Bytes read plus bytes written, a ns."""
    matrix_rates: dict[str, float]
    """FLOP a ns by dtype."""
    memory_bytes: int


class DeviceBench:
    """Times a model's operators and steps. On a CPU, operators are timed in this process, with as many threads as the
    worker process has, and steps in that process: what a step costs there is more than computing."""

    def __init__(self, local: LocalDevice, stepping: Device, options: EngineOptions, params: SamplingParams) -> None:
        """``local``: the model in this process; ``stepping``: where its steps run."""
        self.info = local.info
        self.is_cuda = self.info.kind == "cuda"
        device = _device()
        self._runner = local.runner
        self._operators = OperatorBench(self._runner, device, min(options.chunk_tokens, self.info.kv_tokens))
        self._steps = StepBench(stepping, options, params, needs_of(params), self._hold)
        self._clock = clock_of(device, graphs=self.info.backend == "triton")
        self._params = params

    @property
    def graph_rows(self) -> list[int]:
        """Rows of decode steps that are CUDA graphs; empty without any."""
        return self._runner.graphs.sizes if self._runner.graphs else []

    def operator(self, name: str, tokens: int) -> Work:
        """See ``OperatorBench.work``; and ``sampling`` of so many rows. Ready for ``time_ns``."""
        if name == "sampling":
            return self._clock.bind(self._operators.sampling(tokens, self._params))
        return self._clock.bind(self._operators.work(name, tokens))

    def decode_attention(self, contexts: Sequence[int]) -> Work:
        """Decode attention of rows with these contexts in every layer, ready for ``time_ns``."""
        return self._clock.bind(self._operators.decode_attention(contexts))

    def prefill_attention(self, new_tokens: Sequence[int], prefix_tokens: Sequence[int]) -> Work:
        """Prefill attention of such rows in every layer, ready for ``time_ns``."""
        return self._clock.bind(self._operators.prefill_attention(new_tokens, prefix_tokens))

    def time_ns(self, work: Work, repeats: int) -> int:
        """Device time of one call."""
        return self._clock.time_ns(work, repeats)

    def fill(self, tokens: int, chunk: int, seconds: float) -> int:
        """Write the KV that steps will read, as ``StepBench.fill``; where they run in this process, ``OperatorBench``
        has."""
        return tokens if self.is_cuda else self._steps.fill(tokens, chunk, seconds)

    def period_ns(self, shape: StepShape, *, graph: bool) -> int:
        """Time from step to step; ``graph``: a decode step by its CUDA graph."""
        graphs = self._runner.graphs
        if not graph:
            self._runner.graphs = None
        try:
            return self._steps.period_ns(shape)
        finally:
            self._runner.graphs = graphs

    def _hold(self) -> None:
        if self.is_cuda:
            with self._runner.queue.computing():
                torch.cuda._sleep(HOLD_CYCLES)

    def release(self) -> None:
        """Let go of the model and of all graphs, so that the memory is free when the device is closed."""
        vars(self).clear()


def measure_ceilings() -> Ceilings:
    """The ceilings of this machine's device, in every dtype that a scenario may name."""
    device = _device()
    with _threads(device):
        flops = {dtype: ceilings.matrix_rate(device, dtype) for dtype in ceilings.DTYPES}
        found = Ceilings(ceilings.copy_rate(device), flops, ceilings.memory_bytes(device))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the engine sizes its KV by what is free
    return found


@contextmanager
def open_bench(options: EngineOptions, params: SamplingParams) -> Iterator[DeviceBench]:
    """The model on this machine's device, rows drawing as ``params`` say. Raises InputError like ``open_device``."""
    device = _device()
    with ExitStack() as stack:
        stack.enter_context(_threads(device))
        local = stack.enter_context(LocalDevice(build_runner(options, device)))
        stepping = local if device.type == "cuda" else stack.enter_context(open_device(options, in_process=False))
        bench = DeviceBench(local, stepping, options, params)
        stack.callback(bench.release)
        yield bench


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _threads(device: torch.device) -> Iterator[None]:
    """On a CPU, compute with the threads that ``ProcessDevice`` gives its worker."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
