"""Weights: read from safetensors, each tensor straight into its place in a fused matrix, or drawn on the device.

Both go by the names that ``transformers`` gives the tensors of a checkpoint: ``weight_places`` maps each to the part
of a matrix that it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from testbed.engine.backends.base import Backend, Rotary
from testbed.engine.faults import free_bytes, is_out_of_memory
from testbed.engine.models.config import DecoderConfig, load_decoder_config
from testbed.engine.models.decoder import Decoder, DecoderWeights, LayerWeights
from testbed.engine.models.rotary import cos_sin_table
from testbed.scenario.errors import InputError
from testbed.scenario.models import read_json
from testbed.tokens import stream_key

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_READABLE = ("F64", "F32", "F16", "BF16")
_WEIGHT_FILES = (".safetensors", ".bin", ".pth", ".gguf")
_OURS = ("model.", "lm_head.")
"""How names of a decoder's tensors begin; others (a reward head, say) are no concern of the forward pass."""


def load_decoder(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend,
    seed: int = 0,
    std: float | None = None,
) -> Decoder:
    """The decoder of a preset, a folder or a ``config.json``, with the weights beside the file where there are any.

    Otherwise random ones: norms are 1, everything else is normal with deviation ``std`` (None: the config's
    ``initializer_range``). Raises InputError for what ``load_decoder_config`` refuses, for a checkpoint that is broken
    or not this model's, and for one that the device has no room for.
    """
    config = load_decoder_config(name_or_path)
    files = checkpoint_files(config.folder)
    with _memory_for(config, dtype, device):
        weights = allocate_weights(config, dtype, device)
        places = weight_places(config, weights)
        if files:
            _read(files, places, tied=config.spec.tie_embeddings)
            source = f"safetensors in {config.folder}"
        else:
            deviation = config.initializer_range if std is None else std
            draw_weights(places, seed, deviation)
            source = f"random, seed {seed}, deviation {deviation:g}"
    return Decoder(config, weights, backend, source)


def allocate_weights(config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """All matrices, not filled; the table of rotary positions is ready."""
    spec = config.spec
    table = cos_sin_table(config.rope, spec.head_dim, config.context_limit, device)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def layer() -> LayerWeights:
        q_norm, k_norm = (empty(spec.head_dim) if spec.qk_norm else None for _ in "qk")
        experts, width = ((spec.experts,), spec.moe_intermediate) if spec.is_moe else ((), spec.intermediate)
        return LayerWeights(
            attention_norm=empty(spec.hidden),
            qkv=empty(spec.qkv_width, spec.hidden),
            qkv_bias=empty(spec.qkv_width) if spec.qkv_bias else None,
            rotary=Rotary(table, q_norm, k_norm, config.rms_norm_eps),
            output=empty(spec.hidden, spec.heads * spec.head_dim),
            output_bias=empty(spec.hidden) if config.output_bias else None,
            mlp_norm=empty(spec.hidden),
            router=empty(spec.experts, spec.hidden) if spec.is_moe else None,
            gate_up=empty(*experts, 2 * width, spec.hidden),
            down=empty(*experts, spec.hidden, width),
        )

    embedding = empty(spec.vocab, spec.hidden)
    head = embedding if spec.tie_embeddings else empty(spec.vocab, spec.hidden)
    return DecoderWeights(embedding, [layer() for _ in range(spec.layers)], empty(spec.hidden), head)


def weight_places(config: DecoderConfig, weights: DecoderWeights) -> dict[str, Tensor]:
    """Name in a checkpoint -> the view that it fills."""
    places = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    if not config.spec.tie_embeddings:
        places["lm_head.weight"] = weights.head
    for index, layer in enumerate(weights.layers):
        places |= _attention_places(f"model.layers.{index}.", layer, config)
        places |= _mlp_places(f"model.layers.{index}.", layer, config.spec.model_type)
    return places


def draw_weights(places: Mapping[str, Tensor], seed: int, std: float) -> None:
    """Fill with random numbers. Each tensor has a generator of its own, named after it: a layer more leaves the others
    as they were, and one kind of device always draws the same bits."""
    for name, place in places.items():
        if name.endswith("norm.weight"):
            place.fill_(1)
        else:
            generator = torch.Generator(place.device).manual_seed(stream_key("weights", seed, name))
            place.normal_(0, std, generator=generator)


def checkpoint_files(folder: Path | None) -> list[Path]:
    """The safetensors files of a model folder; empty where there are no weights at all.

    Raises InputError for weights in a form that is not read, and for an index that names a file that is not there.
    """
    if folder is None:
        return []
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        others = sorted(file.name for file in folder.iterdir() if file.suffix in _WEIGHT_FILES)
        if others:
            message = f"weights are there ({others[0]}), but neither {SINGLE} nor {INDEX}"
            raise InputError(message, where=str(folder), remedy="save them with transformers' save_pretrained")
        return []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError("no map of names to files", where=f"{index}: weight_map", remedy="fetch the index again")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if file.parent != folder or not file.is_file():
            message = f"the index names {file.name}, which is not there"
            raise InputError(message, where=str(index), remedy="fetch the missing file")
    return files


# -- places -----------------------------------------------------------------------------------------------------------


def _attention_places(prefix: str, layer: LayerWeights, config: DecoderConfig) -> dict[str, Tensor]:
    spec, attention = config.spec, f"{prefix}self_attn."
    widths = [heads * spec.head_dim for heads in (spec.heads, spec.kv_heads, spec.kv_heads)]
    found: dict[str, Tensor | None] = {
        f"{prefix}input_layernorm.weight": layer.attention_norm,
        f"{prefix}post_attention_layernorm.weight": layer.mlp_norm,
        f"{attention}q_norm.weight": layer.rotary.q_norm,
        f"{attention}k_norm.weight": layer.rotary.k_norm,
        f"{attention}o_proj.weight": layer.output,
        f"{attention}o_proj.bias": layer.output_bias,
    }
    for kind, fused in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
        if fused is not None:
            parts = zip("qkv", fused.split(widths), strict=True)
            found |= {f"{attention}{letter}_proj.{kind}": part for letter, part in parts}
    return {name: place for name, place in found.items() if place is not None}


def _mlp_places(prefix: str, layer: LayerWeights, model_type: str) -> dict[str, Tensor]:
    if layer.router is None:
        return _gated_places(f"{prefix}mlp.", ("gate_proj", "up_proj", "down_proj"), layer.gate_up, layer.down)
    mixtral = model_type == "mixtral"
    block = f"{prefix}{'block_sparse_moe' if mixtral else 'mlp'}."
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    places = {f"{block}gate.weight": layer.router}
    for expert, (gate_up, down) in enumerate(zip(layer.gate_up, layer.down, strict=True)):
        places |= _gated_places(f"{block}experts.{expert}.", names, gate_up, down)
    return places


def _gated_places(prefix: str, names: tuple[str, str, str], gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    parts = (*gate_up.chunk(2), down)
    return {f"{prefix}{name}.weight": part for name, part in zip(names, parts, strict=True)}


# -- reading ----------------------------------------------------------------------------------------------------------


def _read(files: Sequence[Path], places: Mapping[str, Tensor], *, tied: bool) -> None:
    """Check every name and shape, then copy: a checkpoint of another model is refused before it is read."""
    with ExitStack() as stack:
        opened = {file: stack.enter_context(_opened(file)) for file in files}
        found = {name for file, tensors in opened.items() for name in _checked(file, tensors, places, tied)}
        missing = [name for name in places if name not in found]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            message = f"no tensor is called {missing[0]}{more}"
            raise InputError(message, where=str(files[0].parent), remedy="are config.json and weights of one model?")
        for tensors in opened.values():
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name in places:
                    places[name].copy_(tensors.get_tensor(name))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file; its tensors are mapped, not read, until they are copied."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        message = f"cannot be read as safetensors: {reason}"
        raise InputError(message, where=str(file), remedy="it is cut short or damaged: fetch it again") from error


def _checked(file: Path, tensors: Any, places: Mapping[str, Tensor], tied: bool) -> Iterator[str]:
    """Names of the tensors that have a place. Raises InputError for one that should have one, or does not fit."""
    for name in tensors.keys():  # noqa: SIM118 (not a dict)
        place = places.get(name)
        if place is None:
            if name.startswith(_OURS) and not name.endswith(".inv_freq") and not (tied and name == "lm_head.weight"):
                message = f"the model of the config has no tensor {name}"
                raise InputError(message, where=str(file), remedy="are config.json and weights of one model?")
            continue
        entry = tensors.get_slice(name)
        if entry.get_dtype() not in _READABLE:
            message = f"{name} is stored as {entry.get_dtype()}"
            raise InputError(message, where=str(file), remedy=f"weights in one of {', '.join(_READABLE)}")
        if entry.get_shape() != list(place.shape):
            message = f"{name} is {entry.get_shape()}, but the config makes it {list(place.shape)}"
            raise InputError(message, where=str(file), remedy="are config.json and weights of one model?")
        yield name


@contextmanager
def _memory_for(config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Too little memory, told beforehand on a CPU: there it is promised first, and its lack kills the process later."""
    name = str(dtype).removeprefix("torch.")
    needed = config.spec.weight_bytes(name)
    message = f"the weights of {config.spec.name} in {name} take {needed / 1e9:,.2f} GB: more than {device} has free"
    remedy = "a smaller model (testbed model init makes one) or dtype, or a larger device"
    if device.type == "cpu" and needed > free_bytes():
        raise InputError(message, where="model", remedy=remedy)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(message, where="model", remedy=remedy) from error
