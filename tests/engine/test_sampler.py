"""The sampler: order of what it does, state by slot through retraction and reuse, and its independence of the batch.

Everything is asked of both implementations: torch, and the Triton kernels (in the interpreter).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from testbed.engine.inputs import SamplingNeeds, SlotSampling
from testbed.engine.sampler import Sampled, Sampler
from testbed.kernels.sampling import SamplingColumns, scores_reference
from testbed.sampling import SamplingParams

SLOTS, VOCAB, EOS = 6, 40, 3
PROMPT = 5
"""Tokens of every prompt: the first output stands at this position."""
MARGIN = 1e-4
ALL = SamplingNeeds(False, filters=True, penalties=True, bias=True, min_new_tokens=True)
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["torch", "triton"])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def new_sampler(fused: bool, vocab_size: int = VOCAB) -> Sampler:
    return Sampler(SLOTS, vocab_size, "cpu", [EOS], fused)


def told(
    slot: int, seed: int = 0, prompt: Sequence[int] = (), outputs: Sequence[int] = (), **params: Any
) -> SlotSampling:
    ids = (np.array(prompt, np.int32), np.array(outputs, np.int32))
    return SlotSampling(slot, SamplingParams(**params), seed, PROMPT, *ids)


def sample(
    sampler: Sampler, logits: Tensor, slots: Sequence[int], outputs: Sequence[int] | int = 0, **wanted: Any
) -> Sampled:
    """Draw in these slots, whose requests have so many outputs."""
    host = np.array(slots, np.int32)
    outputs = [outputs] * len(slots) if isinstance(outputs, int) else outputs
    positions = torch.tensor([PROMPT + n for n in outputs], dtype=torch.int32)
    needs, bitmask = wanted.get("needs", ALL), wanted.get("bitmask")
    return sampler.sample(logits, torch.from_numpy(host), positions, needs, host, bitmask)


def some_logits(seed: int, rows: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def allow(*tokens: int) -> Tensor:
    words = np.zeros((1, -(-VOCAB // 32)), np.uint32)
    for token in tokens:
        words[0, token // 32] |= np.uint32(1 << token % 32)
    return torch.from_numpy(words.view(np.int32))


# -- order ------------------------------------------------------------------------------------------------------------


def greedy_token(
    fused: bool, values: dict[int, float], bitmask: Tensor | None = None, n: int = 0, **params: Any
) -> int:
    """What a greedy request takes whose logits are these, and -50 elsewhere."""
    logits = torch.full((1, VOCAB), -50.0)
    for token, value in values.items():
        logits[0, token] = value
    sampler = new_sampler(fused)
    sampler.update([told(1, **params)])
    return int(sample(sampler, logits, [1], n, bitmask=bitmask).token_ids)


@FUSED
def test_order_by_hand(fused: bool) -> None:
    # repetition, then frequency and presence: 8 / 2 - 1 * 2 - 0.5 = 1.5; the other way round (8 - 2.5) / 2 = 2.75
    penalised = {"repetition_penalty": 2.0, "frequency_penalty": 1.0, "presence_penalty": 0.5, "outputs": (7, 7)}
    assert greedy_token(fused, {7: 8.0, 8: 1.6}, **penalised) == 8
    assert greedy_token(fused, {7: 8.0, 8: 1.4}, **penalised) == 7
    # penalties before the bias: 2 / 2 + 4 = 5; the other way round (2 + 4) / 2 = 3
    biased = {"repetition_penalty": 2.0, "prompt": (7,), "logit_bias": ((7, 4.0),)}
    assert greedy_token(fused, {7: 2.0, 8: 4.0}, **biased) == 7
    # the bias does not bring back what the mask forbids, nor what comes too early
    assert greedy_token(fused, {7: 2.0, 8: 1.0}, allow(8, 9), logit_bias=((7, 100.0),)) == 8
    early = {"logit_bias": ((EOS, 100.0), (11, 90.0)), "min_new_tokens": 2, "stop_token_ids": (11,)}
    assert [greedy_token(fused, {8: 1.0}, n=n, **early) for n in range(4)] == [8, 8, EOS, EOS]
    # the frequency penalty counts outputs, not the prompt; the repetition penalty sees both
    assert greedy_token(fused, {7: 2.0, 8: 1.0}, frequency_penalty=2.0, prompt=(7,)) == 7
    assert greedy_token(fused, {7: 2.0, 8: 1.5}, repetition_penalty=2.0, prompt=(7,)) == 8


@FUSED
def test_filters_come_after_bias_and_temperature(fused: bool) -> None:
    """Token 1 has a share of 0.26 after its bias; a temperature of 2 makes it 0.37."""
    logits = torch.full((30, VOCAB), -math.inf)
    logits[:, 0], logits[:, 1] = math.log(0.74), math.log(0.26) - 5
    for temperature, tokens in ((1.0, {0}), (2.0, {0, 1})):
        sampler = new_sampler(fused)
        sampler.update([told(0, temperature=temperature, min_p=0.5, logit_bias=((1, 5.0),))])
        assert set(sample(sampler, logits, [0] * 30, range(30)).token_ids.tolist()) == tokens


def adjusted_in_python(logits: list[float], request: SlotSampling, n: int) -> list[float]:
    params, outputs = request.params, request.output_ids.tolist()
    seen = {*outputs, *request.prompt_ids.tolist()}
    out = []
    for token, value in enumerate(logits):
        x = value
        if token in seen:
            x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
        x -= params.frequency_penalty * outputs.count(token) + params.presence_penalty * (token in outputs)
        x += sum(bias for biased, bias in params.logit_bias if biased == token)
        early = n < params.min_new_tokens and token in (EOS, *params.stop_token_ids)
        out.append(-math.inf if early else x)
    return out


REQUESTS = st.builds(
    lambda slot_seed, prompt, outputs, **params: (slot_seed, prompt, outputs, params),
    slot_seed=st.integers(0, 2**64 - 1),
    prompt=st.lists(st.integers(0, VOCAB - 1), max_size=8),
    outputs=st.lists(st.integers(0, VOCAB - 1), max_size=8),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([-1, 1, 3, 10]),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05]),
    frequency_penalty=st.sampled_from([0.0, 1.5, -0.5]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.8, 0.5]),
    min_new_tokens=st.sampled_from([0, 5]),
    logit_bias=st.lists(st.tuples(st.integers(0, VOCAB - 1), st.sampled_from([-4.0, 3.0])), max_size=3).map(tuple),
    stop_token_ids=st.sampled_from([(), (5, 6), (EOS,)]),
)


@FUSED
@given(requests=st.lists(REQUESTS, min_size=1, max_size=4), seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_everything_together(fused: bool, requests: list[Any], seed: int) -> None:
    """The token with the best score over logits that plain Python has changed, unless another is as good."""
    sampler, logits = new_sampler(fused), some_logits(seed, len(requests))
    slots = [told(slot, s, prompt, outputs, **params) for slot, (s, prompt, outputs, params) in enumerate(requests)]
    sampler.update(slots)
    n = [len(request.output_ids) for request in slots]
    found = sample(sampler, logits, range(len(slots)), n).token_ids.tolist()
    for row, request in enumerate(slots):
        params = request.params
        columns = SamplingColumns(
            temperature=torch.tensor([0.0 if params.greedy else params.temperature]),
            top_k=torch.tensor([params.top_k if params.top_k > 0 else VOCAB]),
            top_p=torch.tensor([params.top_p]),
            min_p=torch.tensor([params.min_p]),
            seed=torch.tensor([request.seed], dtype=torch.uint64).view(torch.int64),
        )
        changed = torch.tensor([adjusted_in_python(logits[row].tolist(), request, n[row])])
        position = torch.tensor([PROMPT + n[row]])
        scores = scores_reference(changed, torch.tensor([0]), position, columns, filters=True)[0]
        best, second = scores.topk(2).values.tolist()
        assert found[row] == int(scores.argmax()) or best - second < MARGIN


# -- state by slot ----------------------------------------------------------------------------------------------------

PENALISED = {"temperature": 0.8, "frequency_penalty": 0.7, "presence_penalty": 0.4, "repetition_penalty": 1.3}


def generate(
    sampler: Sampler, request: SlotSampling, begin: int, end: int, company: Sequence[int] = (), seed: int = 0
) -> list[int]:
    """Outputs ``begin .. end - 1`` of a request, whose logits depend on nothing but the number of the output; the rows
    of ``company`` are drawn and counted beside it, at other positions."""
    tokens = []
    slots = torch.tensor([*company, request.slot], dtype=torch.int32)
    for n in range(begin, end):
        rows = torch.cat((some_logits(10**6 + seed + n, len(company)), some_logits(n, 1, scale=1.0)))
        drawn = sample(sampler, rows, slots.tolist(), [n + 7] * len(company) + [n]).token_ids
        sampler.count(slots, drawn)
        tokens.append(int(drawn[-1]))
    return tokens


@FUSED
def test_penalties_are_carried_through_retraction(fused: bool) -> None:
    """Into another slot, whose former request left counts, a bias and forbidden tokens behind."""
    request = told(0, 99, prompt=(1, 2, 3), min_new_tokens=12, logit_bias=((4, 2.0),), **PENALISED)
    straight = new_sampler(fused)
    straight.update([request])
    tokens = generate(straight, request, 0, 20)
    assert len(set(tokens)) < 20, "no token came twice: the counts were not put to use"

    retracted = new_sampler(fused)
    other = told(4, 5, prompt=range(10), logit_bias=((tokens[8], 50.0),), stop_token_ids=(tokens[9],), **PENALISED)
    retracted.update([request, other])
    before = generate(retracted, request, 0, 8, company=[4])
    late = torch.tensor([0], dtype=torch.int32)
    retracted.count(
        late, torch.tensor([tokens[8]], dtype=torch.int32)
    )  # of a step that was in flight: its slot is free
    again = told(4, 99, (1, 2, 3), before, min_new_tokens=12, logit_bias=((4, 2.0),), **PENALISED)
    retracted.update([again])
    assert before + generate(retracted, again, 8, 20) == tokens

    forgotten = new_sampler(fused)
    bare = told(4, 99, (1, 2, 3), (), min_new_tokens=12, logit_bias=((4, 2.0),), **PENALISED)
    forgotten.update([bare])
    assert before + generate(forgotten, bare, 8, 20) != tokens, "this run could not have shown a loss of the counts"


@FUSED
def test_a_reused_slot_is_new(fused: bool) -> None:
    """Whatever the slot's former request wanted, a default request in it is greedy and plain."""
    sampler, logits = new_sampler(fused), some_logits(1, 1)
    best = int(logits.argmax())
    heavy = {**PENALISED, "min_new_tokens": 100, "stop_token_ids": (best,), "logit_bias": ((best, -100.0),)}
    sampler.update([told(2, 1, prompt=(best,), outputs=(best,) * 5, top_k=2, **heavy)])
    assert int(sample(sampler, logits, [2]).token_ids) != best
    sampler.update([told(2)])
    assert int(sample(sampler, logits, [2]).token_ids) == best


@FUSED
def test_rows_without_a_token_do_not_count(fused: bool) -> None:
    """The spare slot and -1; a fresh spare slot is greedy."""
    sampler, logits = new_sampler(fused), torch.zeros(2, VOCAB)
    logits[:, 7], logits[:, 8] = 1.0, 0.5
    sampler.update([told(0, presence_penalty=2.0), told(1, presence_penalty=2.0)])
    sampler.count(torch.tensor([0, SLOTS, 1], dtype=torch.int32), torch.tensor([-1, 7, 7], dtype=torch.int32))
    assert sample(sampler, logits, [0, 1]).token_ids.tolist() == [7, 8]
    assert sample(sampler, logits, [SLOTS, SLOTS]).token_ids.tolist() == [7, 7]


@FUSED
def test_sparse_pairs_follow_the_rows(fused: bool) -> None:
    """They are kept while the rows stay: new rows, or a new request in a row's slot, must be seen."""
    sampler, logits = new_sampler(fused), torch.zeros(2, VOCAB)
    sampler.update([told(0, logit_bias=((10, 1.0),)), told(1, logit_bias=((11, 1.0), (11, 1.0), (12, 1.5)))])
    assert sample(sampler, logits, [0, 1]).token_ids.tolist() == [10, 11]
    assert sample(sampler, logits, [1, 0]).token_ids.tolist() == [11, 10]
    sampler.update([told(0, logit_bias=((13, 1.0),))])
    assert sample(sampler, logits, [1, 0]).token_ids.tolist() == [11, 13]
    assert sample(sampler, logits, [2, 3]).token_ids.tolist() == [0, 0]


# -- the draw ---------------------------------------------------------------------------------------------------------


@FUSED
def test_the_batch_does_not_matter(fused: bool) -> None:
    """A seeded request gives the same tokens alone and in changing company, in whatever slot and row."""
    request = told(0, 2**64 - 5, prompt=(1, 2), top_k=20, top_p=0.95, **PENALISED)
    alone = new_sampler(fused)
    alone.update([request])
    tokens = generate(alone, request, 0, 8)
    for company in ([1, 2], [3], [0, 1, 2, 4]):
        sampler = new_sampler(fused)
        again = told(5, 2**64 - 5, prompt=(1, 2), top_k=20, top_p=0.95, **PENALISED)
        sampler.update([told(slot, slot, temperature=1.0, repetition_penalty=1.5) for slot in company])
        sampler.update([again])
        assert generate(sampler, again, 0, 8, company, seed=len(company)) == tokens


@FUSED
def test_all_bits_of_a_seed_count(fused: bool) -> None:
    logits = torch.zeros(12, VOCAB)
    seeds = [0, 1, 2**31, 2**32, 2**63, 2**64 - 1]
    sampler = new_sampler(fused)
    sampler.update([told(slot, seed, temperature=1.0) for slot, seed in enumerate(seeds)])
    drawn = [tuple(sample(sampler, logits, [slot] * 12, range(12)).token_ids.tolist()) for slot in range(len(seeds))]
    assert len(set(drawn)) == len(seeds)


@FUSED
def test_extreme_parameters(fused: bool) -> None:
    """They pass validation, so each must draw a token, and the obvious one where there is one."""
    logits = some_logits(4, 1)
    best = int(logits.argmax())
    cases: list[tuple[dict[str, Any], bool]] = [
        ({"temperature": 1e-38}, True),
        ({"temperature": 5e-324}, True),
        ({"temperature": 9.9e-7}, True),
        ({"temperature": 1e-6}, True),
        ({"temperature": 1e308}, False),
        ({"temperature": 1e308, "top_k": 1}, True),
        ({"temperature": 1e308, "min_p": 1.0}, True),
        ({"temperature": 1.0, "top_p": 1e-300}, True),
        ({"temperature": 1.0, "min_p": 1.0}, True),
        ({"temperature": 1.0, "min_p": 1e-300}, False),
        ({"temperature": 1.0, "top_k": 2**40}, False),
        ({"temperature": 1.0, "repetition_penalty": 5e-324, "prompt": (0,)}, False),
    ]
    for params, obvious in cases:
        sampler = new_sampler(fused)
        request = told(0, **params)
        assert request.params.problem(VOCAB) is None
        sampler.update([request])
        token = int(sample(sampler, logits, [0]).token_ids)
        assert token == best if obvious else 0 <= token < VOCAB, params


@FUSED
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}])
def test_a_row_without_tokens(fused: bool, params: dict[str, float]) -> None:
    """A grammar that forbids all, a NaN: -1 and a log-probability of NaN, with and without temperature."""
    sampler = new_sampler(fused)
    sampler.update([told(0, **params)])
    logits = some_logits(5, 2)
    logits[1, 4] = math.nan
    bitmask = torch.zeros(2, 2, dtype=torch.int32)
    bitmask[1] = -1
    needs = SamplingNeeds(greedy=not params, logprobs=True)
    sampled = sample(sampler, logits, [0, 0], needs=needs, bitmask=bitmask)
    assert sampled.token_ids.tolist() == [-1, -1]
    assert sampled.logprobs is not None and bool(sampled.logprobs.isnan().all())


@FUSED
def test_logprobs_are_the_models_own(fused: bool) -> None:
    """Of the logits as they came, whatever was done before the draw; and these are left as they were."""
    sampler, logits = new_sampler(fused), some_logits(6, 3)
    before = logits.clone()
    sampler.update(
        [told(slot, slot, outputs=(1, 2), logit_bias=((1, 9.0),), top_k=5, **PENALISED) for slot in range(3)]
    )
    needs = SamplingNeeds(False, filters=True, penalties=True, bias=True, logprobs=True, top_logprobs=4)
    sampled = sample(sampler, logits, [0, 1, 2], needs=needs)
    assert torch.equal(logits, before)
    exact = torch.log_softmax(before.double(), dim=-1)
    assert sampled.logprobs is not None and sampled.top_ids is not None and sampled.top_logprobs is not None
    rows = torch.arange(3)
    torch.testing.assert_close(sampled.logprobs.double(), exact[rows, sampled.token_ids], atol=1e-6, rtol=0)
    assert torch.equal(sampled.top_ids.long(), exact.topk(4).indices)
    torch.testing.assert_close(sampled.top_logprobs.double(), exact.topk(4).values, atol=1e-6, rtol=0)
    assert (sampled.token_ids.dtype, sampled.top_ids.dtype) == (torch.int32, torch.int32)


@FUSED
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_greedy_takes_the_first_of_equal_logits(fused: bool, dtype: torch.dtype) -> None:
    logits = torch.zeros(2, VOCAB, dtype=dtype)
    logits[0, [9, 30]], logits[1, [8, 39]] = 1.0, 1.0
    sampler = new_sampler(fused)
    for needs in (SamplingNeeds(), ALL):
        assert sample(sampler, logits, [0, 1], needs=needs).token_ids.tolist() == [9, 8]
