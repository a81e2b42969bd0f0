"""Whole steps, as a loop launches them, without a scheduler: what they take beyond the sum of their operators."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import numpy as np

from testbed.batch import BatchShape
from testbed.engine.device import Device
from testbed.engine.inputs import NONE, Ints, SamplingNeeds, SlotSampling, StepInputs
from testbed.engine.measure.operators import scattered
from testbed.engine.options import EngineOptions
from testbed.sampling import SamplingParams

IN_FLIGHT = 4
"""Launched behind one another: three periods are seen, and no launch waits for a buffer of a step before."""


class StepShape(NamedTuple):
    """``new_tokens[i]`` tokens behind ``prefix_tokens[i]`` cached ones, and decoding rows with these contexts, the new
    token included (at least 4)."""

    new_tokens: tuple[int, ...] = ()
    prefix_tokens: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()

    @property
    def batch(self) -> BatchShape:
        """The same as a cost model sees it."""
        longest = max(self.contexts, default=0)
        return BatchShape(self.new_tokens, self.prefix_tokens, len(self.contexts), sum(self.contexts), longest)

    @property
    def lengths(self) -> list[int]:
        """Tokens of KV of each row, with room for those that grow while they are measured."""
        prefills = [new + prefix for new, prefix in zip(self.new_tokens, self.prefix_tokens, strict=True)]
        return [*prefills, *(context + IN_FLIGHT for context in self.contexts)]


class StepBench:
    """Steps on any device. Keys and values are whatever the pages hold that a row is given."""

    def __init__(
        self,
        device: Device,
        options: EngineOptions,
        params: SamplingParams,
        needs: SamplingNeeds,
        hold: Callable[[], None],
    ) -> None:
        """``hold``: keeps the device busy while steps are queued, so that none waits for its launch."""
        self.info = device.info
        self._device = device
        self._page_size = options.page_size
        self._pages = scattered(device.info.kv_tokens // options.page_size)
        self._params = params
        self._needs = needs
        self._hold = hold
        self._index = 0

    def fill(self, tokens: int, chunk: int, seconds: float) -> int:
        """Write keys and values of ``tokens`` tokens, from the first page on, or of as many as there is time for;
        returns their number. Untouched memory is read too fast. In steps of ``chunk`` tokens, each a prompt of its own;
        the first of them, slow as it may be, is always done."""
        filled, begin = 0, perf_counter()
        chunk = -(-chunk // self._page_size) * self._page_size
        while filled + chunk <= tokens and (not filled or perf_counter() - begin < seconds):
            first = np.array([1 + filled // self._page_size], np.int32)
            self._device.launch(self._inputs(StepShape((chunk,), (0,)), NONE, first)).wait()
            filled += chunk
        return filled

    def period_ns(self, shape: StepShape) -> int:
        """Median time from the end of such a step to the end of the next one, several being queued. Contexts grow by a
        token from step to step, and are those of ``shape`` on average."""
        contexts = np.array(shape.contexts, dtype=np.int32) - IN_FLIGHT // 2
        held = -(-(contexts + IN_FLIGHT) // self._page_size)
        first = 1 + np.concatenate(([0], np.cumsum(held))).astype(np.int32)
        if len(contexts):
            self._device.launch(self._prime(contexts, held)).wait()
        steps = [self._inputs(shape, contexts + np.int32(step), first) for step in range(IN_FLIGHT)]
        self._hold()
        launched = [self._device.launch(inputs) for inputs in steps]
        return int(np.median(np.diff([step.wait().end_ns for step in launched])))

    def _prime(self, contexts: Ints, held: Ints) -> StepInputs:
        """One token for each row, behind the rest of its context: what it draws is what the row will decode."""
        rows = len(contexts)
        inputs = self._prefill(np.arange(rows, dtype=np.int32), np.ones(rows, np.int32), contexts - np.int32(2))
        self._map(inputs, held, 1)
        inputs.sampling = [SlotSampling(slot, self._params, slot, 0) for slot in range(rows)]
        return inputs

    def _inputs(self, shape: StepShape, contexts: Ints, first: Ints) -> StepInputs:
        """A step whose decoding rows were primed, row i with the pages from ``first[i]`` on; then the prefills'."""
        rows, new = len(contexts), np.array(shape.new_tokens, dtype=np.int32)
        inputs = StepInputs(0)
        if len(new):
            prefix = np.array(shape.prefix_tokens, dtype=np.int32)
            inputs = self._prefill(np.arange(rows, rows + len(new), dtype=np.int32), new, prefix)
            self._map(inputs, -(-(new + prefix) // self._page_size), int(first[-1]))
        inputs.decode_slots = np.arange(rows, dtype=np.int32)
        inputs.positions = contexts - np.int32(1)
        opening = np.flatnonzero(inputs.positions % self._page_size == 0)
        page = inputs.positions[opening] // self._page_size
        opened = (inputs.decode_slots[opening] * self.info.table_width + page).astype(np.int32)
        inputs.places = np.concatenate((inputs.places, opened))
        inputs.pages = np.concatenate((inputs.pages, self._pages[first[opening] + page]))
        self._index += 1
        inputs.index, inputs.needs = self._index, self._needs
        return inputs

    def _prefill(self, slots: Ints, new: Ints, prefix: Ints) -> StepInputs:
        starts = np.concatenate(([0], np.cumsum(new))).astype(np.int32)
        tokens = np.arange(starts[-1], dtype=np.int32)
        return StepInputs(
            0,
            token_ids=tokens % self.info.vocab_size,
            token_slots=np.repeat(slots, new),
            token_positions=tokens + np.repeat(prefix - starts[:-1], new),
            prefill_slots=slots,
            prefix_lens=prefix,
            starts=starts,
            row_slots=slots,
            needs=self._needs,
        )

    def _map(self, inputs: StepInputs, pages: Ints, first: int) -> None:
        """Give the prefilling rows the pages from ``first`` on, so many each."""
        slots, width = inputs.prefill_slots.tolist(), self.info.table_width
        places = [slot * width + np.arange(count) for slot, count in zip(slots, pages.tolist(), strict=True)]
        inputs.places = np.concatenate(places).astype(np.int32)
        inputs.pages = self._pages[first : first + len(inputs.places)]
