"""A model runner driven step by step, without a scheduler: what the device can do when nothing else counts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
        self._draw = np.random.Generator(np.random.Philox(key=seed))
        self.slots = np.arange(rows, dtype=np.int32)
        self.lengths = np.zeros(rows, dtype=np.int32)
        self._index = 0

    def _table(self, row: int) -> tuple[Ints, Ints]:
        numbers = np.arange(self._pages, dtype=np.int32)
        places = row * self._runner.info.table_width + numbers
        return places.astype(np.int32), (1 + row * self._pages + numbers).astype(np.int32)

    def prefill(self, row: int, tokens: int, last: bool = True) -> RunningStep:
        """Compute ``tokens`` more of a row's prompt."""
        prefix = int(self.lengths[row])
        slot = self.slots[row : row + 1]
        places, pages = self._table(row)
        self.lengths[row] += tokens
        return self._launch(
            StepInputs(
                self._index,
                places=places,
                pages=pages,
                token_ids=self._draw.integers(0, self._runner.info.vocab_size, tokens, dtype=np.int32),
                token_slots=np.repeat(slot, tokens),
                token_positions=np.arange(prefix, prefix + tokens, dtype=np.int32),
                prefill_slots=slot,
                prefix_lens=np.array([prefix], np.int32),
                starts=np.array([0, tokens], np.int32),
                row_slots=slot if last else np.array([self._runner.spare_slot], np.int32),
            )
        )

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
            positions, self.lengths = self.lengths, self.lengths + 1
            running.append(
                self._launch(StepInputs(self._index, decode_slots=self.slots, positions=positions.astype(np.int32)))
            )
            if len(running) == IN_FLIGHT:
                outputs.append(running.pop(0).wait())
        return outputs + [step.wait() for step in running]

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
