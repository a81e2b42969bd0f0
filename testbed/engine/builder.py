"""From the scheduler's batch to plain arrays: the host's part of preparing a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from testbed.batch import Batch, Prefill
from testbed.engine.inputs import NONE, Ints, SamplingNeeds, SlotSampling, StepInputs
from testbed.memory.slots import RequestSlots
from testbed.request import Request
from testbed.sampling import DEFAULT_SAMPLING, SamplingParams
from testbed.tokens import stream_key


class InputBuilder:
    """Builds the inputs of one engine's steps, in launch order. What depends on the rows alone is kept while the
    running batch keeps its members."""

    def __init__(self, slots: RequestSlots, page_size: int, table_width: int, seed: int) -> None:
        """``table_width``: pages in a row of the device's page table."""
        self._slots = slots
        self._page_size = page_size
        self._width = table_width
        self._seed = seed
        self._spare = slots.count
        self._told: list[SamplingParams | None] = [None] * slots.count
        """What the device was told of each slot; None: nothing by this builder, but perhaps by one before it."""
        self._rows: Sequence[Request] | None = None
        self._decode_slots = NONE
        self._first_places = NONE
        self._needs = SamplingNeeds()

    def build(self, batch: Batch, forced: Ints = NONE, defer_sampling: bool = False) -> StepInputs:
        """The inputs of ``batch``, to be called at its launch: it reads the page table as it is now."""
        inputs = StepInputs(batch.index, forced=forced, defer_sampling=defer_sampling)
        places: list[Ints] = []
        pages: list[Ints] = []
        for slot, count in batch.rewritten:
            places.append(np.arange(slot * self._width, slot * self._width + count, dtype=np.int32))
            pages.append(self._slots.pages[slot, :count])
        if batch.prefills:
            self._add_prefills(inputs, batch.prefills, places, pages)
        if batch.decodes:
            self._add_decodes(inputs, batch, places, pages)
        inputs.places = _joined(places)
        inputs.pages = _joined(pages)
        inputs.needs = self._needs_of(batch)
        return inputs

    def _add_prefills(
        self, inputs: StepInputs, prefills: Sequence[Prefill], places: list[Ints], pages: list[Ints]
    ) -> None:
        slots = np.array([request.slot for request, _, _, _ in prefills], dtype=np.int32)
        prefix = np.array([prefill.prefix_tokens for prefill in prefills], dtype=np.int32)
        new = np.array([prefill.new_tokens for prefill in prefills], dtype=np.int32)
        ends = np.array([prefill.last for prefill in prefills])
        starts = np.zeros(len(prefills) + 1, dtype=np.int32)
        np.cumsum(new, out=starts[1:])
        inputs.prefill_slots, inputs.prefix_lens, inputs.starts = slots, prefix, starts
        inputs.row_slots = np.where(ends, slots, np.int32(self._spare))
        inputs.token_ids = _joined([r.fill_ids[start : start + count] for r, start, count, _ in prefills])
        inputs.token_slots = np.repeat(slots, new)
        inputs.token_positions = np.arange(starts[-1], dtype=np.int32) + np.repeat(prefix - starts[:-1], new)
        for request, start, count, last in prefills:
            held = -(-(start + count) // self._page_size)
            first = request.slot * self._width
            places.append(np.arange(first, first + held, dtype=np.int32))
            pages.append(self._slots.pages[request.slot, :held])
            if last:
                self._tell(inputs, request)
        if any(request.wants_prompt_logprobs for request, _, _, _ in prefills):
            inputs.prompt_targets = _joined([_targets(prefill) for prefill in prefills])

    def _tell(self, inputs: StepInputs, request: Request) -> None:
        """How the request now in this slot is sampled, unless the device knows: most are greedy, as was the last."""
        params = request.sampling
        if params == DEFAULT_SAMPLING and self._told[request.slot] == DEFAULT_SAMPLING:
            return
        self._told[request.slot] = params
        seed = stream_key("sampling", self._seed, request.rid) if params.seed is None else params.seed % 2**64
        told = SlotSampling(request.slot, params, seed, request.prompt_tokens)
        if params.penalised:
            told.output_ids = request.fill_ids[request.prompt_tokens :]
            told.prompt_ids = request.fill_ids[: request.prompt_tokens]
        inputs.sampling.append(told)

    def _add_decodes(self, inputs: StepInputs, batch: Batch, places: list[Ints], pages: list[Ints]) -> None:
        if batch.decodes is not self._rows:
            self._rows = batch.decodes
            self._decode_slots = batch.slots.astype(np.int32)
            self._first_places = (batch.slots * self._width).astype(np.int32)
            self._needs = needs_of(batch.decodes)
        positions = (batch.start + (batch.advance - 1)).astype(np.int32)
        inputs.decode_slots, inputs.positions = self._decode_slots, positions
        if self._page_size == 1:
            places.append(self._first_places + positions)
        else:
            opening = np.flatnonzero(positions % self._page_size == 0)
            places.append(self._first_places[opening] + positions[opening] // self._page_size)
        pages.append(batch.pages[-1])

    def _needs_of(self, batch: Batch) -> SamplingNeeds:
        if not batch.prefills:
            return self._needs
        return needs_of([*(request for request, _, _, last in batch.prefills if last), *batch.decodes])


def needs_of(requests: Sequence[Request]) -> SamplingNeeds:
    """What these rows want at all."""
    chosen = {id(request.sampling): request.sampling for request in requests}.values()
    wanting = [request for request in requests if request.logprobs is not None]
    return SamplingNeeds(
        greedy=all(params.greedy for params in chosen),
        filters=any(params.top_k > 0 or params.top_p < 1 or params.min_p > 0 for params in chosen),
        penalties=any(params.penalised for params in chosen),
        bias=any(params.logit_bias for params in chosen),
        min_new_tokens=any(params.min_new_tokens for params in chosen),
        logprobs=bool(wanting),
        top_logprobs=max((request.top_logprobs for request in wanting), default=0),
    )


def _targets(prefill: Prefill) -> Ints:
    """The prompt token behind each new token, -1 where it is not wanted or there is none: int32 [new_tokens]."""
    request, prefix, new, _ = prefill
    targets = np.full(new, -1, dtype=np.int32)
    if request.wants_prompt_logprobs:
        assert request.logprobs is not None
        begin, end = max(prefix, request.logprobs.start), min(prefix + new, request.prompt_tokens - 1)
        targets[max(begin - prefix, 0) : max(end - prefix, 0)] = request.fill_ids[begin + 1 : end + 1]
    return targets


def _joined(parts: list[Ints]) -> Ints:
    """int32 [sum of lengths]; a copy, never a view of the page table."""
    return np.concatenate(parts, dtype=np.int32) if parts else NONE
