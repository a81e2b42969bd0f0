"""What a model is to a serving engine: sizes, read from a Hugging Face ``config.json``.

Dense and mixture-of-experts decoders with RMS norms, rotary positions, grouped-query attention and a gated MLP:
``llama``, ``mistral``, ``qwen2``, ``qwen3``, ``qwen3_moe`` and ``mixtral``. Presets lie in ``presets/models`` in the
same form as the file that a model folder holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from testbed.scenario.errors import InputError

Dtype = Literal["bfloat16", "float16", "float32", "fp8"]

DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4, "fp8": 1}
"""Bytes of one element."""

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral")
_QK_NORM = ("qwen3", "qwen3_moe")
_QKV_BIAS = ("qwen2",)
_PRESETS = Path(__file__).parent / "presets" / "models"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes of a decoder; one field a number that the cost of a step or the memory of a device depends on."""

    name: str
    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of a dense MLP; 0 when every layer is a mixture of experts."""
    vocab: int
    max_positions: int
    tie_embeddings: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    experts: int = 0
    """Routed experts a layer; 0: dense."""
    experts_per_token: int = 0
    moe_intermediate: int = 0

    @property
    def is_moe(self) -> bool:
        """Whether the MLPs are mixtures of experts."""
        return self.experts > 0

    @property
    def qkv_width(self) -> int:
        """Output width of the fused query, key and value projection, over all devices."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def layer_linear_parameters(self) -> int:
        """Weights of a layer's dense matrices (attention and a dense MLP, or attention and the router)."""
        attention = self.hidden * self.qkv_width + self.heads * self.head_dim * self.hidden
        mlp = self.hidden * self.experts if self.is_moe else 3 * self.hidden * self.intermediate
        return attention + mlp

    @property
    def expert_parameters(self) -> int:
        """Weights of one routed expert: gate, up and down."""
        return 3 * self.hidden * self.moe_intermediate

    @property
    def layer_vector_parameters(self) -> int:
        """Weights of a layer's norms and biases."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return norms + (self.qkv_width if self.qkv_bias else 0)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding, and of the output head unless the two are tied."""
        return self.vocab * self.hidden * (1 if self.tie_embeddings else 2)

    @property
    def parameters(self) -> int:
        """All weights."""
        layer = self.layer_linear_parameters + self.layer_vector_parameters + self.experts * self.expert_parameters
        return self.layers * layer + self.embedding_parameters + self.hidden

    @property
    def active_parameters(self) -> int:
        """Weights that one token meets: as ``parameters``, with ``experts_per_token`` experts a layer."""
        return self.parameters - self.layers * (self.experts - self.experts_per_token) * self.expert_parameters

    def weight_bytes(self, dtype: str, quantization: str = "none") -> int:
        """Bytes of all weights; ``fp8`` quantises the layers' matrices, not embeddings, head, router or norms."""
        ends = self.embedding_parameters + self.hidden
        return self.layers * self.layer_weight_bytes(dtype, quantization) + ends * DTYPE_BYTES[dtype]

    def layer_weight_bytes(self, dtype: str, quantization: str = "none", redundant_experts: int = 0) -> int:
        """Bytes of one layer's weights, with so many further copies of experts; dtypes as in ``weight_bytes``."""
        size = DTYPE_BYTES[dtype]
        matrix_size = size if quantization == "none" else DTYPE_BYTES[quantization]
        router = self.hidden * self.experts
        experts = (self.experts + redundant_experts) * self.expert_parameters
        matrices = self.layer_linear_parameters - router + experts
        return matrices * matrix_size + (router + self.layer_vector_parameters) * size

    def kv_heads_per_gpu(self, tp: int) -> int:
        """KV heads on one of ``tp`` devices; at least one, since heads are replicated when devices outnumber them."""
        return max(1, self.kv_heads // tp)

    def kv_bytes_per_token(self, dtype: str, tp: int = 1, layers: int | None = None) -> int:
        """Bytes of one token's keys and values on one device, over ``layers`` (None: all)."""
        count = self.layers if layers is None else layers
        return 2 * count * self.kv_heads_per_gpu(tp) * self.head_dim * DTYPE_BYTES[dtype]

    def check_stages(self, stages: int, where: str) -> None:
        """Raise InputError unless each of so many pipeline stages, which the field ``where`` names, has a layer."""
        if stages > self.layers:
            message = f"{self.name} has {self.layers} layers, fewer than {stages} stages"
            raise InputError(message, where=where, remedy=f"use at most {self.layers}")

    def check_parallel(self, tp: int, ep: int = 1) -> None:
        """Raise InputError unless a stage's layers split evenly over this many devices."""
        where = "engine.parallel"
        if self.heads % tp or (self.kv_heads % tp and tp % self.kv_heads):
            message = f"{self.name} has {self.heads} heads and {self.kv_heads} KV heads: tp {tp} does not split them"
            divisors = ", ".join(str(n) for n in range(1, self.heads + 1) if self._splits(n))
            raise InputError(message, where=f"{where}.tp", remedy=f"use one of {divisors}")
        if ep > 1 and (not self.is_moe or self.experts % ep or tp % ep):
            message = f"ep {ep} needs a mixture of experts whose {self.experts} experts, and a tp ({tp}), it divides"
            raise InputError(message, where=f"{where}.ep", remedy="use ep: 1, or a common divisor of the two")

    def _splits(self, tp: int) -> bool:
        return not self.heads % tp and (not self.kv_heads % tp or not tp % self.kv_heads)


def model_presets() -> list[str]:
    """Names of the presets, sorted."""
    return sorted(path.stem for path in _PRESETS.glob("*.json"))


def load_model(name_or_path: str | Path) -> ModelSpec:
    """A preset by name, or a model folder or ``config.json`` in Hugging Face form.

    Raises InputError when there is no such preset or file, the file is not a JSON object, or a field is missing or
    not a size.
    """
    path = find_config(name_or_path)
    return model_from_config(read_json(path), name=model_name(path), where=str(path))


def find_config(name_or_path: str | Path) -> Path:
    """The file that a preset, a model folder or a path to a config stands for. Raises InputError when there is none."""
    name = str(name_or_path)
    preset = _PRESETS / f"{name}.json"
    if Path(name).name == name and preset.is_file():
        return preset
    path = Path(name).expanduser()
    is_folder = path.is_dir()
    if is_folder:
        path = path / "config.json"
    if path.is_file():
        return path
    if is_folder:
        message = f"the folder {name} has no config.json"
        raise InputError(message, where="model", remedy="name a model folder in Hugging Face form")
    known = model_presets()
    close = get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    message = f"no preset, folder or file is called {name!r}"
    raise InputError(message, where="model", remedy=f"{hint}presets: {', '.join(known)}; or a path to a config.json")


def model_name(path: Path) -> str:
    """What a config file is called after: its folder, or itself when it has a name of its own (a preset)."""
    return path.parent.resolve().name if path.name == "config.json" else path.stem


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError with the place of what is not JSON."""
    remedy = f"give a {path.name} in Hugging Face form"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8 text", where=str(path), remedy=remedy) from error
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}:{error.colno}"
        raise InputError(f"not JSON: {error.msg}", where=where, remedy=remedy) from error
    if not isinstance(config, dict):
        raise InputError("not a JSON object", where=str(path), remedy=remedy)
    return config


def model_from_config(config: Mapping[str, Any], *, name: str, where: str = "config.json") -> ModelSpec:
    """A model from the fields of a ``config.json``; ``where`` names the file in errors.

    Raises InputError for an unknown ``model_type`` and for a field that is missing, negative, not whole or not finite.
    """
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        remedy = f"one of {', '.join(MODEL_TYPES)}"
        raise InputError(f"model_type {model_type!r} is not known", where=f"{where}: model_type", remedy=remedy)

    def size(field: str, default: int | None = None, *, least: int = 1) -> int:
        return _size(config, field, default, least, where)

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        message = f"{heads} attention heads are not a multiple of {kv_heads} KV heads"
        raise InputError(message, where=f"{where}: num_key_value_heads", remedy=f"a divisor of {heads}")
    experts = topk = moe_intermediate = 0
    if model_type == "mixtral":
        experts, topk = size("num_local_experts"), size("num_experts_per_tok")
        moe_intermediate = size("intermediate_size")
    elif model_type == "qwen3_moe":
        # transformers 5 writes ``num_local_experts``
        experts = size("num_local_experts" if "num_local_experts" in config else "num_experts")
        topk = size("num_experts_per_tok")
        moe_intermediate = size("moe_intermediate_size")
        _only_moe_layers(config, where)
    if topk > experts:
        message = f"{topk} experts a token, but only {experts} experts"
        raise InputError(message, where=f"{where}: num_experts_per_tok", remedy=f"at most {experts}")
    return ModelSpec(
        name=name,
        model_type=model_type,
        hidden=hidden,
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size("head_dim", max(1, hidden // heads)),
        intermediate=0 if experts else size("intermediate_size"),
        vocab=size("vocab_size"),
        max_positions=size("max_position_embeddings"),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm=model_type in _QK_NORM,
        qkv_bias=model_type in _QKV_BIAS or bool(config.get("attention_bias", False)),
        experts=experts,
        experts_per_token=topk,
        moe_intermediate=moe_intermediate,
    )


def _only_moe_layers(config: Mapping[str, Any], where: str) -> None:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        message = "dense layers between mixtures of experts are not modelled"
        raise InputError(message, where=f"{where}: mlp_only_layers", remedy="a model whose layers are all alike")


def _size(config: Mapping[str, Any], field: str, default: int | None, least: int, where: str) -> int:
    value = config.get(field)
    if value is None:
        if default is not None:
            return default
        raise InputError("the field is missing", where=f"{where}: {field}", remedy=f"a whole number from {least}")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value != int(value) or value < least:
        remedy = f"a whole number from {least}"
        raise InputError(f"{value!r} is not a size", where=f"{where}: {field}", remedy=remedy)
    return int(value)
