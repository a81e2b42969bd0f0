"""Sampled tokens from one end to the other: the same requests through scheduler, loop and device in every company.

Logits of a request depend on its company by rounding (some 1e-5 of logits of deviation 2.4 in float32), and a draw
passes that on only where it is a close call: where less than ``MARGIN`` in the scores of the draw (logit / temperature
+ noise), in top-p, or in the lowest logit that the filters leave would change the token. The first token in which two
runs of a request differ must be one; what follows has another context, and is not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from testbed.engine.inputs import StepInputs
from testbed.engine.options import EngineOptions
from testbed.engine.runner import RunningStep
from testbed.engine.sampler import Sampled
from testbed.kernels.sampling import SamplingColumns, lowest_kept_reference, scores_reference
from testbed.sampling import SamplingParams
from tests.engine.against_transformers import (
    STEPS,
    Asked,
    LogitsDevice,
    Setting,
    happened,
    options_of,
    run_asked,
    shared_prompts,
)
from tests.properties.world import Outcome

MARGIN = 1e-4

PENALTIES = {"frequency_penalty": 0.5, "presence_penalty": 0.3, "repetition_penalty": 1.3}
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20, "min_p": 0.02},
    {"temperature": 0.8, **PENALTIES},
    {"temperature": 1.5, "top_p": 0.8, "logit_bias": ((5, 9.0), (77, 9.0), (5, 1.0)), **PENALTIES},
    {"temperature": 1.0, "top_p": 0.95, "min_new_tokens": 6, "stop_token_ids": tuple(range(0, 4096, 5))},
    {"frequency_penalty": 1.0, "repetition_penalty": 1.5},
)
"""All that may be asked for; the last is greedy."""

ALONE = Setting("normal", "prefill_first", chunked=False, cached=False, forced=False, page_size=1, seats=1)
COMPANIES = (
    ALONE._replace(seats=64),
    Setting("overlap", "prefill_first", chunked=False, cached=False, forced=False, page_size=16, seats=16),
    Setting("overlap", "mixed_chunk", chunked=True, cached=True, forced=True, page_size=16, seats=4),
    Setting("normal", "stall_free", chunked=True, cached=True, forced=True, page_size=1, seats=8),
    Setting("overlap", "stall_free", chunked=True, cached=False, forced=True, page_size=1, seats=16),
)


def seeded_requests(count: int, vocab: int) -> list[Asked]:
    """Requests of every kind, each with a seed of its own; their prompts share beginnings."""
    draw = np.random.Generator(np.random.Philox(key=31)).integers
    return [
        Asked(
            i,
            prompt,
            outputs=int(draw(STEPS // 2, STEPS, endpoint=True)),
            iteration=int(draw(0, 8)),
            sampling=SamplingParams(**KINDS[i % len(KINDS)], seed=i * 0x9E3779B97F4A7C15 % 2**64),
        )
        for i, prompt in enumerate(shared_prompts(30, count, vocab))
    ]


class DrawDevice(LogitsDevice):
    """Keeps which draws were close calls."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self.close: dict[int, NDArray[np.bool_]] = {}
        """By launch: bool [rows]."""
        assert self._runner is not None
        sampler = self._runner.sampler
        draw: Callable[..., Sampled] = sampler.sample

        def sample(logits: Tensor, slots: Tensor, positions: Tensor, needs: Any, *others: Any) -> Sampled:
            adjusted = sampler._adjusted(logits, slots, positions, needs, *others)
            self.close[self._index] = close_calls(adjusted, slots, positions, sampler._columns).numpy()
            return draw(logits, slots, positions, needs, *others)

        sampler.sample = sample  # type: ignore[method-assign]

    def launch(self, inputs: StepInputs) -> RunningStep:
        """See device.Device."""
        self._index = inputs.index
        return super().launch(inputs)


def close_calls(logits: Tensor, slots: Tensor, positions: Tensor, columns: SamplingColumns) -> Tensor:
    """Whether a change of less than MARGIN may change the token: bool [rows]."""
    scores = scores_reference(logits, slots, positions, columns, filters=False)
    close, tokens = torch.zeros(len(slots), dtype=torch.bool), []
    for slack in (-MARGIN, 0.0, MARGIN):
        best = torch.where(logits >= _lowest(logits, slots, columns, slack)[:, None], scores, -torch.inf).topk(2)
        close |= best.values[:, 0] - best.values[:, 1] < MARGIN
        tokens.append(best.indices[:, 0])
    return close | (tokens[0] != tokens[1]) | (tokens[1] != tokens[2])


def _lowest(logits: Tensor, slots: Tensor, columns: SamplingColumns, slack: float) -> Tensor:
    """The lowest logit that the filters leave where they are looser by ``slack``, [rows]. Top-k moves only where its
    edge is between two logits that are close themselves."""
    top_p = torch.where(columns.top_p < 1, (columns.top_p + slack).clamp(MARGIN, 1), 1)
    lowest = lowest_kept_reference(logits, slots, replace(columns, top_p=top_p, min_p=columns.min_p * (1 - slack)))
    below = torch.where(logits < lowest[:, None], logits, -torch.inf).amax(-1)
    moved = torch.where(lowest - below < MARGIN, lowest - slack, lowest)
    return moved.minimum(logits.amax(-1))


class Drawn(NamedTuple):
    """A run of some requests."""

    outcome: Outcome
    close: set[tuple[str, int]]
    """(request, position) of draws that were close calls."""

    @property
    def tokens(self) -> dict[str, list[int]]:
        return self.outcome.streams()


def drawn(folder: Path, setting: Setting, asked: Sequence[Asked], run_seed: int = 0) -> Drawn:
    """The requests under this setting."""
    device = DrawDevice(options_of(folder, setting))
    outcome = run_asked(device, setting, asked, seed=5, run_seed=run_seed)
    close = set()
    for batch, _ in outcome.batches:
        rows = [(p.request.rid, p.prefix_tokens + p.new_tokens) for p in batch.prefills]
        rows += [(r.rid, int(length)) for r, length in zip(batch.decodes, batch.seq_lens, strict=True)]
        close.update(row for row, is_close in zip(rows, device.close[batch.index], strict=True) if is_close)
    return Drawn(outcome, close)


class Difference(NamedTuple):
    """The first token in which two runs of a request differ."""

    rid: str
    position: int
    """In the sequence."""
    close: bool
    """A close call in one of the runs."""


def differences(one: Drawn, other: Drawn, asked: Sequence[Asked]) -> list[Difference]:
    """Of all these requests."""
    found = []
    for request in asked:
        left, right = one.tokens[request.rid], other.tokens[request.rid]
        if left != right:
            pairs = zip(left, right, strict=False)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
            place = (request.rid, len(request.prompt) + first)
            found.append(Difference(*place, place in one.close or place in other.close))
    return found


class EndToEnd(NamedTuple):
    """Seeded requests alone and in several companies."""

    tokens: int
    """Compared."""
    close: int
    """Requests that differ from a close call on."""
    wrong: list[str]
    """Requests that differ without one."""
    passed_through: list[str]
    """What each company went through."""


def end_to_end(folder: Path, vocab: int, requests: int, companies: Sequence[Setting]) -> EndToEnd:
    """Every company against alone. In the last, other requests come along."""
    asked = seeded_requests(requests, vocab)
    alone = drawn(folder, ALONE, asked)
    others = [replace(request, number=requests + request.number, sampling=SamplingParams()) for request in asked]
    tokens, close, wrong, passed_through = 0, 0, [], []
    for setting in companies:
        run = drawn(folder, setting, [*others, *asked] if setting is companies[-1] else asked)
        tokens += sum(len(run.tokens[request.rid]) for request in asked)
        for difference in differences(alone, run, asked):
            close += difference.close
            if not difference.close:
                wrong.append(f"{setting}: {difference.rid} at position {difference.position}")
        passed_through.append(f"{setting}: {happened(run.outcome)}")
    return EndToEnd(tokens, close, wrong, passed_through)
