"""From options to a model runner: weights, backend, memory, warm-up."""

from __future__ import annotations

import gc
import os
from types import TracebackType
from typing import Self

import numpy as np
import torch

from testbed.engine.backends.base import Backend
from testbed.engine.backends.torch_backend import TorchBackend
from testbed.engine.device import processor_name
from testbed.engine.faults import device_errors, free_bytes
from testbed.engine.inputs import StepInputs
from testbed.engine.models.config import DecoderConfig, load_decoder_config
from testbed.engine.models.weights import load_decoder
from testbed.engine.options import DeviceInfo, EngineOptions
from testbed.engine.queue import CpuQueue, CudaQueue, Queue
from testbed.engine.runner import ModelRunner, RunningStep
from testbed.memory.slots import slots_needed
from testbed.scenario.errors import InputError

CPU_KV_BYTES = 1 << 30
"""KV on a CPU where nobody says how much."""
WARM_LENGTHS = (1, 2, 15, 16, 17, 64, 100, 128, 256, 512, 1000, 1024)
"""Prefill lengths to warm up with: kernels are compiled anew for sizes that are 1 or a multiple of 16, and for every
size of a block of a mixture of experts."""


class LocalDevice:
    """A model runner of this process."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner: ModelRunner | None = runner
        self.info = runner.info

    @property
    def runner(self) -> ModelRunner:
        """What it runs on."""
        assert self._runner is not None, "the device is closed"
        return self._runner

    def launch(self, inputs: StepInputs) -> RunningStep:
        """See device.Device."""
        return self.runner.launch(inputs)

    def check(self) -> None:
        """See device.Device: it is this process."""

    def close(self) -> None:
        """See device.Device. A runner and its graphs refer to one another, so only the collector frees them; the next
        device in this process finds the memory that it measures."""
        self._runner = None
        gc.collect()
        if self.info.kind == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def build_runner(options: EngineOptions, device: torch.device) -> ModelRunner:
    """Load, allocate, capture and warm up. Raises InputError for what cannot run."""
    config = load_decoder_config(options.model)
    context_length = options.context_length or config.context_limit
    config.check_context(context_length)
    attention = options.attention
    if attention == "auto":
        attention = "triton" if device.type == "cuda" else "torch"
    with device_errors():
        backend = _backend(attention, options, config, device)
        dtype: torch.dtype = getattr(torch, options.dtype)
        decoder = load_decoder(
            options.model, dtype=dtype, device=device, backend=backend, seed=options.seed, std=options.weights_std
        )
        kv_tokens = _kv_tokens(options, config, context_length, device)
        info = DeviceInfo(
            name=torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
            kind=device.type,
            backend=attention,
            kv_tokens=kv_tokens // options.page_size * options.page_size,
            context_length=context_length,
            table_width=_table_width(options, context_length, kv_tokens),
            vocab_size=config.spec.vocab,
            eos_token_ids=config.eos_token_ids,
            notes=_notes(decoder.source, attention, options, device),
        )
        queue: Queue = CudaQueue(device, 4 * options.chunk_tokens) if device.type == "cuda" else CpuQueue()
        runner = ModelRunner(decoder, backend, queue, info, options, device)
        if device.type == "cuda":
            longest = max(1, min(options.chunk_tokens, context_length - 32, info.kv_tokens - 32))
            runner.warm_up([*(length for length in WARM_LENGTHS if length < longest), longest])
            torch.cuda.synchronize(device)
    return runner


def _notes(weights: str, attention: str, options: EngineOptions, device: torch.device) -> tuple[str, ...]:
    """What was chosen where the scenario says nothing."""
    notes = [f"weights: {weights}", f"attention backend: {attention}"]
    if device.type == "cpu":
        threads, cores = torch.get_num_threads(), os.cpu_count()
        notes.append(f"computed in {options.dtype} on {threads} of {cores} cores of this machine")
        if options.kv_tokens is None:
            notes.append(f"KV: at most {CPU_KV_BYTES / 1e9:.2f} GB on a CPU; engine.kv_tokens says otherwise")
    return tuple(notes)


def _backend(name: str, options: EngineOptions, config: DecoderConfig, device: torch.device) -> Backend:
    if name == "torch":
        return TorchBackend()
    if device.type == "cpu":
        _check_interpreter(options.dtype)
    try:
        from testbed.engine.backends.triton_backend import TritonBackend
    except ImportError as error:
        message, remedy = "the triton backend needs triton, which is not installed", "pip install 'testbed[gpu]'"
        raise InputError(message, where="engine.attention", remedy=f"{remedy}, or attention: torch") from error
    spec = config.spec
    return TritonBackend(options.max_running_requests, spec.heads, spec.kv_heads, spec.head_dim, device)


def _check_interpreter(dtype: str) -> None:
    """On a CPU, Triton's kernels run in its interpreter or not at all; in bfloat16 it computes garbage."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        remedy = "attention: auto, or torch; with TRITON_INTERPRET=1 in the environment they are interpreted, slowly"
        raise InputError("Triton's kernels need CUDA, and this is a CPU", where="engine.attention", remedy=remedy)
    if dtype == "bfloat16":
        message = "Triton's interpreter cannot compute in bfloat16"
        raise InputError(message, where="engine.dtype", remedy="dtype: float32, or attention: torch")


def _table_width(options: EngineOptions, context_length: int, kv_tokens: int) -> int:
    """Pages in a row of the page table. A place in the flat table is an int32."""
    width = -(-(min(context_length, kv_tokens) + 1) // options.page_size) + 1
    slots = slots_needed(options.max_running_requests, kv_tokens, options.page_size) + 1
    if slots * width > np.iinfo(np.int32).max:
        raise InputError(
            f"a page table of {options.max_running_requests:,} requests of {width:,} pages has more places than an "
            "int32 can number",
            where="engine.max_running_requests",
            remedy="lower it, or engine.context_length, or raise engine.page_size",
        )
    return width


def _kv_tokens(options: EngineOptions, config: DecoderConfig, context_length: int, device: torch.device) -> int:
    """Tokens of KV: what the scenario says, or what fits. A GPU refuses what it does not hold; a CPU's system promises
    it and kills the process later, so what is promised is counted here."""
    if options.kv_tokens is None:
        return _kv_capacity(options, config, context_length, device)
    token_bytes = config.spec.kv_bytes_per_token(options.dtype)
    needed, free = options.kv_tokens * token_bytes, int(options.mem_fraction * free_bytes())
    if device.type == "cpu" and needed > free:
        raise InputError(
            f"keys and values of {options.kv_tokens:,} tokens take {needed / 1e9:,.1f} GB of {free / 1e9:,.1f} GB",
            where="engine.kv_tokens",
            remedy=f"at most {free // token_bytes:,}",
        )
    return options.kv_tokens


def _kv_capacity(options: EngineOptions, config: DecoderConfig, context_length: int, device: torch.device) -> int:
    """Tokens of KV beside what is loaded: the share ``mem_fraction`` of a GPU's memory as SGLang counts it; on a CPU a
    fixed amount. Never more than the running requests could use."""
    token_bytes = config.spec.kv_bytes_per_token(options.dtype)
    most = (options.max_running_requests + 1) * context_length
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        room = int(free - (1 - options.mem_fraction) * total)
    else:
        room = min(CPU_KV_BYTES, int(options.mem_fraction * free_bytes()))
    tokens = min(room // token_bytes, most)
    if tokens < options.page_size:
        left = f"{max(room, 0) / 1e9:.2f} GB are left beside the weights"
        raise InputError(
            f"no room for keys and values: {left}, a token takes {token_bytes} bytes",
            where="engine.mem_fraction_static",
            remedy="raise it, choose a smaller model, or a smaller dtype",
        )
    return int(tokens)
