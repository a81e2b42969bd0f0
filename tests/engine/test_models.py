"""The forward pass of every family against ``transformers``, and what a config may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from testbed.engine.models.config import RopeConfig, load_decoder_config
from testbed.engine.models.rotary import cos_sin_table
from testbed.scenario.errors import InputError
from testbed.scenario.models import model_presets
from tests.engine.world import (
    CPU,
    FAMILIES,
    STD,
    edit_config,
    our_decoder,
    our_logits,
    random_prompts,
    reference_logits,
    reference_model,
    tiny_model,
)

TOLERANCE = 1e-4

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def assert_same_logits(folder: Path, seed: int, count: int = 12) -> None:
    decoder, model = our_decoder(folder), reference_model(folder)
    prompts = random_prompts(seed, count, decoder.config.spec.vocab)
    for ours, theirs in zip(our_logits(decoder, prompts), reference_logits(model, prompts), strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
        assert theirs.std() > 0.5, "logits so small prove nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_our_own_folders(family: str, tmp_path: Path) -> None:
    assert_same_logits(tiny_model(family, tmp_path / "model"), seed=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_folders_that_transformers_wrote(family: str, tmp_path: Path) -> None:
    """Its own random weights, names and config fields; norms are drawn too, so that a forgotten one shows."""
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model(family, tmp_path / "ours")))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            middle = 1.0 if "norm" in name else 0.0
            parameter.normal_(middle, STD, generator=generator)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_logits(tmp_path / "theirs", seed=2)


BIASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True}),
    ("qwen3", {"attention_bias": True}),
    ("qwen3_moe", {"attention_bias": True, "norm_topk_prob": False}),
    ("mistral", {"tie_word_embeddings": True}),
    ("qwen2", {"tie_word_embeddings": False, "rms_norm_eps": 0.1}),
]


@pytest.mark.parametrize(("family", "fields"), BIASES)
def test_logits_with_other_features(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_model(family, tmp_path / "one")
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(edit_config(folder, **fields)))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, STD)
    theirs.save_pretrained(tmp_path / "two")
    assert_same_logits(tmp_path / "two", seed=3)


SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 2.5},
    LLAMA3,
    {**LLAMA3, "factor": 32.0, "high_freq_factor": 2.0},
    YARN,
    {**YARN, "attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2},
    {**YARN, "truncate": False},
    {**YARN, "mscale": 0.8, "mscale_all_dim": 0.5},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: "-".join(map(str, scaling.values())))
@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
def test_stretched_positions(scaling: dict[str, Any], form: str, tmp_path: Path) -> None:
    """The table equals theirs at every position, whichever form the config has."""
    folder = edit_config(tiny_model("llama", tmp_path / "model"), rope_scaling=None, max_position_embeddings=512)
    fields = {"rope_theta": 5e3} if form == "rope_scaling" else {"rope_theta": None}
    inner = {**scaling, "rope_theta": 5e3} if form == "rope_parameters" else scaling
    edit_config(folder, **{**fields, form: inner})
    rotary = reference_model(folder).model.rotary_emb
    cos, sin = rotary(torch.zeros(1), torch.arange(512)[None])
    config = load_decoder_config(folder)
    ours = cos_sin_table(config.rope, config.spec.head_dim, 512, CPU)
    half = config.spec.head_dim // 2
    torch.testing.assert_close(ours[:, :half], cos[0, :, :half], atol=2e-5, rtol=0)
    torch.testing.assert_close(ours[:, half:], sin[0, :, :half], atol=2e-5, rtol=0)
    plain = cos_sin_table(RopeConfig(5e3), config.spec.head_dim, 512, CPU)
    assert (ours - plain).abs().max() > 0.05, "the scaling does nothing"


@pytest.mark.parametrize("scaling", [SCALINGS[0], LLAMA3, YARN], ids=["linear", "llama3", "yarn"])
def test_logits_with_stretched_positions(scaling: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "model")
    assert_same_logits(edit_config(folder, rope_scaling=scaling, max_position_embeddings=512), seed=4)


def config_of(tmp_path: Path, family: str = "llama", **fields: Any) -> Path:
    """A bare config.json."""
    text = Path(f"testbed/scenario/presets/models/{FAMILIES[family]}.json")
    source = Path(__file__).parents[2] / text
    (tmp_path / "config.json").write_text(source.read_text(encoding="utf-8"))
    return edit_config(tmp_path, **fields)


@pytest.mark.parametrize("name", model_presets())
def test_every_preset_can_be_computed(name: str) -> None:
    config = load_decoder_config(name)
    assert config.context_limit == config.spec.max_positions
    assert config.eos_token_ids and config.folder is None


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "gpt2"}, "model_type"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"head_dim": 127}, "head_dim"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.rope_type"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling.low_freq_factor"),
    ("llama", {"rope_theta": "large"}, "config.json: rope_theta"),
    ("llama", {"rms_norm_eps": -1e-6}, "config.json: rms_norm_eps"),
    ("llama", {"eos_token_id": [1, 128256]}, "eos_token_id"),
    ("llama", {"torch_dtype": "int8"}, "torch_dtype"),
    ("mistral", {"sliding_window": "wide"}, "sliding_window"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
]


@pytest.mark.parametrize(("family", "fields", "field"), REFUSED, ids=lambda part: part if isinstance(part, str) else "")
def test_what_is_not_computed_is_refused_by_name(
    family: str, fields: dict[str, Any], field: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as raised:
        load_decoder_config(config_of(tmp_path, family, **fields))
    assert raised.value.where.endswith(field) and raised.value.where.startswith(str(tmp_path))
    assert raised.value.remedy


WINDOWS: list[tuple[str, dict[str, Any], int | None]] = [
    ("mistral", {}, 4096),  # absent (the preset's null was dropped): what transformers takes it for
    ("mistral", {"sliding_window": 512}, 512),
    ("mixtral", {}, None),
    ("mixtral", {"sliding_window": 512}, 512),
    ("llama", {"sliding_window": 512}, None),
    ("qwen2", {}, None),
    ("qwen2", {"use_sliding_window": True}, None),  # max_window_layers is the number of layers
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 23}, 32768),
    ("qwen3", {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 28, "sliding_window": 99}, 99),
    ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention"] * 28, "sliding_window": 99}, None),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 99}, 99),
]


@pytest.mark.parametrize(("family", "fields", "window"), WINDOWS)
def test_sliding_windows(family: str, fields: dict[str, Any], window: int | None, tmp_path: Path) -> None:
    folder = config_of(tmp_path, family, **fields)
    config = load_decoder_config(folder)
    assert config.sliding_window == window
    theirs = AutoConfig.from_pretrained(folder)
    slides = "sliding_attention" in (getattr(theirs, "layer_types", None) or ["sliding_attention"])
    assert (getattr(theirs, "sliding_window", None) if slides and family != "llama" else None) == window
    limit = window or config.spec.max_positions
    assert config.context_limit == limit
    config.check_context(limit)
    with pytest.raises(InputError, match=r"context_length") as raised:
        config.check_context(limit + 1)
    assert raised.value.remedy.startswith(f"engine.context_length: {limit}")


def test_within_the_window_attention_is_full_and_beyond_it_is_not(tmp_path: Path) -> None:
    """Why ``context_limit`` is the window itself, neither one more nor one less."""
    folder = edit_config(tiny_model("mistral", tmp_path / "model"), sliding_window=24)
    decoder, model = our_decoder(folder), reference_model(folder)
    assert decoder.config.context_limit == 24
    whole = our_decoder(edit_config(folder, sliding_window=4096))
    prompt = random_prompts(5, 1, 4096)[0] * 25

    def difference(tokens: int) -> float:
        ours, theirs = our_logits(whole, [prompt[:tokens]])[0], reference_logits(model, [prompt[:tokens]])[0]
        return float((ours - theirs).abs().max())

    assert difference(24) < TOLERANCE
    assert difference(25) > 10 * TOLERANCE


def test_both_forms_of_a_config_say_the_same(tmp_path: Path) -> None:
    """transformers 5 writes ``dtype``, ``rope_parameters`` and ``num_local_experts``, all of them otherwise before."""
    for family in FAMILIES:
        old = tiny_model(family, tmp_path / family / "model")
        AutoConfig.from_pretrained(old).save_pretrained(tmp_path / f"{family}-new" / "model")
        written = json.loads((tmp_path / f"{family}-new" / "model" / "config.json").read_text())
        assert "rope_parameters" in written and "rope_theta" not in written
        ours, theirs = load_decoder_config(old), load_decoder_config(tmp_path / f"{family}-new" / "model")
        for field in ("spec", "rope", "rms_norm_eps", "sliding_window", "norm_topk_prob", "output_bias", "dtype"):
            assert getattr(ours, field) == getattr(theirs, field), (family, field)
        assert (ours.eos_token_ids, ours.bos_token_id) == (theirs.eos_token_ids, theirs.bos_token_id) == ((1, 5), 0)


def test_end_tokens_of_the_generation_config_come_first(tmp_path: Path) -> None:
    folder = config_of(tmp_path, "qwen3")
    assert load_decoder_config(folder).eos_token_ids == (151645,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [151645, 151643]}')
    config = load_decoder_config(folder)
    assert config.eos_token_ids == (151645, 151643)
    assert config.bos_token_id == 151643  # as in config.json, for the other file has none
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config.json:1:2"):
        load_decoder_config(folder)
