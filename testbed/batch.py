"""A batch as the device sees it, its shape as a cost model sees it, and a step's result."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from testbed.request import Request


class ForwardMode(IntEnum):
    """What a step computes (SGLang's names). The values are part of the decision log's format."""

    EXTEND = 1
    DECODE = 2
    MIXED = 3


class BatchShape(NamedTuple):
    """All that the cost of a step depends on.

    ``new_tokens[i]`` prompt tokens of prefilling request i are computed behind ``prefix_tokens[i]`` tokens whose KV
    exists. ``decodes`` rows compute one token each; their contexts (KV tokens read, the new one included) sum to
    ``context_tokens`` and the longest is ``context_max``.
    """

    new_tokens: tuple[int, ...] = ()
    prefix_tokens: tuple[int, ...] = ()
    decodes: int = 0
    context_tokens: int = 0
    context_max: int = 0


def captured_sizes(max_rows: int) -> list[int]:
    """Rows for which a CUDA graph exists, as SGLang captures them: 1, 2, 4, then every eighth up to ``max_rows``."""
    sizes = {1, 2, 4, *range(8, max_rows + 1, 8), max_rows}
    return sorted(size for size in sizes if size <= max_rows)


def largest_captured(memory_bytes: float) -> int:
    """Rows of the largest graph where nobody says: SGLang captures up to 256 above 90 GB of memory, else 160."""
    return 256 if memory_bytes > 90e9 else 160


class StepCost(NamedTuple):
    """The price of a step: device time, kernels to launch, and whether one CUDA graph holds them all."""

    gpu_ns: int
    kernels: int
    graph: bool


NO_ROWS = np.empty(0, np.int64)


class Prefill(NamedTuple):
    """One request's part of a prefill: ``new_tokens`` of its ``fill_ids`` from ``prefix_tokens`` on."""

    request: Request
    prefix_tokens: int
    new_tokens: int
    last: bool
    """Whether this completes the prompt, so that a token is sampled."""


class Batch:
    """A launched step: a snapshot that later decisions cannot change.

    Rows are the prefills, then the decodes. ``slots`` and ``start`` are columns of the running batch at launch
    (replaced there, never written to): decode row i computes the token at position ``start[i] + advance - 1``, the
    last of ``start[i] + advance`` tokens of KV.
    """

    # Defaults live on the class: most steps are pure decodes and set only a few of these (0.5 us a step).
    prefills: Sequence[Prefill] = ()
    decodes: Sequence[Request] = ()
    ranks: NDArray[np.int64] = NO_ROWS
    slots: NDArray[np.int64] = NO_ROWS
    start: NDArray[np.int64] = NO_ROWS
    finish_at: NDArray[np.int64] = NO_ROWS
    output_base: NDArray[np.int64] = NO_ROWS
    output_shift = 0
    advance = 0
    retracted: Sequence[Request] = ()
    prebuilt: Sequence[Request] = ()
    """Rows that have not been computed here: their KV and the token that they go on with came from elsewhere."""
    rewritten: Sequence[tuple[int, int]] = ()
    """(slot, pages): rows of the page table whose first pages are others now than at their last launch."""
    evicted_tokens = 0
    has_grammar = False
    """Whether a grammar says what may be drawn in some row. Its mask follows from the result before: sampling waits."""
    decodes_behind = False
    """Whether its prefills join the running batch in front of the decodes (SGLang's mixed batches)."""
    extra_rows = 0
    """Decode rows whose token will be dropped because the request ended meanwhile."""
    index = -1
    """Number of the launch."""
    decided: tuple[int, ...] = ()
    """The scheduler's state at the decision, for the step record: see ``Scheduler._launch``."""
    new_token_ratio = 0.0
    shape = BatchShape()

    def __init__(self, mode: ForwardMode, prefills: Sequence[Prefill] = ()) -> None:
        self.mode = mode
        if prefills:
            self.prefills = prefills
        self.pages: list[NDArray[np.int32]] = []
        """Newly allocated pages, in row order."""

    @property
    def rows(self) -> int:
        """Requests in the batch."""
        return len(self.prefills) + len(self.decodes)

    @property
    def seq_lens(self) -> NDArray[np.int64]:
        """KV length of each decode row after this step: int64 [decodes]."""
        return self.start + self.advance


class StepLogprobs(NamedTuple):
    """Log-probabilities of one step, where some row wants them: see ``testbed.messages.Logprobs``."""

    tokens: NDArray[np.float32]
    """float32 [rows]: of each row's token."""
    top_ids: NDArray[np.int32]
    """int32 [rows, k]: the most likely tokens, k the most that a row wants."""
    top: NDArray[np.float32]
    """float32 [rows, k]"""
    prompt: NDArray[np.float32]
    """float32 [new tokens of the prefills], or empty: element i belongs to the prompt token after new token i."""


class StepResult(NamedTuple):
    """What the device returns for a batch.

    ``token_ids``: int32 [rows], one for each row (a prefill that is not the last chunk has a meaningless one).
    ``stopped``: rows whose token ended the request early (an EOS or stop token); almost always empty. The rest is when:
    host time of the launch, device start and end (ns), and whether it was one CUDA graph.
    """

    token_ids: NDArray[np.int32]
    stopped: tuple[int, ...] = ()
    launch_ns: int = 0
    start_ns: int = 0
    end_ns: int = 0
    graph: bool = False
    logprobs: StepLogprobs | None = None
    invalid: tuple[int, ...] = ()
    """Rows for which there is no token: logits that are not finite, or a mask that forbids everything."""
