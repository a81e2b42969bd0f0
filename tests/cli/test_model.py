"""``testbed model init``: what it writes, and that it writes all of it or nothing."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from testbed.cli.main import OK, WRONG_INPUT, invoke
from testbed.engine.models import create
from testbed.engine.models.config import load_decoder_config
from testbed.scenario.models import load_model, model_presets

FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("preset", model_presets())
def test_a_preset_in_small(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two layers of 64, and all that makes the family: transformers loads every weight and generates."""
    assert invoke(["model", "init", preset, "small"]) == OK
    assert capsys.readouterr().out == "small\n"
    assert names(tmp_path) == ["small"] and names(tmp_path / "small") == FILES
    large, small = load_model(preset), load_model("small")
    for feature in ("model_type", "tie_embeddings", "qk_norm", "qkv_bias", "is_moe"):
        assert getattr(small, feature) == getattr(large, feature)
    assert (small.layers, small.hidden, small.heads, small.vocab) == (2, 64, 4, 4096)
    assert (small.kv_heads == small.heads) == (large.kv_heads == large.heads)
    assert small.experts_per_token < small.experts or not large.is_moe
    assert load_decoder_config("small").rope.kind == load_decoder_config(preset).rope.kind
    model, info = AutoModelForCausalLM.from_pretrained("small", output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.float32
    prompt = AutoTokenizer.from_pretrained("small")("The scheduler decides", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False, eos_token_id=None).shape[1] > 3


def test_sizes_are_those_asked_for() -> None:
    sizes = "--layers 3 --hidden 48 --heads 6 --kv-heads 3 --head-dim 10 --intermediate 20 --experts 5 --vocab 5000"
    assert invoke(["model", "init", "qwen3-30b-a3b", "a/b/small", *sizes.split()]) == OK
    model = load_model("a/b/small")
    assert (model.layers, model.hidden, model.heads, model.kv_heads) == (3, 48, 6, 3)
    assert (model.head_dim, model.moe_intermediate, model.experts, model.vocab) == (10, 20, 5, 5000)
    tensors = load_file("a/b/small/model.safetensors")
    assert tensors["model.layers.2.mlp.experts.4.down_proj.weight"].shape == (48, 20)
    assert sum(tensor.numel() for tensor in tensors.values()) == model.parameters


def test_weights_are_those_asked_for() -> None:
    """Seed, deviation and dtype."""
    found = {}
    for name, options in {"a": "", "b": "", "c": "--seed 1", "d": "--std 0.5", "e": "--dtype bfloat16"}.items():
        assert invoke(["model", "init", "llama-2-7b", name, *options.split()]) == OK
        found[name] = load_file(f"{name}/model.safetensors")["model.layers.0.self_attn.o_proj.weight"]
    assert torch.equal(found["a"], found["b"]) and not torch.equal(found["a"], found["c"])
    assert found["a"].std().item() == pytest.approx(0.02, rel=0.05)
    assert found["d"].std().item() == pytest.approx(0.5, rel=0.05)
    assert found["e"].dtype == torch.bfloat16
    assert (load_decoder_config("a").dtype, load_decoder_config("e").dtype) == ("float32", "bfloat16")
    assert load_decoder_config("d").initializer_range == 0.5


def test_end_tokens_are_the_tokenizers() -> None:
    assert invoke(["model", "init", "qwen3-8b", "small"]) == OK
    assert load_decoder_config("small").eos_token_ids == (1, 5)
    assert GenerationConfig.from_pretrained("small").eos_token_id == [1, 5]
    tokenizer = AutoTokenizer.from_pretrained("small")
    assert tokenizer.convert_ids_to_tokens([1, 5]) == ["<|eos|>", "<|end|>"]


def test_a_folder_in_small(tmp_path: Path) -> None:
    """The preset may be a folder, also one that transformers 5 wrote."""
    assert invoke(["model", "init", "qwen3-8b", "one", "--layers", "4"]) == OK
    AutoModelForCausalLM.from_pretrained("one").save_pretrained("two")
    assert "layer_types" in json.loads((tmp_path / "two" / "config.json").read_text())
    assert invoke(["model", "init", str(tmp_path / "two"), "three", "--dtype", "float16"]) == OK
    assert AutoModelForCausalLM.from_pretrained("three", dtype="auto").dtype == torch.float16


def test_an_empty_folder_is_as_good_as_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    assert invoke(["model", "init", "qwen3-8b", "small"]) == OK
    assert names(tmp_path / "small") == FILES


def test_a_folder_in_use_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    assert invoke(["model", "init", "qwen3-8b", "small"]) == WRONG_INPUT
    assert capsys.readouterr().err == "error: small: the folder is not empty\n  name a new folder\n"
    assert invoke(["model", "init", "qwen3-8b", "file"]) == WRONG_INPUT
    assert invoke(["model", "init", "qwen3-8b", "file/small"]) == WRONG_INPUT
    assert names(tmp_path) == ["file", "small"] and names(tmp_path / "small") == ["mine"]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(create, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        create.create_model("qwen3-8b", tmp_path / "small", create.Sizes())
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ("--hidden 66", "--hidden"),
        ("--hidden 0", "--hidden"),
        ("--layers -1", "--layers"),
        ("--kv-heads 3", "--kv-heads"),
        ("--head-dim 15", "--head-dim"),
        ("--vocab 4095", "--vocab"),
        ("--experts 4", "--experts"),
        ("--std 0", "--std"),
        ("--std nan", "--std"),
        ("--dtype int8", "--dtype"),
    ],
)
def test_sizes_that_do_not_fit(options: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["model", "init", "qwen3-8b", "small", *options.split()]) == WRONG_INPUT
    first, remedy = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {place}: ") and remedy.strip()
    assert names(tmp_path) == []


def test_an_unknown_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["model", "init", "qwen3-7b", "small"]) == WRONG_INPUT
    assert "did you mean qwen3-8b?" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["torch", "safetensors", "tokenizers"])
def test_without_the_engine(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A simulation needs no torch; this command says what to install."""
    for name in [name for name in sys.modules if name.startswith("testbed.engine")]:
        monkeypatch.delitem(sys.modules, name)
    real_import = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert invoke(["model", "init", "qwen3-8b", "small"]) == WRONG_INPUT
    error = capsys.readouterr().err
    assert f"needs {missing}, which is not installed" in error and "pip install 'testbed[engine]'" in error
    assert names(tmp_path) == []
