"""Weights: from files in every form that checkpoints have, drawn, and all that can be wrong with a file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor

from testbed.engine.backends.torch_backend import TorchBackend
from testbed.engine.models import weights
from testbed.engine.models.config import load_decoder_config
from testbed.engine.models.weights import INDEX, SINGLE, allocate_weights, draw_weights, load_decoder, weight_places
from testbed.scenario.errors import InputError
from tests.engine.world import (
    CPU,
    FAMILIES,
    STD,
    edit_config,
    our_decoder,
    our_logits,
    random_prompts,
    reference_model,
    tiny_model,
)

PROMPTS = random_prompts(0, 3, 4096)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    return tiny_model("llama", tmp_path / "model")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / SINGLE)


def drawn(name_or_path: str | Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    config = load_decoder_config(name_or_path)
    places = weight_places(config, allocate_weights(config, dtype, CPU))
    draw_weights(places, seed, STD)
    return places


def without_weights(folder: Path) -> Path:
    (folder / SINGLE).unlink()
    return folder


def assert_same_model(one: Path | str, other: Path | str) -> None:
    pairs = zip(our_logits(our_decoder(one), PROMPTS), our_logits(our_decoder(other), PROMPTS), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_the_reference_has_its_place(family: str, tmp_path: Path) -> None:
    """Tensor by tensor: what transformers writes after loading our folder is what we wrote."""
    folder = tiny_model(family, tmp_path / "ours")
    reference_model(folder).save_pretrained(tmp_path / "theirs")
    ours, theirs = tensors_of(folder), tensors_of(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sum(tensor.numel() for tensor in ours.values()) == load_decoder_config(folder).spec.parameters
    assert_same_model(folder, tmp_path / "theirs")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_sharded_checkpoints(family: str, tmp_path: Path) -> None:
    folder = tiny_model(family, tmp_path / "one")
    reference_model(folder).save_pretrained(tmp_path / "many", max_shard_size="300KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert_same_model(folder, tmp_path / "many")


def test_stored_in_another_dtype(folder: Path) -> None:
    """Each tensor is converted as it is copied."""
    tensors = tensors_of(folder)
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, folder / SINGLE)
    places = loaded_places(folder, torch.float16)
    for name, place in places.items():
        assert torch.equal(place, tensors[name].to(torch.bfloat16).to(torch.float16))


def loaded_places(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    decoder = load_decoder(folder, dtype=dtype, device=CPU, backend=TorchBackend())
    return weight_places(decoder.config, decoder.weights)


def test_what_is_not_a_weight_is_passed_over(folder: Path, tmp_path: Path) -> None:
    """Old checkpoints hold rotary tables, tied ones may repeat the embedding, reward models have a head of theirs."""
    tied = tiny_model("qwen2", tmp_path / "tied")
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "score.weight": torch.ones(3),
        "lm_head.weight": torch.full((4096, 64), 9.0),
    }
    before = our_logits(our_decoder(tied), PROMPTS)
    save_file({**tensors_of(tied), **extra}, tied / SINGLE)
    assert all(torch.equal(a, b) for a, b in zip(before, our_logits(our_decoder(tied), PROMPTS), strict=True))


def test_the_source_is_said(folder: Path) -> None:
    assert our_decoder(folder).source == f"safetensors in {folder}"
    without_weights(folder)
    assert our_decoder(folder, seed=7).source == f"random, seed 7, deviation {STD}"
    assert our_decoder(folder / "config.json", std=0.5).source == "random, seed 0, deviation 0.5"


# -- random weights ---------------------------------------------------------------------------------------------------


def test_the_folder_that_was_written_is_the_model_that_is_drawn(tmp_path: Path) -> None:
    """``model init`` and a bare config with the same seed and deviation: one model, bit for bit."""
    for family in FAMILIES:
        written = tiny_model(family, tmp_path / family / "a", seed=3)
        bare = without_weights(tiny_model(family, tmp_path / family / "b"))
        pairs = zip(
            our_logits(our_decoder(written), PROMPTS), our_logits(our_decoder(bare, seed=3), PROMPTS), strict=True
        )
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_each_tensor_has_its_own_stream(folder: Path) -> None:
    """A layer more, or a wider MLP, leaves every other tensor as it was."""
    before = drawn(folder)
    deeper = drawn(edit_config(folder, num_hidden_layers=3))
    wider = drawn(edit_config(folder, num_hidden_layers=2, intermediate_size=80))
    assert all(torch.equal(before[name], deeper[name]) for name in before) and len(deeper) > len(before)
    for name, tensor in before.items():
        assert torch.equal(tensor, wider[name]) == ("mlp" not in name)


def test_seeds_and_names_give_other_numbers(folder: Path) -> None:
    one, again, other = drawn(folder), drawn(folder), drawn(folder, seed=1)
    for name in one:
        assert torch.equal(one[name], again[name])
        assert torch.equal(one[name], other[name]) == name.endswith("norm.weight")
    first = one["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(first, one["model.layers.1.self_attn.q_proj.weight"])


def test_random_weights_are_normal(folder: Path) -> None:
    for name, tensor in drawn(folder).items():
        if name.endswith("norm.weight"):
            assert (tensor == 1).all()
        else:
            assert stats.kstest(tensor.flatten().numpy() / STD, "norm").pvalue > 1e-4, name


def test_the_first_numbers_are_pinned(folder: Path) -> None:
    """So that runs with one version of torch can be held against runs with another; vector units may round the last
    bit otherwise."""
    found = drawn(folder)["lm_head.weight"][0, :4].tolist()
    assert found == pytest.approx([0.18971770, -0.71834230, -0.16727556, -0.04844343], rel=1e-5)


# -- broken checkpoints -----------------------------------------------------------------------------------------------


def refused(folder: Path, where: Path | str, *words: str) -> None:
    with pytest.raises(InputError) as raised:
        our_decoder(folder)
    assert raised.value.where == str(where)
    assert raised.value.remedy
    for word in words:
        assert word in raised.value.message


def test_missing_tensor(folder: Path) -> None:
    tensors = tensors_of(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / SINGLE)
    refused(folder, folder, "no tensor is called model.layers.1.mlp.up_proj.weight")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / SINGLE)
    refused(folder, folder, "no tensor is called lm_head.weight and 1 more")


def test_missing_bias(tmp_path: Path) -> None:
    folder = tiny_model("qwen2", tmp_path / "model")
    save_file({n: t for n, t in tensors_of(folder).items() if not n.endswith("k_proj.bias")}, folder / SINGLE)
    refused(folder, folder, "model.layers.0.self_attn.k_proj.bias and 1 more")


def test_unexpected_shape(folder: Path) -> None:
    tensors = tensors_of(folder)
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(16, 64)
    save_file(tensors, folder / SINGLE)
    refused(folder, folder / SINGLE, "model.layers.0.self_attn.k_proj.weight is [16, 64]", "makes it [32, 64]")


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.input_layernorm.weight"])
def test_a_weight_that_the_config_denies(name: str, folder: Path) -> None:
    save_file({**tensors_of(folder), name: torch.zeros(64)}, folder / SINGLE)
    refused(folder, folder / SINGLE, f"no tensor {name}")


def test_quantised_weights(folder: Path) -> None:
    tensors = tensors_of(folder)
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(64, 224).to(torch.float8_e4m3fn)
    save_file(tensors, folder / SINGLE)
    refused(folder, folder / SINGLE, "model.layers.0.mlp.down_proj.weight is stored as F8_E4M3")


def _header(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut by one byte": lambda data: data[:-1],
    "cut in the middle": lambda data: data[: len(data) // 2],
    "cut in the header": lambda data: data[:100],
    "empty": lambda data: b"",
    "not JSON": lambda data: data[:8] + b"\xff" + data[9:],
    "huge header": lambda data: b"\xff" * 8 + data[8:],
    "text": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "overlong tensor": lambda data: _header(data, lambda h: h["model.norm.weight"].update(data_offsets=[0, 1 << 40])),
    "no offsets": lambda data: _header(data, lambda h: h["model.norm.weight"].pop("data_offsets")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(damage: str, folder: Path) -> None:
    file = folder / SINGLE
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    refused(folder, file, "cannot be read as safetensors")


def test_indices(tmp_path: Path) -> None:
    reference_model(tiny_model("llama", tmp_path / "one")).save_pretrained(tmp_path / "many", max_shard_size="900KB")
    folder = tmp_path / "many"
    index = folder / INDEX
    text = index.read_text()
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    index.write_text(text.replace(shards[0], "../one/model.safetensors"))
    refused(folder, index, "model.safetensors, which is not there")
    index.write_text(text)
    (folder / shards[0]).rename(folder / "elsewhere")
    refused(folder, index, f"names {shards[0]}, which is not there")
    (folder / "elsewhere").rename(folder / shards[0])
    our_decoder(folder)
    whole = (folder / shards[1]).read_bytes()
    (folder / shards[1]).write_bytes(whole[:-4])
    refused(folder, folder / shards[1], "cannot be read")
    (folder / shards[1]).write_bytes(whole)
    index.write_text("[]")
    refused(folder, index, "not a JSON object")
    index.write_text('{"weight_map": ["a"]}')
    refused(folder, f"{index}: weight_map", "no map")
    index.unlink()
    refused(folder, folder, shards[0], f"neither {SINGLE} nor {INDEX}")


def test_pickled_weights_are_not_taken_for_none(folder: Path) -> None:
    """Random numbers in place of somebody's weights would be a quiet disaster."""
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    refused(folder, folder, "pytorch_model.bin")


def test_more_than_the_memory(folder: Path) -> None:
    """The operating system refuses at once: nothing is read, nothing is left."""
    edit_config(without_weights(folder), vocab_size=10**13)
    refused(folder, "model", "the weights of model in float32 take 5,120,000", "more than cpu has free")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_full_device(error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(weights, "allocate_weights", full)
    refused(folder, "model", "the weights of model", "more than cpu has free")


def test_other_errors_stay_what_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a defect of ours")

    monkeypatch.setattr(weights, "allocate_weights", broken)
    with pytest.raises(RuntimeError, match="a defect of ours"):
        our_decoder(folder)
