"""From logits to tokens, on the device: how each request slot is sampled, and what its outputs were.

Order (specification H): penalties, grammar mask, logit bias, minimum length, temperature, then top-k, top-p and min-p,
then the draw by seed and position. Whatever a request brings along comes with ``SlotSampling``, when its prompt ends
and again after a retraction, outputs so far included; nothing of the slot's former request is left.

Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from testbed.engine.inputs import SamplingNeeds, SlotSampling
from testbed.kernels import penalties, sampling

TEMPERATURE_MAX = 1e30
"""Above it all tokens are alike; below it, products with logarithms stay finite in float32."""
POSITIVE_MIN = 1e-30
"""What must be above 0 stays so in float32."""


@dataclass(slots=True)
class Sampled:
    """What a step drew."""

    token_ids: Tensor
    """int32 [rows]; -1: nothing could be drawn (all tokens forbidden, or a logit is NaN or +inf)."""
    logprobs: Tensor | None = None
    """float32 [rows]: log-probability of the token under the model's own distribution; NaN where there is no token."""
    top_ids: Tensor | None = None
    """int32 [rows, k]: the most likely tokens."""
    top_logprobs: Tensor | None = None
    """float32 [rows, k]"""


class Sampler:
    """Draws the tokens of a step. The last slot, number ``slots``, is spare: greedy, and never counted."""

    def __init__(
        self, slots: int, vocab_size: int, device: torch.device | str, eos_token_ids: Sequence[int], fused: bool
    ) -> None:
        """``fused``: with the Triton kernels; else with torch alone, which defines what they do."""
        self._device = torch.device(device)
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._fused = fused
        self._floats = torch.zeros((6, slots + 1), dtype=torch.float32, device=device)
        self._integers = torch.zeros((2, slots + 1), dtype=torch.int64, device=device)
        temperature, top_p, min_p, self._frequency, self._presence, self._repetition = self._floats
        seed, self._min_position = self._integers
        top_k = torch.full((slots + 1,), vocab_size, dtype=torch.int32, device=device)
        top_p.fill_(1)
        self._repetition.fill_(1)
        self._columns = sampling.SamplingColumns(temperature, top_k, top_p, min_p, seed)
        self._history: penalties.Penalties | None = None
        self._bias = SlotTokens(self._device)
        self._ends = SlotTokens(self._device)

    # -- what is known of a slot ------------------------------------------------------------------------------------

    def update(self, slots: Sequence[SlotSampling]) -> None:
        """From now on, these slots are sampled like this."""
        where = to_device(np.array([told.slot for told in slots], np.int64), self._device)
        floats = np.array([_floats_of(told) for told in slots], np.float32)
        integers = np.array([_integers_of(told) for told in slots], np.int64)
        top_k = [told.params.top_k if 0 < told.params.top_k < self._vocab_size else self._vocab_size for told in slots]
        self._floats.index_copy_(1, where, to_device(floats.T, self._device))
        self._integers.index_copy_(1, where, to_device(integers.T, self._device))
        self._columns.top_k.index_copy_(0, where, to_device(np.array(top_k, np.int32), self._device))
        for told in slots:
            params = told.params
            ends = (*self._eos_token_ids, *params.stop_token_ids) if params.min_new_tokens else ()
            self._bias.set(told.slot, _sums(params.logit_bias))
            self._ends.set(told.slot, dict.fromkeys(ends, -np.inf))
        penalised = [told for told in slots if told.params.penalised]
        if penalised:
            self._remember(penalised)

    def _remember(self, slots: Sequence[SlotSampling]) -> None:
        """Prompt and outputs so far of requests that want a penalty, in place of what their slots held."""
        history = self._ensure_history()
        for told in slots:
            counts, in_prompt = history.counts[told.slot].zero_(), history.in_prompt[told.slot].zero_()
            in_prompt.index_fill_(0, to_device(told.prompt_ids.astype(np.int64), self._device), True)
            token_ids, times = np.unique(told.output_ids, return_counts=True)
            places = to_device(token_ids.astype(np.int64), self._device)
            counts.index_copy_(0, places, to_device(times.astype(np.int32), self._device))

    def _ensure_history(self) -> penalties.Penalties:
        """Counts and prompts by slot: gigabytes with a large vocabulary, so they exist from the first use on."""
        if self._history is None:
            shape = (self._floats.shape[1], self._vocab_size)
            self._history = penalties.Penalties(
                frequency=self._frequency,
                presence=self._presence,
                repetition=self._repetition,
                counts=torch.zeros(shape, dtype=torch.int32, device=self._device),
                in_prompt=torch.zeros(shape, dtype=torch.bool, device=self._device),
            )
        return self._history

    # -- a step -----------------------------------------------------------------------------------------------------

    def sample(
        self,
        logits: Tensor,
        slots: Tensor,
        positions: Tensor,
        needs: SamplingNeeds,
        host_slots: NDArray[np.int32],
        bitmask: Tensor | None = None,
    ) -> Sampled:
        """Draw a token for each row.

        ``logits`` [rows, vocab] of any float dtype, left as they are; ``slots`` int32 [rows], ``host_slots`` the same
        on the host; ``positions`` int32 [rows]: where in its sequence the token will stand; ``bitmask`` int32
        [rows, ceil(vocab / 32)]: bit i of word w set: a grammar allows token 32 w + i.
        """
        adjusted = self._adjusted(logits, slots, positions, needs, host_slots, bitmask)
        if needs.greedy:
            token_ids = sampling.greedy(adjusted) if self._fused else sampling.greedy_reference(adjusted)
        else:
            draw = sampling.draw if self._fused else sampling.draw_reference
            token_ids = draw(adjusted, slots, positions, self._columns, needs.filters)
        if not needs.logprobs:
            return Sampled(token_ids)
        return with_logprobs(logits, token_ids, needs.top_logprobs)

    def _adjusted(
        self,
        logits: Tensor,
        slots: Tensor,
        positions: Tensor,
        needs: SamplingNeeds,
        host_slots: NDArray[np.int32],
        bitmask: Tensor | None,
    ) -> Tensor:
        """Everything before temperature, on a copy in float32; the logits themselves where nobody wants anything."""
        if not (needs.penalties or needs.bias or needs.min_new_tokens or bitmask is not None):
            return logits
        adjusted = logits.to(torch.float32, copy=True)
        if needs.penalties or bitmask is not None:
            adjust = penalties.adjust if self._fused else penalties.adjust_reference
            adjust(adjusted, slots, self._ensure_history() if needs.penalties else None, bitmask)
        if needs.bias:
            rows, token_ids, bias = self._bias.of_rows(host_slots)
            adjusted[rows, token_ids] += bias
        if needs.min_new_tokens:
            rows, token_ids, forbidden = self._ends.of_rows(host_slots)
            too_early = positions[rows] < self._min_position[slots[rows]]
            adjusted[rows, token_ids] += torch.where(too_early, forbidden, 0)
        return adjusted

    def count(self, slots: Tensor, token_ids: Tensor) -> None:
        """The tokens that were finally chosen are outputs now: both int32 [rows]. Rows on the spare slot and rows
        without a token (-1) do not count; of the other slots, each occurs once."""
        if self._history is not None:
            add = penalties.count if self._fused else penalties.count_reference
            add(self._history.counts, slots, token_ids)


class SlotTokens:
    """A few (token, number) pairs of some request slots, gathered for the rows of a step.

    The gathered tensors stay on the device until the rows or their pairs change: in decoding, for many steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pairs: dict[int, Mapping[int, float]] = {}
        self._host_slots: NDArray[np.int32] | None = None
        self._gathered: tuple[Tensor, Tensor, Tensor]

    def set(self, slot: int, pairs: Mapping[int, float]) -> None:
        """The slot's pairs, in place of those it had."""
        if self._pairs.pop(slot, None) or pairs:
            self._host_slots = None
        if pairs:
            self._pairs[slot] = pairs

    def of_rows(self, host_slots: NDArray[np.int32]) -> tuple[Tensor, Tensor, Tensor]:
        """(row, token, number), one element a pair: int64 [n], int64 [n], float32 [n]. No (row, token) occurs twice."""
        if self._host_slots is None or not np.array_equal(host_slots, self._host_slots):
            found = [
                (row, token, number)
                for row, slot in enumerate(host_slots.tolist())
                for token, number in self._pairs.get(slot, {}).items()
            ]
            rows, token_ids = np.array([pair[:2] for pair in found], np.int64).reshape(-1, 2).T.copy()
            numbers = np.array([number for *_, number in found], np.float32)
            self._host_slots = host_slots.copy()
            self._gathered = (
                to_device(rows, self._device),
                to_device(token_ids, self._device),
                to_device(numbers, self._device),
            )
        return self._gathered


def with_logprobs(logits: Tensor, token_ids: Tensor, top: int) -> Sampled:
    """These tokens (int32 [rows]) with their log-probabilities under the model's own distribution, and those of the
    ``top`` most likely (of equal ones, any): log_softmax in float32 of the logits before any change."""
    logprobs = torch.log_softmax(logits.to(torch.float32), dim=-1)
    chosen = logprobs.gather(1, token_ids.clamp(min=0).to(torch.int64)[:, None])[:, 0]
    sampled = Sampled(token_ids, torch.where(token_ids < 0, torch.nan, chosen))
    if top:
        sampled.top_logprobs, top_ids = logprobs.topk(min(top, logits.shape[1]), dim=-1)
        sampled.top_ids = top_ids.to(torch.int32)
    return sampled


def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy on the device; on CUDA from pinned memory, so that the host does not wait."""
    return torch.tensor(array, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _floats_of(told: SlotSampling) -> tuple[float, ...]:
    params = told.params
    temperature = 0.0 if params.greedy else min(params.temperature, TEMPERATURE_MAX)
    top_p, repetition = max(params.top_p, POSITIVE_MIN), max(params.repetition_penalty, POSITIVE_MIN)
    return temperature, top_p, params.min_p, params.frequency_penalty, params.presence_penalty, repetition


def _integers_of(told: SlotSampling) -> tuple[int, int]:
    """The seed's bit pattern as a signed number; the position from which on the request may end."""
    seed = told.seed - 2**64 if told.seed >= 2**63 else told.seed
    return seed, told.prompt_tokens + told.params.min_new_tokens


def _sums(pairs: Sequence[tuple[int, float]]) -> dict[int, float]:
    """A token that is named twice gets both."""
    sums: dict[int, float] = {}
    for token, number in pairs:
        sums[token] = sums.get(token, 0.0) + number
    return sums
