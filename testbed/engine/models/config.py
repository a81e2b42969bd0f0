"""All that a forward pass must know of a ``config.json`` beyond the sizes of ``ModelSpec``.

What the file does not say is as ``transformers`` 5.23 has it for the family. What this engine would compute wrongly is
refused, by the name of the field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from testbed.scenario.errors import InputError
from testbed.scenario.models import ModelSpec, find_config, model_from_config, model_name, read_json

RopeKind = Literal["default", "linear", "llama3", "yarn"]
Fields = Mapping[str, Any]

_OUTPUT_BIAS = ("llama", "qwen3", "qwen3_moe")
"""Families whose ``attention_bias`` gives the output projection a bias too."""
_WINDOW_SWITCH = ("qwen2", "qwen3", "qwen3_moe")
"""Families whose ``sliding_window`` counts only with ``use_sliding_window``."""
_ROPE_THETA = {"mixtral": 1e6}
_RMS_NORM_EPS = {"mixtral": 1e-5}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Frequencies of the rotary embedding; the fields that a kind does not name in ``rotary.py`` do nothing."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_positions: int = 0
    """Context length before the stretching (llama3, yarn)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """What cosines and sines are multiplied by (yarn)."""


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder as it is computed."""

    spec: ModelSpec
    folder: Path | None
    """Where weights may lie; None for a preset."""
    rope: RopeConfig
    rms_norm_eps: float
    sliding_window: int | None
    """Tokens that a token attends to, itself included; None: all."""
    norm_topk_prob: bool
    """Whether the weights of the chosen experts are scaled to sum to one."""
    output_bias: bool
    """Whether the output projection of attention has a bias."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    initializer_range: float
    dtype: str
    """What the weights were stored in: ``bfloat16``, ``float16`` or ``float32``."""

    @property
    def context_limit(self) -> int:
        """The longest context that is computed right: attention is full, so it ends where a window would begin."""
        return min(self.spec.max_positions, self.sliding_window or self.spec.max_positions)

    def check_context(self, tokens: int) -> None:
        """Raise InputError where contexts of so many tokens would be computed wrongly."""
        if tokens <= self.context_limit:
            return
        if tokens > self.spec.max_positions:
            reason = f"has {self.spec.max_positions} positions"
        else:
            reason = f"attends to a window of {self.sliding_window} tokens, which is not computed"
        message = f"{self.spec.name} {reason}: contexts of {tokens} tokens are too long"
        remedy = f"engine.context_length: {self.context_limit}, or less"
        raise InputError(message, where="engine.context_length", remedy=remedy)


def load_decoder_config(name_or_path: str | Path) -> DecoderConfig:
    """A preset by name, a model folder or its ``config.json``, beside which ``generation_config.json`` may lie.

    Raises InputError for what ``load_model`` refuses, a field that is not what it should be, and a feature that is not
    computed.
    """
    path = find_config(name_or_path)
    config = read_json(path)
    folder = path.parent if path.name == "config.json" else None
    generation = folder / "generation_config.json" if folder else None
    tokens = read_json(generation) if generation and generation.is_file() else {}
    where = str(path)
    spec = model_from_config(config, name=model_name(path), where=where)
    _refuse(config, spec, where)
    return DecoderConfig(
        spec=spec,
        folder=folder,
        rope=_rope(config, spec, where),
        rms_norm_eps=_number(config, "rms_norm_eps", _RMS_NORM_EPS.get(spec.model_type, 1e-6), where),
        sliding_window=_window(config, spec, where),
        norm_topk_prob=spec.model_type == "mixtral" or bool(config.get("norm_topk_prob", False)),
        output_bias=spec.model_type in _OUTPUT_BIAS and bool(config.get("attention_bias", False)),
        eos_token_ids=_token_ids("eos_token_id", (tokens, config), spec, where),
        bos_token_id=next(iter(_token_ids("bos_token_id", (tokens, config), spec, where)), None),
        initializer_range=_number(config, "initializer_range", 0.02, where),
        dtype=_dtype(config, where),
    )


def _refuse(config: Fields, spec: ModelSpec, where: str) -> None:
    """Features that would need other arithmetic than ``Decoder`` has."""
    wrong = (
        ("hidden_act", config.get("hidden_act", "silu") != "silu", "silu"),
        ("mlp_bias", bool(config.get("mlp_bias", False)), "false"),
        ("quantization_config", bool(config.get("quantization_config")), "none: a checkpoint that is not quantised"),
        ("partial_rotary_factor", _rotary_fields(config).get("partial_rotary_factor", 1.0) != 1.0, "1.0"),
    )
    for field, is_wrong, computed in wrong:
        if is_wrong:
            message = f"{spec.name} needs what the engine does not compute"
            raise InputError(message, where=f"{where}: {field}", remedy=f"it computes {computed}")
    if spec.head_dim % 2:
        message = f"rotary positions need pairs of dimensions, but heads have {spec.head_dim}"
        raise InputError(message, where=f"{where}: head_dim", remedy="an even number")


def _window(config: Fields, spec: ModelSpec, where: str) -> int | None:
    default = 4096  # where the field is absent; null says that there is none
    if spec.model_type in _WINDOW_SWITCH:
        window = config.get("sliding_window", default) if _slides(config, spec) else None
    elif spec.model_type == "mistral":
        window = config.get("sliding_window", default)
    else:
        window = config.get("sliding_window") if spec.model_type == "mixtral" else None
    if window is not None and (not isinstance(window, int) or window < 1):
        raise InputError(f"{window!r} is not a size", where=f"{where}: sliding_window", remedy="tokens, or null")
    return window


def _slides(config: Fields, spec: ModelSpec) -> bool:
    """Whether any layer of a Qwen has a window."""
    if not config.get("use_sliding_window", False):
        return False
    if spec.is_moe:
        return True
    if config.get("layer_types"):
        return "sliding_attention" in config["layer_types"]
    return config.get("max_window_layers", 28) < spec.layers


def _rotary_fields(config: Fields) -> dict[str, Any]:
    """``rope_parameters`` (transformers 5), or ``rope_scaling`` and ``rope_theta`` (before), as one dict."""
    old = {name: config[name] for name in ("rope_theta", "partial_rotary_factor") if config.get(name) is not None}
    return {**old, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def _rope(config: Fields, spec: ModelSpec, where: str) -> RopeConfig:
    fields = _rotary_fields(config)
    place = f"{where}: {'rope_parameters' if config.get('rope_parameters') else 'rope_scaling'}"
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind not in get_args(RopeKind) or any(isinstance(value, dict) for value in fields.values()):
        message = f"rotary positions of type {kind!r} are not computed"
        raise InputError(message, where=f"{place}.rope_type", remedy=f"one of {', '.join(get_args(RopeKind))}")
    at = place if config.get("rope_parameters") else where
    theta = _number(fields, "rope_theta", _ROPE_THETA.get(spec.model_type, 1e4), at)
    if kind == "default":
        return RopeConfig(theta)
    factor = _number(fields, "factor", None, place)
    return RopeConfig(
        theta,
        kind,
        factor,
        original_positions=int(_number(fields, "original_max_position_embeddings", spec.max_positions, place)),
        low_freq_factor=_number(fields, "low_freq_factor", None if kind == "llama3" else 1.0, place),
        high_freq_factor=_number(fields, "high_freq_factor", None if kind == "llama3" else 4.0, place),
        beta_fast=_number(fields, "beta_fast", 32.0, place),
        beta_slow=_number(fields, "beta_slow", 1.0, place),
        truncate=bool(fields.get("truncate", True)),
        attention_factor=_attention_factor(fields, factor, place) if kind == "yarn" else 1.0,
    )


def _attention_factor(fields: Fields, factor: float, place: str) -> float:
    """YaRN's temperature, ``0.1 ln(factor) + 1`` (Peng et al. 2023, equation 22), or DeepSeek's quotient of two."""
    if fields.get("attention_factor") is not None:
        return _number(fields, "attention_factor", None, place)

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if fields.get("mscale") and fields.get("mscale_all_dim"):
        all_dim = _number(fields, "mscale_all_dim", None, place)
        return temperature(_number(fields, "mscale", None, place)) / temperature(all_dim)
    return temperature(1.0)


def _number(fields: Fields, field: str, default: float | None, where: str) -> float:
    value = fields.get(field)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        message = "the field is missing" if value is None else f"{value!r} is not a positive number"
        dot = ": " if where.endswith(".json") else "."
        raise InputError(message, where=f"{where}{dot}{field}", remedy="a positive number")
    return float(value)


def _token_ids(field: str, sources: tuple[Fields, ...], spec: ModelSpec, where: str) -> tuple[int, ...]:
    """The first source that names them: one id or a list of ids."""
    value: Any = next((source[field] for source in sources if source.get(field) is not None), [])
    found = value if isinstance(value, list) else [value]
    for token in found:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < spec.vocab:
            remedy = f"an id below {spec.vocab}, or a list of them"
            raise InputError(f"{token!r} is not a token", where=f"{where}: {field}", remedy=remedy)
    return tuple(found)


def _dtype(config: Fields, where: str) -> str:
    """``dtype`` (transformers 5) or ``torch_dtype`` (before)."""
    field = "dtype" if config.get("dtype") else "torch_dtype"
    name = str(config.get(field) or "float32").removeprefix("torch.")
    if name not in ("bfloat16", "float16", "float32"):
        raise InputError(f"{name!r} is not computed", where=f"{where}: {field}", remedy="bfloat16, float16 or float32")
    return name
