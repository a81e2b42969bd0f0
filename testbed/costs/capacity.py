"""How many tokens of keys and values a device holds beside the weights."""

from __future__ import annotations

from testbed.costs.devices import DeviceProfile
from testbed.scenario.errors import InputError
from testbed.scenario.models import ModelSpec
from testbed.scenario.schema import EngineConfig

CONTEXT_BYTES = 1 << 30
"""A guess for what the driver, the libraries and the communicators hold on a device outside the static share."""


def kv_dtype(engine: EngineConfig) -> str:
    """The dtype of keys and values: the engine's own, or the model's."""
    return engine.dtype if engine.kv_dtype == "auto" else engine.kv_dtype


def stage_layers(model: ModelSpec, pp: int, stage: int) -> int:
    """Layers of one of ``pp`` pipeline stages; the first stages hold the remainder."""
    return model.layers // pp + (stage < model.layers % pp)


def kv_capacity_tokens(model: ModelSpec, device: DeviceProfile, engine: EngineConfig) -> int:
    """Tokens that the KV pool holds, in whole pages.

    ``engine.kv_tokens`` when given. Else as SGLang sizes its pool: what ``mem_fraction_static`` of the device's memory
    leaves beside the weights and ``CONTEXT_BYTES``, by the bytes of a token; the rest of the memory is for activations
    and CUDA graphs. Raises InputError when not even one page is left.
    """
    if engine.kv_tokens is not None:
        return _whole_pages(engine.kv_tokens, engine)
    parallel = engine.parallel
    weights = model.weight_bytes(engine.dtype, engine.quantization) // (parallel.tp * parallel.pp)
    free = int(device.memory_bytes * engine.mem_fraction_static) - weights - CONTEXT_BYTES
    token_bytes = model.kv_bytes_per_token(kv_dtype(engine), parallel.tp, stage_layers(model, parallel.pp, 0))
    if free < token_bytes * engine.page_size:
        gigabytes = (weights / 1e9, device.memory_bytes * engine.mem_fraction_static / 1e9)
        message = f"no room for keys and values: weights take {gigabytes[0]:.1f} GB of {gigabytes[1]:.1f} GB a device"
        remedy = "raise engine.parallel.tp or engine.mem_fraction_static, or set engine.quantization: fp8"
        raise InputError(message, where="engine.mem_fraction_static", remedy=remedy)
    return _whole_pages(free // token_bytes, engine)


def _whole_pages(tokens: int, engine: EngineConfig) -> int:
    pages = tokens // engine.page_size
    if pages == 0:
        message = f"{tokens} tokens of keys and values are less than one page of {engine.page_size}"
        raise InputError(message, where="engine.kv_tokens", remedy="raise it, or lower engine.page_size")
    return pages * engine.page_size
