"""Drawing a token from logits: temperature, top-k, top-p and min-p, random bits by seed and position.

**The draw** is the Gumbel-max trick: ``argmax(logit / temperature + gumbel)`` over the tokens that stay is distributed
as their softmax. It needs no sums over the vocabulary, splits over programs, and has a margin (best minus second best)
beyond which rounding cannot change the token.

**The filters** look at the whole distribution after temperature, each for itself. A token stays if its probability is
at least the ``top_k``-th largest one; at least that of the last token of the smallest set of most likely tokens whose
probabilities reach ``top_p``; at least ``min_p`` times the largest one. Tokens that tie with a threshold stay, and the
most likely one always does. All three say "the logit is at least ...", so one number a row, the lowest logit that
stays, describes them.

A row is greedy where its temperature is 0: the largest logit, of equal ones the first. A row gives -1 where nothing can
be drawn: all logits are -inf, or one is NaN or +inf.

Three kernels. ``_lowest_kept_kernel``, only where a filter is wanted, has a program a row: it bisects the ordered bit
patterns of float32, every step a pass over the row that counts and weighs what is above, so it is exact after at most
32 steps and usually stops much earlier, when a single token is left between the bounds. A row is read often, but from
the L2 cache. ``_best_of_block_kernel`` splits rows over programs, so that a few rows occupy the device too, and
``_best_of_row_kernel`` joins the parts. There are no atomics: results do not vary between runs.
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
from testbed.kernels.philox import token_bits_block, token_bits_reference

BLOCK = 2048
"""Tokens of a program of the draw: a vocabulary of 152k makes 75 programs a row."""
ROW_BLOCK = 8192
"""Tokens at a time of the program that finds a row's thresholds."""
STEP_VIEWS = ("slots_ptr", "positions_ptr")
"""Parts of a step's staging buffer: a compilation for each alignment would happen in the middle of a run."""
NEARLY_ONE = 1 - 2**-24
"""The largest float32 below 1."""


@dataclass(slots=True)
class SamplingColumns:
    """How the request in each slot is sampled, one tensor [slots] a parameter."""

    temperature: Tensor
    """float32, at most 1e30 (which draws among all alike); 0: greedy."""
    top_k: Tensor
    """int32, at least 1; the size of the vocabulary: all."""
    top_p: Tensor
    """float32 in (0, 1]; 1: all."""
    min_p: Tensor
    """float32 in [0, 1]; 0: all."""
    seed: Tensor
    """int64: the bit pattern of 64 bits."""


def gumbel_reference(bits: Tensor) -> Tensor:
    """Standard Gumbel variates, float32, from 32-bit words (int64).

    ``-log(-log(1 - v))`` with v = (word + 1/2) / 2**32 strictly inside (0, 1). Tokens win by a small v, and floats are
    dense near 0: the upper tail, which decides among 150k tokens, is resolved to 2**-32.
    """
    v = ((bits.to(torch.float32) + 0.5) * 2**-32).clamp(max=NEARLY_ONE)
    return -torch.log(-torch.log1p(-v))


def lowest_kept_reference(logits: Tensor, slots: Tensor, columns: SamplingColumns) -> Tensor:
    """The lowest logit that the filters leave: float32 [rows]; -inf in greedy rows. Arguments as of
    ``draw_reference``."""
    temperature, top_k, top_p, min_p = (
        column[slots][:, None] for column in (columns.temperature, columns.top_k, columns.top_p, columns.min_p)
    )
    greedy = temperature == 0
    temperature = torch.where(greedy, 1, temperature)
    ordered = logits.to(torch.float32).sort(dim=-1, descending=True).values
    below_peak = ordered - ordered[:, :1]
    shares = torch.softmax((below_peak / temperature).to(torch.float64), dim=-1)
    more_likely = shares.cumsum(dim=-1) - shares
    kept = torch.arange(logits.shape[1], device=logits.device) < top_k
    kept &= (more_likely < top_p) | (top_p >= 1)
    kept &= below_peak >= temperature * torch.log(min_p)
    lowest = torch.where(kept, ordered, torch.inf).amin(dim=-1)
    return torch.where(greedy[:, 0], -torch.inf, lowest)


def scores_reference(
    logits: Tensor, slots: Tensor, positions: Tensor, columns: SamplingColumns, filters: bool
) -> Tensor:
    """What ``draw_reference`` takes the argmax of, float32 [rows, vocab]; -inf where a token is out."""
    logits = logits.to(torch.float32)
    temperature = columns.temperature[slots][:, None]
    greedy = temperature == 0
    noise = gumbel_reference(token_bits_reference(columns.seed[slots], positions, logits.shape[1]))
    # Behind the largest logit: a tiny temperature must not lift everything to infinity.
    drawn = (logits - logits.amax(dim=-1, keepdim=True)) / torch.where(greedy, 1, temperature) + noise
    scores = torch.where(greedy, logits, drawn)
    if not filters:
        return scores
    return torch.where(logits >= lowest_kept_reference(logits, slots, columns)[:, None], scores, -torch.inf)


def draw_reference(logits: Tensor, slots: Tensor, positions: Tensor, columns: SamplingColumns, filters: bool) -> Tensor:
    """A token for each row: int32 [rows], -1 where nothing can be drawn.

    ``logits`` [rows, vocab] of any float dtype; ``slots`` int32 [rows]; ``positions`` int32 [rows]: where in its
    sequence the token will stand; without ``filters``, top-k, top-p and min-p are not looked at.
    """
    return _or_none(logits, scores_reference(logits, slots, positions, columns, filters))


def greedy_reference(logits: Tensor) -> Tensor:
    """The most likely token of each row, of equal ones the first: int32 [rows], -1 where there is none."""
    return _or_none(logits, logits)


def _or_none(logits: Tensor, scores: Tensor) -> Tensor:
    """argmax of the scores; torch documents that it is the first of equal ones, and that amax passes NaN on."""
    tokens = scores.argmax(dim=-1).to(torch.int32)
    return torch.where(logits.amax(dim=-1).isfinite(), tokens, -1)


@triton.jit
def _ordered_bits(x):
    """float32 and its bit pattern as an int32 that compares as the float does; its own inverse on int32."""
    return x ^ ((x >> 31) & 0x7FFFFFFF)


@triton.jit
def _gumbel(bits):
    """As ``gumbel_reference``. Below 2**-8 a series stands for log1p, which Triton lacks: the next term is 2**-26 of
    the sum."""
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1 - 5.9604644775390625e-08)
    exponential = tl.where(v < 0.00390625, v * (1 + v * (0.5 + v * (1 / 3))), -tl.log(1 - v))
    return -tl.log(exponential)


@triton.jit
def _above(logits_ptr, threshold, peak, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """(number, weight) of the tokens whose logit is at least the threshold; the weight of the largest is 1."""
    number = tl.zeros([BLOCK], tl.int32)
    weight = tl.zeros([BLOCK], tl.float32)
    for first in range(0, VOCAB, BLOCK):
        token = first + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + token, token < VOCAB, -float("inf")).to(tl.float32)
        above = x >= threshold
        number += above.to(tl.int32)
        weight += tl.where(above, tl.exp((x - peak) / temperature), 0.0)
    return tl.sum(number, 0), tl.sum(weight, 0)


@triton.jit
def _peak(logits_ptr, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit; +inf where one is NaN."""
    peak = tl.full([BLOCK], -float("inf"), tl.float32)
    for first in range(0, VOCAB, BLOCK):
        token = first + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + token, token < VOCAB, -float("inf")).to(tl.float32)
        peak = tl.maximum(peak, tl.where(x == x, x, float("inf")))
    return tl.max(peak, 0)


@triton.jit
def _lowest_near_peak(logits_ptr, floor, peak, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest finite logit that is at least ``floor`` (at most 0) above the largest one."""
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    for first in range(0, VOCAB, BLOCK):
        token = first + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + token, token < VOCAB, -float("inf")).to(tl.float32)
        lowest = tl.minimum(lowest, tl.where((x - peak >= floor) & (x > -float("inf")), x, float("inf")))
    return tl.min(lowest, 0)


@triton.jit(do_not_specialize_on_alignment=STEP_VIEWS)
def _lowest_kept_kernel(
    logits_ptr,
    stride,
    slots_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    lowest_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    temperature, top_k = tl.load(temperature_ptr + slot), tl.load(top_k_ptr + slot)
    top_p, min_p = tl.load(top_p_ptr + slot), tl.load(min_p_ptr + slot)
    tl.store(lowest_ptr + row, -float("inf"))
    if (temperature == 0) | ((top_k >= VOCAB) & (top_p >= 1) & (min_p == 0)):
        return
    logits_ptr += row * stride
    peak = _peak(logits_ptr, VOCAB, BLOCK)
    if not ((peak > -float("inf")) & (peak < float("inf"))):
        return
    floor = tl.where(min_p > 0, temperature * tl.log(tl.where(min_p > 0, min_p, 1.0)), -float("inf"))
    lowest = _lowest_near_peak(logits_ptr, floor, peak, VOCAB, BLOCK)
    if (top_k < VOCAB) | (top_p < 1):
        _, total = _above(logits_ptr, -float("inf"), peak, temperature, VOCAB, BLOCK)
        target = tl.where(top_p < 1, top_p * total, float("inf"))
        number_low, weight = _above(logits_ptr, lowest, peak, temperature, VOCAB, BLOCK)
        # Between the bounds lies the highest logit that leaves enough: ``low`` does, ``high`` does not.
        low = _ordered_bits(lowest.to(tl.int32, bitcast=True)).to(tl.int64)
        high = _ordered_bits(peak.to(tl.int32, bitcast=True)).to(tl.int64) + 1
        # min-p alone left too little for the others to say anything: no step.
        number_high = tl.where((number_low >= top_k) | (weight >= target), 0, number_low)
        while (number_low - number_high > 1) & (high - low > 1):
            middle = (low + high) >> 1
            threshold = _ordered_bits(middle.to(tl.int32)).to(tl.float32, bitcast=True)
            number, weight = _above(logits_ptr, threshold, peak, temperature, VOCAB, BLOCK)
            enough = (number >= top_k) | (weight >= target)
            low, number_low = tl.where(enough, middle, low), tl.where(enough, number, number_low)
            high, number_high = tl.where(enough, high, middle), tl.where(enough, number_high, number)
        lowest = _ordered_bits(low.to(tl.int32)).to(tl.float32, bitcast=True)
    tl.store(lowest_ptr + row, lowest)


def lowest_kept(logits: Tensor, slots: Tensor, columns: SamplingColumns) -> Tensor:
    """As ``lowest_kept_reference``, except that the result need not be a logit of the row: it lies above the highest
    one that is out, and not above the lowest one that stays."""
    rows, vocab_size = logits.shape
    lowest = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _lowest_kept_kernel[(rows,)](
        logits,
        logits.stride(0),
        slots,
        columns.temperature,
        columns.top_k,
        columns.top_p,
        columns.min_p,
        lowest,
        VOCAB=vocab_size,  # loops over it, and there is one a model
        BLOCK=ROW_BLOCK,
        num_warps=16,
    )
    return lowest


@triton.jit
def _score(x, noise, peak, temperature):
    """As ``scores_reference``; ``peak`` may be any number of the size of the logits: it only keeps them small."""
    finite = (peak > -float("inf")) & (peak < float("inf"))
    return (x - tl.where(finite, peak, 0.0)) / temperature + noise


@triton.jit(do_not_specialize_on_alignment=STEP_VIEWS)
def _best_of_block_kernel(
    logits_ptr,
    stride,
    vocab_size,
    slots_ptr,
    positions_ptr,
    temperature_ptr,
    seed_ptr,
    lowest_ptr,
    parts_ptr,
    tokens_ptr,
    GREEDY: tl.constexpr,
    FILTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * stride + token, token < vocab_size, -float("inf")).to(tl.float32)
    x = tl.where(x == x, x, float("inf"))  # a NaN spoils the row as +inf does, and compares
    peak = tl.max(x, 0)
    score, noise = x, tl.zeros([BLOCK], tl.float32)
    if not GREEDY:
        slot = tl.load(slots_ptr + row)
        temperature = tl.load(temperature_ptr + slot)
        if temperature > 0:
            bits = token_bits_block(tl.load(seed_ptr + slot), tl.load(positions_ptr + row), block * BLOCK, BLOCK)
            noise = _gumbel(bits)
            score = _score(x, noise, peak, temperature)
        if FILTERS:
            score = tl.where(x >= tl.load(lowest_ptr + row), score, -float("inf"))
    chosen = tl.argmax(score, 0, tie_break_left=True)
    is_chosen = tl.arange(0, BLOCK) == chosen
    logit = tl.max(tl.where(is_chosen & (score > -float("inf")), x, -float("inf")), 0)
    blocks = tl.num_programs(1)
    part = row * blocks + block
    plane = tl.num_programs(0).to(tl.int64) * blocks
    tl.store(parts_ptr + part, peak)
    tl.store(parts_ptr + plane + part, logit)
    tl.store(parts_ptr + 2 * plane + part, tl.sum(tl.where(is_chosen, noise, 0.0), 0))
    tl.store(tokens_ptr + part, block * BLOCK + chosen)


@triton.jit(do_not_specialize_on_alignment=STEP_VIEWS)
def _best_of_row_kernel(
    parts_ptr,
    tokens_ptr,
    blocks,
    slots_ptr,
    temperature_ptr,
    out_ptr,
    GREEDY: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    inside = block < blocks
    part = row * blocks + block
    plane = tl.num_programs(0).to(tl.int64) * blocks
    peak = tl.max(tl.load(parts_ptr + part, inside, -float("inf")), 0)
    logit = tl.load(parts_ptr + plane + part, inside, -float("inf"))
    score = logit
    if not GREEDY:
        temperature = tl.load(temperature_ptr + tl.load(slots_ptr + row))
        if temperature > 0:
            score = _score(logit, tl.load(parts_ptr + 2 * plane + part, inside, 0.0), peak, temperature)
    best = tl.argmax(score, 0, tie_break_left=True)
    token = tl.load(tokens_ptr + row * blocks + best)
    exists = (peak > -float("inf")) & (peak < float("inf"))
    tl.store(out_ptr + row, tl.where(exists, token, -1))


def draw(logits: Tensor, slots: Tensor, positions: Tensor, columns: SamplingColumns, filters: bool) -> Tensor:
    """As ``draw_reference``; the same token wherever the margin exceeds the rounding of float32 (1e-5 and less)."""
    lowest = lowest_kept(logits, slots, columns) if filters else logits
    return _best(logits, slots, positions, columns.temperature, columns.seed, lowest, greedy=False, filters=filters)


def greedy(logits: Tensor) -> Tensor:
    """As ``greedy_reference``."""
    return _best(logits, logits, logits, logits, logits, logits, greedy=True, filters=False)


def _best(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    temperature: Tensor,
    seed: Tensor,
    lowest: Tensor,
    greedy: bool,
    filters: bool,
) -> Tensor:
    """Both kernels of the draw. Tensors that a variant does not read may be any."""
    rows, vocab_size = logits.shape
    blocks = triton.cdiv(vocab_size, BLOCK)
    parts = torch.empty((3, rows, blocks), dtype=torch.float32, device=logits.device)
    tokens = torch.empty((rows, blocks), dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int32, device=logits.device)
    _best_of_block_kernel[(rows, blocks)](
        logits,
        logits.stride(0),
        vocab_size,
        slots,
        positions,
        temperature,
        seed,
        lowest,
        parts,
        tokens,
        GREEDY=greedy,
        FILTERS=filters,
        BLOCK=BLOCK,
    )
    _best_of_row_kernel[(rows,)](
        parts, tokens, blocks, slots, temperature, out, GREEDY=greedy, BLOCKS=triton.next_power_of_2(blocks)
    )
    return out


def ahead_of_time() -> AheadOfTime:
    """Variants that must compile without a GPU."""
    slot = {"slots_ptr": "*i32", "temperature_ptr": "*fp32:16"}
    parts = {"parts_ptr": "*fp32:16", "tokens_ptr": "*i32:16"}
    for dtype in ("bf16", "fp32"):
        logits = {"logits_ptr": f"*{dtype}:16", "stride": "i32:16"}
        filters = {"top_k_ptr": "*i32:16", "top_p_ptr": "*fp32:16", "min_p_ptr": "*fp32:16", "lowest_ptr": "*fp32:16"}
        yield (
            _lowest_kept_kernel,
            {**logits, **slot, **filters},
            {"VOCAB": 151_936, "BLOCK": ROW_BLOCK},
            {"num_warps": 16},
        )
        draws = {"vocab_size": "i32:16", "positions_ptr": "*i32", "seed_ptr": "*i64:16", "lowest_ptr": "*fp32:16"}
        for kind in ({"GREEDY": True, "FILTERS": False}, *({"GREEDY": False, "FILTERS": on} for on in (False, True))):
            constants = {**kind, "BLOCK": BLOCK}
            yield _best_of_block_kernel, {**logits, **slot, **draws, **parts}, constants, {"num_warps": 4}
    for greedily in (False, True):
        signature = {**parts, "blocks": "i32", **slot, "out_ptr": "*i32:16"}
        yield _best_of_row_kernel, signature, {"GREEDY": greedily, "BLOCKS": 128}, {"num_warps": 4}


def _columns(slots: int, device: str, top_k: int, top_p: float, min_p: float) -> SamplingColumns:
    return SamplingColumns(
        temperature=torch.full((slots,), 0.8, device=device),
        top_k=torch.full((slots,), top_k, dtype=torch.int32, device=device),
        top_p=torch.full((slots,), top_p, device=device),
        min_p=torch.full((slots,), min_p, device=device),
        seed=torch.arange(slots, device=device),
    )


def _sort_based(logits: Tensor, slots: Tensor, columns: SamplingColumns, filters: bool) -> Tensor:
    """The usual way with torch: sort, cumulative sums, scatter back, exponential noise."""
    scaled = logits.float() / columns.temperature[slots][:, None]
    if filters:
        ordered, places = scaled.sort(dim=-1, descending=True)
        shares = ordered.softmax(dim=-1)
        out = torch.arange(logits.shape[1], device=logits.device) >= columns.top_k[slots][:, None]
        out |= shares.cumsum(dim=-1) - shares >= columns.top_p[slots][:, None]
        out |= shares < shares[:, :1] * columns.min_p[slots][:, None]
        scaled = torch.empty_like(ordered).scatter_(1, places, ordered.masked_fill(out, -torch.inf))
    shares = scaled.softmax(dim=-1)
    return (shares / torch.empty_like(shares).exponential_()).argmax(dim=-1)


def _table() -> None:
    ceiling = copy_ceiling()
    print_row("rows", "vocabulary", "kind", "us", "GB/s", "of copy", "torch us")
    kinds = {"greedy": (0, 1.0, 0.0), "plain": (0, 1.0, 0.0), "top-k": (50, 1.0, 0.0), "all": (50, 0.9, 0.05)}
    for rows in (1, 8, 64, 256, 512):
        for vocab_size in (32_000, 151_936):
            logits = (torch.randn(rows, vocab_size, device="cuda") * 3).bfloat16()
            slots = torch.arange(rows, dtype=torch.int32, device="cuda")
            for kind, (top_k, top_p, min_p) in kinds.items():
                columns = _columns(rows, "cuda", top_k or vocab_size, top_p, min_p)
                filters = kind not in ("greedy", "plain")
                ours = partial(draw, logits, slots, slots, columns, filters)
                theirs = partial(_sort_based, logits, slots, columns, filters)
                if kind == "greedy":
                    ours, theirs = partial(greedy, logits), partial(torch.argmax, logits, -1)
                us = median_us(ours)
                rate = gigabytes_per_second(logits.nbytes, us)  # of one reading: what no method can do without
                print_row(rows, vocab_size, kind, us, rate, share(rate, ceiling), median_us(theirs))


def _tiny() -> None:
    slots = torch.arange(3, dtype=torch.int32)
    draw(torch.randn(3, 100), slots, slots, _columns(3, "cpu", 10, 0.9, 0.1), filters=True)


if __name__ == "__main__":
    benchmark(_table, _tiny)
