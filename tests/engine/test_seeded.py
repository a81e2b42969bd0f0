"""A seeded request gives the same tokens in every company; one without a seed has a series of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from testbed.kernels.sampling import SamplingColumns, scores_reference
from tests.engine.against_transformers import Asked, Setting, happened
from tests.engine.seeded import (
    ALONE,
    COMPANIES,
    KINDS,
    MARGIN,
    Drawn,
    close_calls,
    differences,
    drawn,
    seeded_requests,
)
from tests.engine.world import tiny_model

VOCAB = 4096
REQUESTS = 28


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3", tmp_path_factory.mktemp("models") / "qwen3", seed=9)


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    return seeded_requests(REQUESTS, VOCAB)


@pytest.fixture(scope="module")
def alone(folder: Path, asked: list[Asked]) -> Drawn:
    return drawn(folder, ALONE, asked)


def same(one: Drawn, other: Drawn, asked: Sequence[Asked]) -> None:
    """No request differs but from a close call on, and hardly one does that."""
    found = differences(one, other, asked)
    assert [difference for difference in found if not difference.close] == []
    assert len(found) < 3


@pytest.mark.parametrize("setting", COMPANIES, ids=str)
def test_the_same_tokens_in_every_company(folder: Path, asked: list[Asked], alone: Drawn, setting: Setting) -> None:
    run = drawn(folder, setting, asked)
    assert happened(run.outcome).lacking(setting, REQUESTS) == []
    same(alone, run, asked)
    if setting.forced:
        assert sum(request.retractions > 0 and request.old_outputs > 0 for request in run.outcome.requests.values()) > 5


def test_the_same_tokens_beside_others(folder: Path, asked: list[Asked], alone: Drawn) -> None:
    """Every second request, its slots shared with requests of other kinds, those before it greedy and those behind it
    drawn from the same seeds."""
    some = asked[::2]
    greedy = [replace(request.sampling, temperature=0.0) for request in asked]
    before = [replace(asked[i], number=100 + i, sampling=params) for i, params in enumerate(greedy)]
    behind = [replace(request, number=200 + request.number, iteration=12) for request in reversed(some)]
    run = drawn(folder, COMPANIES[1], [*before, *some, *behind])
    same(alone, run, some)
    twins = sum(run.tokens[a.rid] == run.tokens[b.rid] for a, b in zip(reversed(some), behind, strict=True))
    assert twins > len(some) - 3


def test_what_was_asked_for_is_seen(asked: list[Asked], alone: Drawn) -> None:
    """Nobody ends at a stop token before the minimum, and somebody does behind it; a bias draws its tokens."""
    tokens = [np.array(alone.tokens[request.rid]) for request in asked]
    stops = KINDS[5]["stop_token_ids"]
    ended = [found for request, found in zip(asked, tokens, strict=True) if request.sampling.stop_token_ids]
    assert all(not np.isin(found[:6], stops).any() for found in ended)
    assert any(len(found) > 6 and found[-1] in stops for found in ended)
    biased = np.concatenate([found for a, found in zip(asked, tokens, strict=True) if a.sampling.logit_bias])
    assert np.isin(biased, (5, 77)).sum() > 3


def test_without_a_seed_each_request_has_its_own_series(folder: Path) -> None:
    """The same prompt eight times, at once: eight continuations; the same ones in another run of the same seed, under
    another loop; others under another seed."""
    one = seeded_requests(1, VOCAB)[0]
    unseeded = [replace(one, number=i, sampling=replace(one.sampling, seed=None)) for i in range(8)]
    first, again = (drawn(folder, setting, unseeded) for setting in COMPANIES[:2])
    same(first, again, unseeded)
    assert len({tuple(tokens) for tokens in first.tokens.values()}) == 8
    other = drawn(folder, COMPANIES[0], unseeded, run_seed=1)
    assert all(first.tokens[request.rid] != other.tokens[request.rid] for request in unseeded)


def columns(**values: float) -> SamplingColumns:
    """Of one slot."""
    given = {"temperature": 1.0, "top_k": 4.0, "top_p": 1.0, "min_p": 0.0, **values}
    dtypes = {"top_k": torch.int32}
    tensors = {name: torch.tensor([value], dtype=dtypes.get(name, torch.float32)) for name, value in given.items()}
    return SamplingColumns(**tensors, seed=torch.zeros(1, dtype=torch.int64))


NOWHERE = torch.zeros(1, dtype=torch.int32)


def closeness(logits: list[float], **values: float) -> bool:
    """Of a draw from these logits, at position 0 with seed 0."""
    return bool(close_calls(torch.tensor([logits]), NOWHERE, NOWHERE, columns(**values))[0])


@pytest.mark.parametrize(("gap", "is_close"), [(0.5 * MARGIN, True), (2 * MARGIN, False)])
def test_what_is_a_close_call(gap: float, is_close: bool) -> None:
    """Two scores; the edge of top-p, of min-p and of top-k, where the token there is the one that is drawn."""
    assert closeness([1.0, 3.0, 3.0 - gap, 0.0], temperature=0.0) is is_close
    noise = scores_reference(torch.zeros(1, 4), NOWHERE, NOWHERE, columns(), filters=False)[0]
    last, rest = int(noise.argmax()), int(noise.argmin())
    logits = torch.full((4,), 1.0)
    logits[last] -= 1e-3
    share = float(logits.softmax(-1)[last])
    assert closeness(logits.tolist(), top_p=1 - share + gap) is is_close
    assert closeness(logits.tolist(), min_p=float(np.exp(-1e-3)) * (1 - gap)) is is_close
    logits[rest] = logits[last] - gap
    assert closeness(logits.tolist(), top_k=3.0) is is_close
    assert not closeness(logits.tolist())
