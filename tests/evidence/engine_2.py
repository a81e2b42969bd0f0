"""Sampled tokens follow the exact distribution, and depend on the request's seed and the token's position alone.

For each set of parameters, the tokens of many seeds and positions are held against the distribution that a separate
computation in float64 gives (chi-square); pairs of neighbouring positions and seeds against independence. The p-values
are judged together, at one per cent over all (Bonferroni). Seeds and positions are the first integers: no others were
tried. Then requests with parameters of all kinds are drawn alone and in several companies: the tokens must be equal.

Last, from one end to the other, in float32 on the CPU: requests with a seed through scheduler, loop and a tiny model
give the tokens that they give alone, in batches, with chunks, prefix hits, retractions and others beside them, under
both loops, but for draws whose margin is below 1e-4.

On a machine with CUDA the Triton kernels draw what is held against the distribution, else torch does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from testbed.engine.inputs import SamplingNeeds, SlotSampling
from testbed.engine.sampler import Sampler
from testbed.sampling import SamplingParams
from tests.engine.seeded import COMPANIES, MARGIN, EndToEnd, end_to_end
from tests.engine.world import tiny_model
from tests.evidence.evidence import Evidence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OVERALL = 0.01
SEEDS = 128
EXPECTED_MIN = 5.0
"""Tokens that are expected less often share a bin (the usual rule for chi-square)."""
VOCAB = 4096
"""Of the model that runs from one end to the other."""
ELEMENTS_MAX = 1 << 22
"""Logits of one call."""

PROMPT_IDS = np.array([0, 1, 2, 2], np.int32)
OUTPUT_IDS = np.array([1, 3, 3, 4], np.int32)
PENALTIES = {"frequency_penalty": 0.6, "presence_penalty": -0.8, "repetition_penalty": 1.4}
BIAS = ((0, 1.5), (5, -2.0), (7, 3.0))
CASES: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("temperature 1", 40, {"temperature": 1.0}),
    ("temperature 0.3", 40, {"temperature": 0.3}),
    ("temperature 5", 40, {"temperature": 5.0}),
    ("top-k 7", 40, {"temperature": 1.0, "top_k": 7}),
    ("top-p 0.8", 40, {"temperature": 1.0, "top_p": 0.8}),
    ("min-p 0.1", 40, {"temperature": 1.5, "min_p": 0.1}),
    ("all filters", 40, {"temperature": 2.0, "top_k": 15, "top_p": 0.85, "min_p": 0.05}),
    ("penalties", 40, {"temperature": 1.0, **PENALTIES}),
    ("logit bias", 40, {"temperature": 1.0, "logit_bias": BIAS}),
    ("minimum length", 40, {"temperature": 1.0, "min_new_tokens": 10**6, "stop_token_ids": (8,)}),
    ("everything", 40, {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "logit_bias": BIAS, **PENALTIES}),
    ("a vocabulary of 2,000", 2000, {"temperature": 1.0}),
)
EOS = 9


def logits_of(vocab_size: int) -> NDArray[np.float32]:
    """[vocab]: some likely tokens, a long tail."""
    bits = torch.Generator().manual_seed(vocab_size)
    return (2 * torch.randn(vocab_size, generator=bits)).numpy()


def exact_shares(logits: NDArray[np.float32], params: SamplingParams) -> NDArray[np.float64]:
    """The distribution that the specification asks for (section H), float64 [vocab], computed without the engine."""
    x = logits.astype(np.float64)
    counts = np.bincount(OUTPUT_IDS, minlength=len(x))
    seen = np.union1d(PROMPT_IDS, OUTPUT_IDS)
    x[seen] = np.where(x[seen] > 0, x[seen] / params.repetition_penalty, x[seen] * params.repetition_penalty)
    x -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    for token, bias in params.logit_bias:
        x[token] += bias
    if params.min_new_tokens:
        x[[EOS, *params.stop_token_ids]] = -np.inf
    shares = np.exp((x - x.max()) / params.temperature)
    shares /= shares.sum()
    descending = np.argsort(-shares, kind="stable")
    reached = np.cumsum(shares[descending])
    places = [int(np.argmax(reached >= params.top_p))] if params.top_p < 1 else []
    places += [params.top_k - 1] if params.top_k > 0 else []
    lowest = max([shares[descending[place]] for place in places], default=0.0)
    kept = np.where(shares >= max(lowest, params.min_p * shares.max()), shares, 0.0)
    return kept / kept.sum()


def needs_all(params: Sequence[SamplingParams]) -> SamplingNeeds:
    """What any of these wants: a step without filters takes another way than one with them."""
    filters = any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params)
    return SamplingNeeds(greedy=False, filters=filters, penalties=True, bias=True, min_new_tokens=True)


def new_sampler(requests: Sequence[SamplingParams], seeds: Sequence[int], vocab_size: int) -> Sampler:
    """Request i in slot i."""
    sampler = Sampler(len(requests), vocab_size, torch.device(DEVICE), [EOS], fused=DEVICE == "cuda")
    sampler.update(
        [
            SlotSampling(slot, params, seed, len(PROMPT_IDS), PROMPT_IDS, OUTPUT_IDS)
            for slot, (params, seed) in enumerate(zip(requests, seeds, strict=True))
        ]
    )
    return sampler


def drawn(
    sampler: Sampler, logits: torch.Tensor, slots: NDArray[np.int32], positions: NDArray[np.int32], needs: SamplingNeeds
) -> NDArray[np.int32]:
    """Tokens of rows in these slots, at these positions, a bounded number of rows at a time: int32 [rows]."""
    step = max(1, ELEMENTS_MAX // logits.shape[1])
    found = []
    for begin in range(0, len(slots), step):
        host = slots[begin : begin + step]
        where, at = torch.tensor(host, device=DEVICE), torch.tensor(positions[begin : begin + step], device=DEVICE)
        found.append(sampler.sample(logits[begin : begin + step], where, at, needs, host).token_ids.cpu())
    return torch.cat(found).numpy()


def tokens_of(vocab_size: int, params: SamplingParams, positions: int) -> NDArray[np.int32]:
    """Tokens of SEEDS seeds (the first integers) at so many positions: int32 [SEEDS, positions]."""
    sampler = new_sampler([params] * SEEDS, range(SEEDS), vocab_size)
    slots, at = np.meshgrid(np.arange(SEEDS, dtype=np.int32), np.arange(positions, dtype=np.int32), indexing="ij")
    logits = torch.from_numpy(logits_of(vocab_size)).to(DEVICE).expand(slots.size, vocab_size)
    found = drawn(sampler, logits, slots.ravel(), at.ravel(), needs_all([params]))
    return found.reshape(slots.shape)


def p_value(counts: NDArray[np.int64], shares: NDArray[np.float64]) -> float:
    """Chi-square against these probabilities; 0 where something impossible happened."""
    if counts[shares == 0].any():
        return 0.0
    expected = shares * counts.sum()
    rare = expected < EXPECTED_MIN
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    some = wanted > 0
    return float(stats.chisquare(observed[some], wanted[some]).pvalue)


def pair_p_value(first: NDArray[np.int32], second: NDArray[np.int32], shares: NDArray[np.float64]) -> float:
    """Chi-square of disjoint pairs of tokens against independence, the tokens in six groups."""
    group = np.arange(len(shares)) % 6
    grouped = np.bincount(group, weights=shares)
    counts = np.bincount(6 * group[first.ravel()] + group[second.ravel()], minlength=36)
    return p_value(counts, np.outer(grouped, grouped).ravel())


def unequal_in_company(requests: int) -> tuple[int, int]:
    """(tokens compared, tokens that differ): requests of all kinds, drawn alone, all at once, and in small groups in
    another order. The logits of a row are the same bits each time."""
    vocab_size = 1000
    params = [SamplingParams(**CASES[i % (len(CASES) - 1)][2]) for i in range(requests)]
    sampler = new_sampler(params, [i * 0x9E3779B97F4A7C15 % 2**64 for i in range(requests)], vocab_size)
    logits = (2 * torch.randn(requests, vocab_size, generator=torch.Generator().manual_seed(1))).to(DEVICE)
    slots, positions = np.arange(requests, dtype=np.int32), np.arange(10, 10 + requests, dtype=np.int32)

    def tokens(rows: NDArray[np.int32]) -> NDArray[np.int32]:
        return drawn(
            sampler, logits[torch.from_numpy(rows).to(DEVICE)], slots[rows], positions[rows], needs_all(params)
        )

    alone = np.concatenate([tokens(slots[i : i + 1]) for i in range(requests)])
    backwards = slots[::-1].copy()
    companies = (tokens(slots), np.concatenate([tokens(group) for group in np.array_split(backwards, 7)])[::-1])
    return 2 * requests, int(sum((alone != company).sum() for company in companies))


def whole_engine(smoke: bool) -> EndToEnd:
    """Seeded requests through everything."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        model = tiny_model("qwen3", Path(folder) / "model", seed=9)
        return end_to_end(model, VOCAB, 14 if smoke else 140, COMPANIES[2:4] if smoke else COMPANIES)


def check(smoke: bool) -> Evidence:
    """Chi-square of every case, of pairs, the companies, and the whole engine."""
    positions = 158 if smoke else 800
    p_values = {}
    for name, vocab_size, wanted in CASES:
        params = SamplingParams(**wanted)
        shares, tokens = exact_shares(logits_of(vocab_size), params), tokens_of(vocab_size, params, positions)
        p_values[name] = p_value(np.bincount(tokens.ravel(), minlength=vocab_size), shares)
        if name == CASES[0][0]:
            again = tokens_of(vocab_size, params, positions)
            p_values["neighbouring positions"] = pair_p_value(tokens[:, ::2], tokens[:, 1::2], shares)
            p_values["neighbouring seeds"] = pair_p_value(tokens[::2], tokens[1::2], shares)
            repeated = bool((tokens == again).all())
    compared, unequal = unequal_in_company(60 if smoke else 300)
    whole = whole_engine(smoke)
    worst = min(p_values, key=lambda name: p_values[name])
    bar = OVERALL / len(p_values)
    return Evidence(
        figure=f"{SEEDS * positions:,} draws a case, {len(CASES)} cases: lowest of {len(p_values)} p-values "
        f"{p_values[worst]:.2g} ({worst}); {unequal} of {compared} tokens differ in other company, "
        f"{len(whole.wrong)} requests of {whole.tokens:,} tokens from one end to the other",
        bar=f"every p-value at least {bar:.2g} (1 % over all), no token and no request differs",
        passed=p_values[worst] >= bar and not unequal and repeated and not whole.wrong,
        details=(
            f"drawn by {'the Triton kernels' if DEVICE == 'cuda' else 'torch on the CPU'}",
            *([] if repeated else ["the same seeds and positions gave other tokens the second time"]),
            *(f"{name}: p = {value:.3f}" for name, value in p_values.items()),
            f"from one end to the other: {whole.close} requests differ from a draw on whose margin is below {MARGIN:g}",
            *whole.wrong,
            *whole.passed_through,
        ),
    )
