"""What a device is started with, and what it says of itself: plain data, for a device in another process too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class EngineOptions:
    """One model on one device."""

    model: str
    """A preset, a folder or a config.json."""
    dtype: str
    page_size: int
    max_running_requests: int
    seed: int = 0
    """Of random weights."""
    weights_std: float | None = None
    """Deviation of random weights; None: the model's own."""
    kv_tokens: int | None = None
    """None: what memory holds."""
    context_length: int | None = None
    """None: the model's."""
    mem_fraction: float = 0.88
    """Share of the device's memory for weights and KV."""
    chunk_tokens: int = 8192
    """The longest prefill of one step (warm-up)."""
    attention: str = "auto"
    """``torch`` | ``triton`` | ``auto``: triton on CUDA, else torch."""
    cuda_graph: bool = True
    cuda_graph_max_bs: int | None = None


@dataclass(slots=True, frozen=True)
class DeviceInfo:
    """A started device."""

    name: str
    kind: str
    """``cuda`` or ``cpu``."""
    backend: str
    kv_tokens: int
    context_length: int
    table_width: int
    """Pages in a row of its page table."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()
    """What a reader of the results must know."""
