"""A model folder with random weights and the project's own tokenizer: a family of models in small."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from testbed.engine import tokenizer
from testbed.engine.models.config import load_decoder_config
from testbed.engine.models.weights import SINGLE, allocate_weights, draw_weights, weight_places
from testbed.scenario.errors import InputError
from testbed.scenario.models import ModelSpec, find_config, load_model, read_json

DTYPES = ("float32", "bfloat16", "float16")
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the small model is to have; None: in proportion to the preset, and little."""

    layers: int = 2
    hidden: int = 64
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    intermediate: int | None = None
    """Width of the MLP, or of each expert."""
    experts: int | None = None
    vocab: int | None = None
    """None: the tokenizer's."""


def create_model(
    preset: str | Path, folder: Path, sizes: Sizes, *, std: float = 0.02, seed: int = 0, dtype: str = "float32"
) -> Path:
    """Write ``folder``: config, weights and tokenizer, such as ``transformers`` loads; returns it.

    The preset's features stay (grouped queries, norms of heads, biases, experts, rotary scaling). The weights are those
    that ``load_decoder`` would draw on a CPU with the same seed and deviation. Raises InputError for sizes that do not
    fit together and for a folder that is in use; a failure leaves nothing behind.
    """
    if dtype not in DTYPES:
        raise InputError(f"{dtype!r} is not a dtype of weights", where="--dtype", remedy=f"one of {', '.join(DTYPES)}")
    config = small_config(preset, sizes, std=std, dtype=dtype)
    with _new_folder(folder) as unfinished:
        _write_json(unfinished / "config.json", config)
        tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
        _write_json(unfinished / "generation_config.json", tokens)
        for name in tokenizer.FILES:
            shutil.copyfile(tokenizer.FOLDER / name, unfinished / name)
        decoder = load_decoder_config(unfinished)
        places = weight_places(decoder, allocate_weights(decoder, getattr(torch, dtype), _CPU))
        draw_weights(places, seed, std)
        weights = unfinished / SINGLE
        save_file({name: place.contiguous() for name, place in places.items()}, weights, {"format": "pt"})
        weights.chmod((unfinished / "config.json").stat().st_mode)  # the library makes it private
    return folder


def small_config(preset: str | Path, sizes: Sizes, *, std: float, dtype: str) -> dict[str, Any]:
    """The preset's ``config.json`` with these sizes and the tokenizer's special tokens."""
    model = load_model(preset)
    heads = sizes.heads or 4
    kv_heads = sizes.kv_heads or (heads if model.kv_heads == model.heads else max(1, heads // 2))
    width = sizes.intermediate or _scaled_width(model, sizes.hidden)
    _check(sizes, heads, kv_heads, std)
    config = read_json(find_config(preset))
    for field in ("dtype", "layer_types"):  # transformers 5 writes them; they would contradict what follows
        config.pop(field, None)
    config |= {
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": sizes.head_dim or _scaled_head_dim(model, sizes.hidden, heads),
        "moe_intermediate_size" if model.model_type == "qwen3_moe" else "intermediate_size": width,
        "vocab_size": _vocab(sizes.vocab),
        "initializer_range": std,
        "torch_dtype": dtype,
        **_special_tokens(),
    }
    if model.is_moe:
        experts = sizes.experts or min(model.experts, 8)
        field = "num_local_experts" if "num_local_experts" in config else "num_experts"
        config |= {field: experts, "num_experts_per_tok": min(model.experts_per_token, max(1, experts // 4))}
    elif sizes.experts:
        raise InputError(f"{model.name} has no experts", where="--experts", remedy="leave it out")
    return config


def _check(sizes: Sizes, heads: int, kv_heads: int, std: float) -> None:
    for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "experts", "vocab"):
        value = getattr(sizes, name)
        if value is not None and value < 1:
            place = f"--{name.replace('_', '-')}"
            raise InputError(f"{value} is not a size", where=place, remedy="a whole number from 1")
    if not 0 < std <= 1:
        raise InputError(f"{std} is not a deviation", where="--std", remedy="a number above 0, at most 1")
    if (sizes.head_dim or 2) % 2:
        message = f"rotary positions need pairs of dimensions, but heads have {sizes.head_dim}"
        raise InputError(message, where="--head-dim", remedy="an even number")
    if sizes.hidden % heads:
        message = f"a hidden size of {sizes.hidden} does not split into {heads} heads"
        raise InputError(message, where="--hidden", remedy=f"a multiple of {heads}")
    if heads % kv_heads:
        message = f"{heads} heads do not share {kv_heads} KV heads evenly"
        raise InputError(message, where="--kv-heads", remedy=f"a divisor of {heads}")


def _scaled_head_dim(model: ModelSpec, hidden: int, heads: int) -> int:
    """The heads' total width keeps its proportion to the hidden size, rounded to a power of two for the kernels."""
    exact = model.heads * model.head_dim * hidden / (model.hidden * heads)
    return max(2, 2 ** round(math.log2(exact)))


def _scaled_width(model: ModelSpec, hidden: int) -> int:
    exact = (model.moe_intermediate or model.intermediate) * hidden / model.hidden
    return max(16, round(exact / 16) * 16)


def _vocab(wanted: int | None) -> int:
    tokens: int = tokenizer.load_tokenizer().get_vocab_size()
    if wanted is not None and wanted < tokens:
        message = f"the tokenizer has {tokens} tokens, more than {wanted}"
        raise InputError(message, where="--vocab", remedy=f"at least {tokens}, or leave it out")
    return wanted or tokens


def _special_tokens() -> dict[str, Any]:
    bos, eos, end = (tokenizer.SPECIAL_TOKENS.index(token) for token in (tokenizer.BOS, tokenizer.EOS, tokenizer.END))
    return {"bos_token_id": bos, "eos_token_id": [eos, end]}


def _write_json(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` that takes its name when all is written, and goes when something fails."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        reason = "is not empty" if folder.is_dir() else "is a file"
        raise InputError(f"the folder {reason}", where=str(folder), remedy="name a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        message = f"the folder cannot be made: {error.strerror}"
        raise InputError(message, where=str(folder), remedy="name another folder") from error
    try:
        written = unfinished / folder.name
        written.mkdir()  # with the permissions of any folder; the one around it is private
        yield written
        written.replace(folder)
    finally:
        shutil.rmtree(unfinished)
