"""What every section shares: a row of the report, a runner of a model's shape, tiny where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from testbed.engine.build import LocalDevice, build_runner
from testbed.engine.models.create import Sizes, create_model
from testbed.engine.options import EngineOptions
from testbed.engine.runner import ModelRunner

PAGE_SIZE = 16


@dataclass(frozen=True)
class Row:
    """One thing that was measured."""

    what: str
    figure: str
    """With its unit."""
    bar: str = ""
    passed: bool | None = None
    """None: there is no bar."""
    values: dict[str, float] = field(default_factory=dict)
    """The figures in full, for who computes with them."""


def is_gpu(device: torch.device) -> bool:
    """Whether sizes are those of the report."""
    return device.type == "cuda"


@contextmanager
def shape_of(preset: str, device: torch.device) -> Iterator[str]:
    """A model to load: the preset with random weights; without a GPU a tiny one of its family."""
    if is_gpu(device):
        yield preset
        return
    with TemporaryDirectory() as folder:
        yield str(create_model(preset, Path(folder) / "tiny", Sizes()))


@contextmanager
def opened(model: str, device: torch.device, rows: int, most_tokens: int, chunk: int) -> Iterator[ModelRunner]:
    """A runner in bfloat16 for ``rows`` requests of ``most_tokens`` tokens, prompts in chunks of ``chunk``; CUDA graphs
    for all batch sizes."""
    pages = -(-most_tokens // PAGE_SIZE)
    options = EngineOptions(
        model=model,
        dtype="bfloat16",
        page_size=PAGE_SIZE,
        max_running_requests=rows,
        kv_tokens=rows * pages * PAGE_SIZE,
        context_length=pages * PAGE_SIZE,
        chunk_tokens=chunk,
        cuda_graph_max_bs=rows,
    )
    runner = build_runner(options, device)
    with LocalDevice(runner):
        yield runner
