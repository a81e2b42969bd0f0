# ruff: noqa: E501  (a table: one case a line reads better than one case a paragraph)
"""What can be wrong with a real run, and what the message must say: the place, the fault and the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from tests.bad_input.cases import Case

SCENARIO = """\
name: real
model: tiny
device: h100-sxm
engine: {kv_tokens: 512, max_running_requests: 4, context_length: 128, dtype: float32}
workload:
  arrivals: {kind: constant, rate_per_s: 100}
  lengths: {prompt_tokens: 20, output_tokens: 5}
  count: 4
"""
MODEL, WEIGHTS = "tiny", "model.safetensors"


class Failure(NamedTuple):
    """A sound scenario and model, what is done to the model's folder, and the answer that is asked for."""

    case: Case
    harm: Callable[[Path], object]


def edited(**fields: Any) -> Callable[[Path], None]:
    """Replace fields of ``config.json``; None: the field is missing."""

    def harm(model: Path) -> None:
        file = model / "config.json"
        config = {**json.loads(file.read_text()), **fields}
        file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))

    return harm


def reweighted(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change the tensors of the checkpoint."""

    def harm(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file(tensors, model / WEIGHTS)

    return harm


def cut(size: int) -> Callable[[Path], None]:
    """Leave the first ``size`` bytes of the checkpoint (negative: all but so many)."""
    return lambda model: [(file := model / WEIGHTS).write_bytes(file.read_bytes()[:size])]


def indexed(model: Path) -> None:
    """An index of two files, one of which is not there."""
    (model / WEIGHTS).rename(model / "model-1.safetensors")
    names = {"model.norm.weight": "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def pickled(model: Path) -> None:
    """Weights in a form that can hold code."""
    (model / WEIGHTS).rename(model / "pytorch_model.bin")


def unweighted(**fields: Any) -> Callable[[Path], None]:
    """No weights: they are drawn, by an edited config."""

    def harm(model: Path) -> None:
        (model / WEIGHTS).unlink()
        edited(**fields)(model)

    return harm


def nothing(model: Path) -> None:
    """The model is sound."""


def failure(
    name: str, place: str, says: str, remedy: str, harm: Callable[[Path], object] = nothing, *settings: str
) -> Failure:
    """A case of ``testbed run`` with these settings; the place of a setting is that setting."""
    arguments = ["scenario.yaml", "--no-report", *(part for setting in settings for part in ("--set", setting))]
    where = f"--set {settings[0]}" if settings and not place else place
    return Failure(Case(name, where, (says,), (remedy,), {"scenario.yaml": SCENARIO}, tuple(arguments), "run"), harm)


NORM, HEAD = "model.norm.weight", "lm_head.weight"
FILE, CONFIG = f"{MODEL}/{WEIGHTS}", f"{MODEL}/config.json"
FIELD = "scenario.yaml:2:1: model"
ONE_MODEL, AGAIN = "are config.json and weights of one model?", "fetch it again"

FAILURES = (
    # -- a broken checkpoint
    failure("missing tensor", f"{FIELD}: {MODEL}", f"no tensor is called {NORM}", ONE_MODEL, reweighted(lambda t: t.pop(NORM))),
    failure("wrong shape", FILE, f"{NORM} is [7], but the config makes it [32]", ONE_MODEL, reweighted(lambda t: t.update({NORM: torch.ones(7)}))),
    failure("tensor of another model", FILE, "has no tensor model.layers.9.w", ONE_MODEL, reweighted(lambda t: t.update({"model.layers.9.w": torch.ones(7)}))),
    failure("integers for weights", FILE, f"{NORM} is stored as I32", "weights in one of F64", reweighted(lambda t: t.update({NORM: torch.ones(32, dtype=torch.int32)}))),
    failure("truncated file", FILE, "cannot be read as safetensors", AGAIN, cut(-1000)),
    failure("truncated header", FILE, "cannot be read as safetensors", AGAIN, cut(20)),
    failure("empty file", FILE, "cannot be read as safetensors", AGAIN, cut(0)),
    failure("missing shard", f"{MODEL}/model.safetensors.index.json", "the index names model-2.safetensors, which is not there", "fetch the missing file", indexed),
    failure("pickled weights", f"{FIELD}: {MODEL}", "weights are there (pytorch_model.bin)", "save them with transformers' save_pretrained", pickled),
    # -- an unsupported architecture
    failure("unknown family", CONFIG, "model_type 'gpt2' is not known", "one of llama, mistral", edited(model_type="gpt2")),
    failure("other activation", f"{CONFIG}: hidden_act", "needs what the engine does not compute", "it computes silu", edited(hidden_act="gelu")),
    failure("quantised checkpoint", f"{CONFIG}: quantization_config", "needs what the engine does not compute", "a checkpoint that is not quantised", edited(quantization_config={"quant_method": "fp8"})),
    failure("unknown rotary positions", f"{CONFIG}: rope_scaling", "rotary positions of type 'longrope' are not computed", "one of default, linear", edited(rope_scaling={"rope_type": "longrope", "factor": 8.0})),
    failure("odd heads", f"{CONFIG}: head_dim", "pairs of dimensions, but heads have 15", "an even number", unweighted(head_dim=15)),
    failure("a size is missing", f"{CONFIG}: num_hidden_layers", "the field is missing", "a whole number from 1", edited(num_hidden_layers=None)),
    failure("config cut short", CONFIG, "not JSON", "a config.json in Hugging Face form", lambda model: (model / "config.json").write_text('{"model_type":')),
    failure("no model folder", "", "no preset, folder or file is called 'nowhere'", "or a path to a config.json", nothing, "model=nowhere"),
    failure("folder that is no model", FIELD, "the folder tiny has no config.json", "name a model folder", lambda model: (model / "config.json").unlink()),
    # -- more than the model or the engine can
    failure("contexts beyond the positions", "", "tiny has 100 positions: contexts of 128 tokens are too long", "engine.context_length: 100, or less", edited(max_position_embeddings=100), "engine.context_length=128"),
    failure("contexts beyond a window", "", "attends to a window of 64 tokens", "engine.context_length: 64, or less", edited(model_type="mistral", sliding_window=64), "engine.context_length=128"),
    failure("tensor parallel", "", "the engine runs on one device", "parallel: {tp: 1, pp: 1, dp: 1, ep: 1}", nothing, "engine.parallel={tp: 2}"),
    failure("quantisation", "", "the engine computes in one dtype, without quantisation", "use quantization: none", nothing, "engine.quantization=fp8"),
    failure("quantised KV", "", "the engine computes in one dtype, without quantisation", "kv_dtype: auto", nothing, "engine.kv_dtype=fp8"),
    failure("Triton on a CPU", "", "Triton's kernels need CUDA, and this is a CPU", "attention: auto, or torch", nothing, "engine.attention=triton"),
    # -- too little memory
    failure("weights beyond the memory", FIELD, "the weights of tiny in float32 take 256,000", "a smaller model", unweighted(vocab_size=10**12)),
    failure("KV beyond the memory", "", "keys and values of 1,000,000,000,000 tokens take", "at most", nothing, "engine.kv_tokens=1000000000000"),
    failure("KV of less than a page", "scenario.yaml:4:10: engine.kv_tokens", "512 tokens are less than one page of 1024", "use 1024 or more", nothing, "engine.page_size=1024"),
)  # fmt: skip

LOST = failure(
    "worker killed",
    "run",
    "the device is lost: its process (a CPU worker) was killed by SIGKILL",
    "start the run again",
    nothing,
    "workload.count=50000",
)
"""A run that is long enough to lose its worker."""
