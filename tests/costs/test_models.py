from __future__ import annotations

import json
from pathlib import Path

import pytest

from testbed.scenario.errors import InputError
from testbed.scenario.models import load_model, model_from_config, model_presets

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    ("name", "billions", "kv_bytes"),
    [
        ("llama-3.1-8b", 8.03, 131072),
        ("llama-3.1-70b", 70.55, 327680),
        ("llama-2-7b", 6.74, 524288),
        ("llama-2-70b", 68.98, 327680),
        ("qwen2.5-0.5b", 0.494, 12288),
        ("qwen3-0.6b", 0.596, 114688),
        ("qwen3-8b", 8.19, 147456),
        ("qwen3-14b", 14.77, 163840),
        ("qwen3-32b", 32.76, 262144),
        ("qwen3-30b-a3b", 30.53, 98304),
        ("mistral-7b-v0.3", 7.25, 131072),
        ("mixtral-8x7b", 46.70, 131072),
    ],
)
def test_presets_have_the_published_sizes(name: str, billions: float, kv_bytes: int) -> None:
    model = load_model(name)
    assert model.parameters / 1e9 == pytest.approx(billions, rel=2e-3)
    assert model.kv_bytes_per_token("bfloat16") == kv_bytes


def test_every_preset_is_tested_and_loads() -> None:
    assert len(model_presets()) == 12
    assert [load_model(name).name for name in model_presets()] == model_presets()


def test_active_parameters_of_mixtures() -> None:
    assert load_model("qwen3-30b-a3b").active_parameters / 1e9 == pytest.approx(3.35, rel=0.01)
    assert load_model("mixtral-8x7b").active_parameters / 1e9 == pytest.approx(12.9, rel=0.01)
    dense = load_model("llama-3.1-8b")
    assert dense.active_parameters == dense.parameters


def test_small_model_by_hand() -> None:
    model = model_from_config(LLAMA, name="tiny")
    attention = 64 * (4 + 2 * 2) * 16 + 4 * 16 * 64
    layer = attention + 3 * 64 * 128 + 2 * 64
    assert model.parameters == 2 * layer + 2 * 100 * 64 + 64
    assert model.weight_bytes("float32") == 4 * model.parameters
    assert model_from_config({**LLAMA, "tie_word_embeddings": True}, name="tiny").parameters == model.parameters - 6400
    assert model_from_config({**LLAMA, "attention_bias": True}, name="tiny").parameters == model.parameters + 2 * 128


def test_fp8_halves_the_matrices_only() -> None:
    model = load_model("llama-3.1-8b")
    matrices = model.layers * model.layer_linear_parameters
    assert model.weight_bytes("bfloat16") - model.weight_bytes("bfloat16", "fp8") == matrices


def test_kv_heads_are_replicated_not_split_below_one() -> None:
    model = load_model("llama-3.1-8b")
    assert [model.kv_heads_per_gpu(tp) for tp in (1, 8, 16)] == [8, 1, 1]


def test_folder_and_file(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    assert load_model(folder).name == "my-model"
    assert load_model(folder / "config.json") == load_model(folder)


def test_misspelt_preset_suggests_the_near_one() -> None:
    with pytest.raises(InputError, match=r"llama-3.1-8"):
        load_model("llama3.1-8b")


@pytest.mark.parametrize("value", [None, -1, 0, float("nan"), float("inf"), 1.5, "64", True, [64]])
def test_a_field_that_is_no_size_is_named(value: object) -> None:
    with pytest.raises(InputError) as caught:
        model_from_config({**LLAMA, "hidden_size": value}, name="x", where="c.json")
    assert caught.value.where == "c.json: hidden_size"
    assert caught.value.remedy


@pytest.mark.parametrize("text", ["", "[1]", "{", '"llama"', "\xff"])
def test_a_file_that_is_no_config(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as caught:
        load_model(path)
    assert str(path) in caught.value.where


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt2"},
        {"model_type": None},
        {"num_key_value_heads": 3},
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5},
        {
            "model_type": "qwen3_moe",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "mlp_only_layers": [0],
        },
    ],
)
def test_configs_that_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        model_from_config({**LLAMA, **change}, name="x")


@pytest.mark.parametrize("parallel", [{"tp": 3}, {"tp": 64}, {"tp": 2, "ep": 2}])
def test_parallelism_that_does_not_split_the_model(parallel: dict[str, int]) -> None:
    with pytest.raises(InputError):
        load_model("llama-3.1-8b").check_parallel(**parallel)


def test_expert_parallelism_divides_experts_and_tp() -> None:
    model = load_model("qwen3-30b-a3b")
    model.check_parallel(4, 4)
    with pytest.raises(InputError):
        model.check_parallel(4, 3)
