"""A model runner driven step by step, without a scheduler: what the device can do when nothing else counts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from testbed.engine.inputs import StepInputs, StepOutputs
from testbed.engine.runner import ModelRunner, RunningStep

Ints = NDArray[np.int32]
IN_FLIGHT = 2


class Driver:
    """``rows`` requests of random tokens, each with pages of its own, that decode together."""

    def __init__(self, runner: ModelRunner, page_size: int, rows: int, most_tokens: int, seed: int = 0) -> None:
        """``most_tokens``: of one request, prompt and output."""
        self._runner = runner
        self._page_size = page_size
        self._pages = -(-most_tokens // page_size)
        draw = np.random.Generator(np.random.Philox(key=seed))
        self.tokens = draw.integers(0, runner.info.vocab_size, (rows, most_tokens), dtype=np.int32)
        """What prompts are made of, and what ``taught`` steps are told was drawn: int32 [rows, most_tokens]."""
        self.slots = np.arange(rows, dtype=np.int32)
        self.lengths = np.zeros(rows, dtype=np.int32)
        self._index = 0

    def prefill(self, row: int, tokens: int, last: bool = True) -> RunningStep:
        """Compute ``tokens`` more of a row's prompt."""
        return self._launch(self._prefill_inputs(row, tokens, last))

    def fill(self, tokens: int, chunk: int) -> None:
        """Prompts of ``tokens`` tokens for every row, in chunks."""
        for row in range(len(self.slots)):
            for begin in range(0, tokens, chunk):
                step = self.prefill(row, min(chunk, tokens - begin), last=begin + chunk >= tokens)
            step.wait()

    def decode(self, steps: int) -> list[StepOutputs]:
        """So many decode steps of all rows, two in flight at a time, as the overlapped loop launches them."""
        outputs: list[StepOutputs] = []
        running: list[RunningStep] = []
        for _ in range(steps):
            running.append(self._launch(self._decode_inputs()))
            if len(running) == IN_FLIGHT:
                outputs.append(running.pop(0).wait())
        return outputs + [step.wait() for step in running]

    def taught_prefill(self, row: int, tokens: int, last: bool) -> Tensor:
        """As ``prefill``; what follows is the row's next token whatever is drawn. Logits float32 [1, vocab], CPU."""
        inputs = self._prefill_inputs(row, tokens, last)
        inputs.forced = self.tokens[row, self.lengths[row] : self.lengths[row] + 1]
        return self._logits(inputs)

    def taught_decode(self) -> Tensor:
        """A decode step likewise: logits float32 [rows, vocab], on the CPU."""
        inputs = self._decode_inputs()
        inputs.forced = self.tokens[self.slots, self.lengths % self.tokens.shape[1]]
        return self._logits(inputs)

    def _prefill_inputs(self, row: int, tokens: int, last: bool) -> StepInputs:
        prefix = int(self.lengths[row])
        slot = self.slots[row : row + 1]
        places, pages = self._table(row)
        self.lengths[row] += tokens
        return StepInputs(
            self._index,
            places=places,
            pages=pages,
            token_ids=self.tokens[row, prefix : prefix + tokens],
            token_slots=np.repeat(slot, tokens),
            token_positions=np.arange(prefix, prefix + tokens, dtype=np.int32),
            prefill_slots=slot,
            prefix_lens=np.array([prefix], np.int32),
            starts=np.array([0, tokens], np.int32),
            row_slots=slot if last else np.array([self._runner.spare_slot], np.int32),
        )

    def _decode_inputs(self) -> StepInputs:
        positions, self.lengths = self.lengths, self.lengths + np.int32(1)
        return StepInputs(self._index, decode_slots=self.slots, positions=positions)

    def _table(self, row: int) -> tuple[Ints, Ints]:
        numbers = np.arange(self._pages, dtype=np.int32)
        places = row * self._runner.info.table_width + numbers
        return places.astype(np.int32), (1 + row * self._pages + numbers).astype(np.int32)

    def _logits(self, inputs: StepInputs) -> Tensor:
        inputs.defer_sampling = True
        step = self._launch(inputs)
        logits = step.logits
        assert logits is not None
        step.sample(None)
        step.wait()
        return logits.float().cpu()  # before the next step, which may compute into the same memory

    def _launch(self, inputs: StepInputs) -> RunningStep:
        self._index += 1
        return self._runner.launch(inputs)


def device_ns(outputs: list[StepOutputs], skip: int = 3) -> float:
    """Median device time of a step."""
    return float(np.median([step.end_ns - step.start_ns for step in outputs[skip:]]))


def period_ns(outputs: list[StepOutputs], skip: int = 3) -> float:
    """Time from step to step: what a client sees."""
    ends = [step.end_ns for step in outputs[skip:]]
    return (ends[-1] - ends[0]) / (len(ends) - 1)
