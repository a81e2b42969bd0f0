"""A small model on this machine's device, under the world of ``tests.properties``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from testbed.engine.builder import InputBuilder
from testbed.engine.device import Device, open_device
from testbed.engine.inputs import StepInputs
from testbed.engine.options import EngineOptions
from testbed.runtime.oracle import Oracle
from testbed.runtime.real import RealDevice
from testbed.runtime.wall import WallClock
from testbed.scheduler.scheduler import Scheduler
from tests.properties.world import VOCABULARY, DeviceOf

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
"""The smallest Llama with the vocabulary of the oracle's world."""


def write_config(folder: Path, **fields: Any) -> Path:
    """A ``config.json`` of the smallest model, with these fields; weights will be random."""
    path = folder / "config.json"
    path.write_text(json.dumps({**TINY, **fields}), encoding="utf-8")
    return path


@contextmanager
def tiny_device(
    kv_tokens: int,
    *,
    page_size: int = 1,
    max_running_requests: int = 8,
    in_process: bool = True,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[Device]:
    """A device that runs random weights of the config."""
    with TemporaryDirectory() as folder:
        path = write_config(Path(folder), **(config or {}))
        chosen = EngineOptions(
            model=str(path),
            dtype="float32",
            page_size=page_size,
            max_running_requests=max_running_requests,
            kv_tokens=kv_tokens,
            **options,
        )
        with open_device(chosen, in_process=in_process) as device:
            yield device


def prefill(index: int, tokens: int) -> StepInputs:
    """A prompt of so many tokens, each in a page of its own."""
    places = np.arange(tokens, dtype=np.int32)
    return StepInputs(
        index,
        places=places,
        pages=places + 1,
        token_ids=places,
        token_slots=0 * places,
        token_positions=places,
        prefill_slots=places[:1],
        prefix_lens=places[:1],
        starts=np.array([0, tokens], np.int32),
        row_slots=places[:1],
    )


def runs_on(device: Device, *, forced: bool = True, seed: int = 0) -> DeviceOf:
    """For ``world.run``: the jobs run on ``device``; ``forced``: with the oracle's tokens in place of its own."""

    def make(clock: WallClock, oracle: Oracle, scheduler: Scheduler) -> RealDevice:
        memory = scheduler.memory
        builder = InputBuilder(memory.slots, memory.page_size, device.info.table_width, seed)
        return RealDevice(clock, device, builder, oracle, forced=forced)

    return make
