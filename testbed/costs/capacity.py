"""What a device holds: the weights of its pipeline stage, and beside them tokens of keys and values."""

from __future__ import annotations

from testbed.costs.devices import DeviceProfile
from testbed.scenario.errors import InputError
from testbed.scenario.models import DTYPE_BYTES, ModelSpec
from testbed.scenario.schema import EngineConfig, Parallel

CONTEXT_BYTES = 1 << 30
"""A guess for what the driver, the libraries and the communicators hold on a device outside the static share."""


def kv_dtype(engine: EngineConfig) -> str:
    """The dtype of keys and values: the engine's own, or the model's."""
    return engine.dtype if engine.kv_dtype == "auto" else engine.kv_dtype


def stage_layers(model: ModelSpec, parallel: Parallel) -> tuple[int, ...]:
    """Layers of each pipeline stage: those of ``parallel.stage_layers``, or as even as it goes; the first stages hold
    the remainder. Raises InputError unless they are the layers of the model, one for each stage at least."""
    model.check_stages(parallel.pp, "engine.parallel.pp")
    if parallel.stage_layers is None:
        least, more = divmod(model.layers, parallel.pp)
        return tuple(least + (stage < more) for stage in range(parallel.pp))
    if sum(parallel.stage_layers) != model.layers or len(parallel.stage_layers) != parallel.pp:
        layers = ", ".join(map(str, parallel.stage_layers))
        message = f"stages of {layers} layers are not the {model.layers} of {model.name} in {parallel.pp} stages"
        remedy = f"numbers that sum to {model.layers}, one for each of pp stages"
        raise InputError(message, where="engine.parallel.stage_layers", remedy=remedy)
    return parallel.stage_layers


def stage_weight_bytes(model: ModelSpec, engine: EngineConfig, stage: int = 0) -> int:
    """Bytes of a pipeline stage's weights over all its devices: its layers with their redundant experts, the embedding
    in the first stage, final norm and output head in the last (tied weights are there once more)."""
    layers = stage_layers(model, engine.parallel)
    redundant = engine.experts.redundant if engine.parallel.ep > 1 else 0
    table = model.vocab * model.hidden
    ends = table if stage == 0 else 0
    if stage == len(layers) - 1:
        ends += model.hidden + (0 if model.tie_embeddings and len(layers) == 1 else table)
    layer_bytes = model.layer_weight_bytes(engine.dtype, engine.quantization, redundant)
    return layers[stage] * layer_bytes + ends * DTYPE_BYTES[engine.dtype]


def kv_capacity_tokens(model: ModelSpec, device: DeviceProfile, engine: EngineConfig) -> int:
    """Tokens that the KV pool holds, in whole pages: those of the pipeline stage that holds fewest.

    ``engine.kv_tokens`` when given. Else as SGLang sizes its pool: what ``mem_fraction_static`` of the device's memory
    leaves beside the weights and ``CONTEXT_BYTES``, by the bytes of a token; the rest of the memory is for activations
    and CUDA graphs. Raises InputError when not even one page is left.
    """
    if engine.kv_tokens is not None:
        return _whole_pages(engine.kv_tokens, engine)
    stages = range(engine.parallel.pp)
    return _whole_pages(min(_stage_tokens(model, device, engine, stage) for stage in stages), engine)


def kv_page_bytes(model: ModelSpec, engine: EngineConfig) -> int:
    """Bytes of one page of keys and values over all layers and devices, each KV head once: what goes from one engine
    to another."""
    return engine.page_size * model.kv_bytes_per_token(kv_dtype(engine))


def _stage_tokens(model: ModelSpec, device: DeviceProfile, engine: EngineConfig, stage: int) -> int:
    """Tokens of keys and values that a device of this stage has room for; InputError when not even a page's."""
    parallel = engine.parallel
    weights = stage_weight_bytes(model, engine, stage) // parallel.tp
    free = int(device.memory_bytes * engine.mem_fraction_static) - weights - CONTEXT_BYTES
    layers = stage_layers(model, parallel)[stage]
    token_bytes = model.kv_bytes_per_token(kv_dtype(engine), parallel.tp, layers)
    if free < token_bytes * engine.page_size:
        gigabytes = (weights / 1e9, device.memory_bytes * engine.mem_fraction_static / 1e9)
        message = f"no room for keys and values: weights take {gigabytes[0]:.1f} GB of {gigabytes[1]:.1f} GB a device"
        remedy = "raise engine.parallel.tp or engine.mem_fraction_static, or set engine.quantization: fp8"
        raise InputError(message, where="engine.mem_fraction_static", remedy=remedy)
    return free // token_bytes


def _whole_pages(tokens: int, engine: EngineConfig) -> int:
    pages = tokens // engine.page_size
    if pages == 0:
        message = f"{tokens} tokens of keys and values are less than one page of {engine.page_size}"
        raise InputError(message, where="engine.kv_tokens", remedy="raise it, or lower engine.page_size")
    return pages * engine.page_size
