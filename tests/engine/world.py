"""Tiny models of every family, and the reference that they are held against."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from testbed.engine.backends.base import AttentionPlan, ExtendRows
from testbed.engine.backends.torch_backend import TorchBackend
from testbed.engine.kv_cache import KvCache
from testbed.engine.models.create import Sizes, create_model
from testbed.engine.models.decoder import Decoder
from testbed.engine.models.weights import load_decoder

FAMILIES = {
    "llama": "llama-3.1-8b",
    "mistral": "mistral-7b-v0.3",
    "qwen2": "qwen2.5-0.5b",
    "qwen3": "qwen3-0.6b",
    "mixtral": "mixtral-8x7b",
    "qwen3_moe": "qwen3-30b-a3b",
}
"""A preset of each family."""

STD = 0.3
"""Deviation of random weights: large enough that the two best logits seldom tie."""
PAGE = 16
CPU = torch.device("cpu")


def tiny_model(family: str, folder: Path, seed: int = 0, **sizes: int) -> Path:
    """A folder with a model of this family: 2 layers, hidden size 64, the project's tokenizer of 4,096 tokens."""
    return create_model(FAMILIES[family], folder, Sizes(**sizes), std=STD, seed=seed)


def edit_config(folder: Path, **fields: Any) -> Path:
    """Change fields of a folder's ``config.json``; None removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), **fields}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def our_decoder(name_or_path: str | Path, **options: Any) -> Decoder:
    """In float32 on the CPU, on plain torch."""
    return load_decoder(name_or_path, dtype=torch.float32, device=CPU, backend=TorchBackend(), **options)


def reference_model(folder: Path) -> PreTrainedModel:
    """The same folder as ``transformers`` has it, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def random_prompts(seed: int, count: int, vocab: int, longest: int = 40) -> list[list[int]]:
    """Prompts of 1 to ``longest`` tokens."""
    draw = np.random.default_rng(seed)
    return [draw.integers(0, vocab, size=draw.integers(1, longest, endpoint=True)).tolist() for _ in range(count)]


def our_logits(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits of every position, float32 [len(prompt), vocab] each: all prompts in one step, in pages of their own."""
    lengths = [len(prompt) for prompt in prompts]
    widest = -(-max(lengths) // PAGE)
    pages = torch.arange(1, len(prompts) * widest + 1, dtype=torch.int32).view(len(prompts), widest)
    table = torch.cat((pages.flip(0), torch.zeros(1, widest, dtype=torch.int32)))
    starts = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    rows = ExtendRows(
        slots=torch.arange(len(prompts), dtype=torch.int32),
        starts=starts,
        prefix_lens=torch.zeros(len(prompts), dtype=torch.int32),
        longest=max(lengths),
        tokens=sum(lengths),
    )
    slots = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(lengths))
    positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths])
    locations = table[slots, positions // PAGE].to(torch.int64) * PAGE + positions % PAGE
    cache = KvCache(decoder.config.spec, (pages.numel() + 1) * PAGE, PAGE, torch.float32, CPU)
    token_ids = torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int32)
    hidden = decoder.forward(token_ids, positions, locations, cache.layers, AttentionPlan(table, PAGE, extend=rows))
    return list(decoder.logits(hidden).split(lengths))


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """As ``our_logits``, each prompt by itself."""
    return [model(torch.tensor([prompt])).logits[0] for prompt in prompts]
