"""What changes logits before sampling, by request slot and in one pass: the three penalties and a grammar's bitmask.

Repetition (Keskar et al., arXiv 1909.05858): the logit of a token of prompt or output is divided by the penalty where
positive, else multiplied. Frequency and presence (OpenAI's API): ``logit - frequency * count - presence * (count > 0)``
of outputs only. The mask comes last: what it forbids is -inf.

The counts live on the device, so that the step after next can be launched before the host knows a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from testbed.kernels.language import tl, triton
from testbed.kernels.measure import (
    AheadOfTime,
    benchmark,
    copy_ceiling,
    gigabytes_per_second,
    median_us,
    print_row,
    share,
)

BLOCK = 2048
COUNT_BLOCK = 128
STEP_VIEWS = ("slots_ptr", "token_ids_ptr")
"""Parts of a step's staging buffer: a compilation for each alignment would happen in the middle of a run."""


@dataclass(slots=True)
class Penalties:
    """The penalties of the request in each slot, and what they look at."""

    frequency: Tensor
    """float32 [slots]; 0: none."""
    presence: Tensor
    """float32 [slots]; 0: none."""
    repetition: Tensor
    """float32 [slots], above 0; 1: none."""
    counts: Tensor
    """int32 [slots, vocab]: how often the token is among the outputs."""
    in_prompt: Tensor
    """bool [slots, vocab]"""


def adjust_reference(logits: Tensor, slots: Tensor, penalties: Penalties | None, bitmask: Tensor | None) -> None:
    """Apply both in place, each where it is given.

    ``logits`` float32 [rows, vocab]; ``slots`` int32 [rows]; ``bitmask`` int32 [rows, ceil(vocab / 32)]: bit i of word
    w set: token 32 w + i is allowed.
    """
    if penalties is not None:
        repetition, frequency, presence = (
            column[slots][:, None] for column in (penalties.repetition, penalties.frequency, penalties.presence)
        )
        counts = penalties.counts[slots]
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits.copy_(torch.where(penalties.in_prompt[slots] | (counts > 0), repeated, logits))
        logits -= frequency * counts + presence * (counts > 0)
    if bitmask is not None:
        token = torch.arange(logits.shape[1], device=logits.device)
        logits.masked_fill_((bitmask[:, token // 32] >> (token % 32)) & 1 == 0, -torch.inf)


def count_reference(counts: Tensor, slots: Tensor, token_ids: Tensor) -> None:
    """One more of each row's token in its slot: counts int32 [slots, vocab], slots and token_ids int32 [rows].

    Rows on the last slot (the spare one, for rows that draw no token) and rows without a token (-1) do not count; of
    the other slots, each occurs once.
    """
    counted = (token_ids >= 0) & (slots < len(counts) - 1)
    counts.index_put_((slots, token_ids.clamp(min=0)), counted.to(torch.int32), accumulate=True)


@triton.jit(do_not_specialize_on_alignment=STEP_VIEWS)
def _adjust_kernel(
    logits_ptr,
    stride,
    vocab_size,
    slots_ptr,
    frequency_ptr,
    presence_ptr,
    repetition_ptr,
    counts_ptr,
    in_prompt_ptr,
    bitmask_ptr,
    PENALTIES: tl.constexpr,
    BITMASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab_size
    x = tl.load(logits_ptr + row * stride + token, inside, 0.0)
    if PENALTIES:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        frequency, presence = tl.load(frequency_ptr + slot), tl.load(presence_ptr + slot)
        repetition = tl.load(repetition_ptr + slot)
        # Most rows of a batch want none: they do not read their counts.
        if (frequency != 0) | (presence != 0) | (repetition != 1):
            count = tl.load(counts_ptr + slot * vocab_size + token, inside, 0)
            seen = (count > 0) | (tl.load(in_prompt_ptr + slot * vocab_size + token, inside, 0) != 0)
            x = tl.where(seen, tl.where(x > 0, x / repetition, x * repetition), x)
            x -= frequency * count + tl.where(count > 0, presence, 0.0)
    if BITMASK:
        words = (vocab_size + 31) // 32
        word = tl.load(bitmask_ptr + row * words + token // 32, inside, 0)
        x = tl.where((word >> (token % 32)) & 1 == 1, x, -float("inf"))
    tl.store(logits_ptr + row * stride + token, x, inside)


def adjust(logits: Tensor, slots: Tensor, penalties: Penalties | None, bitmask: Tensor | None) -> None:
    """As ``adjust_reference``."""
    rows, vocab_size = logits.shape
    unread = logits
    _adjust_kernel[(rows, triton.cdiv(vocab_size, BLOCK))](
        logits,
        logits.stride(0),
        vocab_size,
        slots,
        unread if penalties is None else penalties.frequency,
        unread if penalties is None else penalties.presence,
        unread if penalties is None else penalties.repetition,
        unread if penalties is None else penalties.counts,
        unread if penalties is None else penalties.in_prompt,
        unread if bitmask is None else bitmask,
        PENALTIES=penalties is not None,
        BITMASK=bitmask is not None,
        BLOCK=BLOCK,
    )


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=STEP_VIEWS)
def _count_kernel(counts_ptr, slots_ptr, token_ids_ptr, rows, spare, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_ptr + row, row < rows, spare)
    token = tl.load(token_ids_ptr + row, row < rows, -1)
    counted = (slot < spare) & (token >= 0)
    place = counts_ptr + slot.to(tl.int64) * vocab_size + token
    tl.store(place, tl.load(place, counted, 0) + 1, counted)


def count(counts: Tensor, slots: Tensor, token_ids: Tensor) -> None:
    """As ``count_reference``."""
    slot_count, vocab_size = counts.shape
    grid = (triton.cdiv(len(slots), COUNT_BLOCK),)
    _count_kernel[grid](counts, slots, token_ids, len(slots), slot_count - 1, vocab_size, BLOCK=COUNT_BLOCK)


def ahead_of_time() -> AheadOfTime:
    """Variants that must compile without a GPU."""
    columns = dict.fromkeys(("frequency_ptr", "presence_ptr", "repetition_ptr"), "*fp32:16")
    signature = {"logits_ptr": "*fp32:16", "stride": "i32:16", "vocab_size": "i32:16", "slots_ptr": "*i32", **columns}
    signature |= {"counts_ptr": "*i32:16", "in_prompt_ptr": "*i1:16", "bitmask_ptr": "*i32:16"}
    for penalties, bitmask in ((True, False), (False, True), (True, True)):
        constants = {"PENALTIES": penalties, "BITMASK": bitmask, "BLOCK": BLOCK}
        yield _adjust_kernel, signature, constants, {"num_warps": 4}
    counted = {"counts_ptr": "*i32:16", "slots_ptr": "*i32", "token_ids_ptr": "*i32"}
    sizes = {"rows": "i32", "spare": "i32", "vocab_size": "i32:16"}
    yield _count_kernel, {**counted, **sizes}, {"BLOCK": COUNT_BLOCK}, {"num_warps": 4}


def _inputs(rows: int, vocab_size: int, device: str) -> tuple[Tensor, Tensor, Penalties, Tensor]:
    penalties = Penalties(
        frequency=torch.full((rows,), 0.5, device=device),
        presence=torch.full((rows,), 0.5, device=device),
        repetition=torch.full((rows,), 1.1, device=device),
        counts=torch.randint(0, 2, (rows, vocab_size), dtype=torch.int32, device=device),
        in_prompt=torch.randint(0, 2, (rows, vocab_size), device=device).bool(),
    )
    bitmask = torch.full((rows, -(-vocab_size // 32)), -1, dtype=torch.int32, device=device)
    slots = torch.arange(rows, dtype=torch.int32, device=device)
    return torch.randn(rows, vocab_size, device=device), slots, penalties, bitmask


def _table() -> None:
    ceiling = copy_ceiling()
    print_row("rows", "vocabulary", "us", "GB/s", "of copy", "torch us")
    for rows in (1, 8, 64, 256):
        for vocab_size in (32_000, 151_936):
            logits, slots, penalties, bitmask = _inputs(rows, vocab_size, "cuda")
            us = median_us(partial(adjust, logits, slots, penalties, bitmask))
            moved = 2 * logits.nbytes + penalties.counts.nbytes + penalties.in_prompt.nbytes + bitmask.nbytes
            rate = gigabytes_per_second(moved, us)
            theirs = median_us(partial(adjust_reference, logits, slots, penalties, bitmask))
            print_row(rows, vocab_size, us, rate, share(rate, ceiling), theirs)


def _tiny() -> None:
    logits, slots, penalties, bitmask = _inputs(3, 100, "cpu")
    adjust(logits, slots, penalties, bitmask)
    count(penalties.counts, slots, slots)


if __name__ == "__main__":
    benchmark(_table, _tiny)
