"""Logits in bf16 against an fp32 reference with the same weights (those of bf16, widened), for six families.

The reference is ``transformers`` in fp32. So that the error bound cannot excuse us, it is not taken from our errors
but from those of ``transformers``' own bf16 model on the same tokens: twice its largest error at that position, since
either of two logits may be off. At a *clear* position, where the reference's two best logits are further apart than the
bound, our most likely token must be the reference's. Over all positions our largest error must be at most twice that of
``transformers``, and as many top tokens must be right as there, less 2 % (or one, if that is more). In a mixture of
experts, bf16 now and then sends a token to another expert, in either model at tokens of its own: there the bound is the
largest over all positions.

Prompts go in two chunks, the rest of a sequence step by step as a decoding batch that is taught its tokens: prefills
with and without a prefix and decode steps (on a GPU: CUDA graphs) are all in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from testbed.engine.models.create import Sizes, create_model
from testbed.engine.runner import ModelRunner
from testbed.scenario.models import load_model
from tests.engine.world import FAMILIES, STD
from tests.gpu.driver import Driver
from tests.gpu.setting import PAGE_SIZE, Row, is_gpu, opened

REAL_SHAPE = "qwen3-0.6b"


class Size(NamedTuple):
    """Sequences, their prompts' two chunks, and their lengths."""

    rows: int
    chunks: tuple[int, int]
    tokens: int


def measure(device: torch.device) -> Iterator[Row]:
    """Tiny models of every family with weights of deviation 0.3; on a GPU the full shape of Qwen3-0.6B too."""
    size = Size(16, (32, 17), 96) if is_gpu(device) else Size(3, (16, 5), 28)
    for family, preset in FAMILIES.items():
        yield _compare(f"{family}, 2 layers, hidden 64", preset, Sizes(), STD, size, device)
    if is_gpu(device):
        yield _compare(f"the shape of {REAL_SHAPE}", REAL_SHAPE, full_sizes(REAL_SHAPE), 0.02, size, device)


def full_sizes(preset: str) -> Sizes:
    """All sizes of a dense preset."""
    spec = load_model(preset)
    return Sizes(
        layers=spec.layers,
        hidden=spec.hidden,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        intermediate=spec.intermediate,
        vocab=spec.vocab,
    )


def _compare(name: str, preset: str, sizes: Sizes, std: float, size: Size, device: torch.device) -> Row:
    with TemporaryDirectory() as parent:
        folder = create_model(preset, Path(parent) / "model", sizes, std=std, dtype="bfloat16")
        with opened(str(folder), device, size.rows, size.tokens, chunk=max(size.chunks)) as runner:
            driver = Driver(runner, PAGE_SIZE, size.rows, size.tokens)
            ours = _engine_logits(runner, driver, size)
        tokens = torch.from_numpy(driver.tokens).long()
        first = sum(size.chunks) - 1
        reference, theirs = (
            _transformers_logits(folder, tokens, first, dtype, device) for dtype in (torch.float32, torch.bfloat16)
        )
    return _judge(name, ours, theirs, reference, routed=load_model(preset).is_moe)


def _engine_logits(runner: ModelRunner, driver: Driver, size: Size) -> Tensor:
    """Logits behind the prompt and each token after it, float32 [rows, steps, vocab]."""
    starts = []
    for row in range(size.rows):
        driver.taught_prefill(row, size.chunks[0], last=False)
        starts.append(driver.taught_prefill(row, size.chunks[1], last=True))
    steps = [driver.taught_decode() for _ in range(size.tokens - sum(size.chunks))]
    return torch.stack((torch.cat(starts), *steps), dim=1)


@torch.inference_mode()
def _transformers_logits(folder: Path, tokens: Tensor, first: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same of ``transformers``, from position ``first`` on."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval().to(device)
    rows = [model(row[None].to(device)).logits[0, first:].float().cpu() for row in tokens]
    return torch.stack(rows)


def _judge(name: str, ours: Tensor, theirs: Tensor, reference: Tensor, routed: bool) -> Row:
    """Logits [rows, steps, vocab] of the three models."""
    our_errors, their_errors = ((logits - reference).abs().amax(-1) for logits in (ours, theirs))
    our_error, their_error = our_errors.max().item(), their_errors.max().item()
    bound = 2 * (their_errors.max() if routed else their_errors)
    best = reference.topk(2, dim=-1)
    clear = best.values[..., 0] - best.values[..., 1] > bound
    our_same, their_same = (logits.argmax(-1) == best.indices[..., 0] for logits in (ours, theirs))
    judged, wrong, total = int(clear.sum()), int((clear & ~our_same).sum()), clear.numel()
    right, right_there = int(our_same.sum()), int(their_same.sum())
    return Row(
        name,
        f"{judged - wrong} of {judged} clear top tokens the same, {right} of all {total} (transformers' bf16 "
        f"{right_there}); largest error {our_error:.4f} ({their_error:.4f})",
        "all clear ones the same; error at most twice and agreement as in transformers",
        wrong == 0 and our_error <= 2 * their_error and right >= right_there - max(1, 0.02 * total),
        {
            "clear": judged,
            "wrong": wrong,
            "positions": total,
            "same": right,
            "same_transformers": right_there,
            "error": our_error,
            "error_transformers": their_error,
            "mean_error": our_errors.mean().item(),
            "mean_error_transformers": their_errors.mean().item(),
        },
    )
