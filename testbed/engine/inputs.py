"""A step as plain arrays: all that the device is told about a launch, and all that it answers.

The scheduler's ``Batch`` refers to live objects; this does not, so it can be copied to a device in one piece or sent to
another process. Prefilling rows come first, then decoding rows, as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from testbed.sampling import SamplingParams

Ints = NDArray[np.int32]
NONE = np.empty(0, np.int32)


def _none() -> Ints:
    return NONE


@dataclass(slots=True)
class SlotSampling:
    """From this step on, the request in ``slot`` is sampled like this. Sent with the prefill that ends its prompt,
    again after a retraction."""

    slot: int
    params: SamplingParams
    seed: int
    """In [0, 2**64)."""
    prompt_tokens: int
    prompt_ids: Ints = field(default_factory=_none)
    """int32: only where a repetition penalty wants them."""
    output_ids: Ints = field(default_factory=_none)
    """int32: outputs so far (after a retraction), only where a penalty wants them."""


@dataclass(slots=True)
class SamplingNeeds:
    """What the rows of a step want at all, so that the device does no more."""

    greedy: bool = True
    """Every row takes its most likely token."""
    filters: bool = False
    """Some row has top-k, top-p or min-p."""
    penalties: bool = False
    bias: bool = False
    min_new_tokens: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    """The largest number of alternatives that a row wants."""


@dataclass(slots=True)
class StepInputs:
    """One launch. Every array is int32; n prefilling rows with T new tokens in all, b decoding rows."""

    index: int
    # -- the page table (flat: slot * width + page number): written before anything is computed
    places: Ints = field(default_factory=_none)
    """[m]"""
    pages: Ints = field(default_factory=_none)
    """[m]: what to write there."""
    # -- prefilling rows
    token_ids: Ints = field(default_factory=_none)
    """[T]"""
    token_slots: Ints = field(default_factory=_none)
    """[T]: slot of the token's row."""
    token_positions: Ints = field(default_factory=_none)
    """[T]: its position in the sequence."""
    prefill_slots: Ints = field(default_factory=_none)
    """[n]"""
    prefix_lens: Ints = field(default_factory=_none)
    """[n]: tokens of KV that exist before the first new one."""
    starts: Ints = field(default_factory=_none)
    """[n + 1]: row i has the new tokens ``starts[i] .. starts[i + 1] - 1``."""
    row_slots: Ints = field(default_factory=_none)
    """[n]: the slot, or the spare one where the row's token counts for nothing, because its prompt goes on."""
    prompt_targets: Ints = field(default_factory=_none)
    """[T], or empty: the prompt token whose log-probability is wanted at each new token; -1: none."""
    # -- decoding rows
    decode_slots: Ints = field(default_factory=_none)
    """[b]"""
    positions: Ints = field(default_factory=_none)
    """[b]: position of the token whose KV is computed; the row attends to ``position + 1`` tokens."""
    # -- sampling
    forced: Ints = field(default_factory=_none)
    """[n + b], or empty: tokens that replace the computed ones (``tokens: oracle``)."""
    sampling: list[SlotSampling] = field(default_factory=list)
    needs: SamplingNeeds = field(default_factory=SamplingNeeds)
    defer_sampling: bool = False
    """Compute the logits only; sampling follows with a call of its own."""

    @property
    def rows(self) -> int:
        """Rows of the step."""
        return len(self.prefill_slots) + len(self.decode_slots)

    def arrays(self) -> list[Ints]:
        """The arrays in the order of ``ARRAYS``."""
        return [getattr(self, name) for name in ARRAYS]


ARRAYS = (
    *("places", "pages", "token_ids", "token_slots", "token_positions", "prefill_slots", "prefix_lens", "starts"),
    *("row_slots", "prompt_targets", "decode_slots", "positions", "forced"),
)
"""The int32 arrays of a step, in the order in which they are copied to a device as one piece."""


@dataclass(slots=True)
class StepOutputs:
    """What a launch gave."""

    index: int
    token_ids: Ints
    """int32 [n + b]: one for each row; meaningless where a prefill does not end."""
    start_ns: int = 0
    """When the device began and ended (ns of this machine's monotonic clock)."""
    end_ns: int = 0
    graph: bool = False
    logprobs: NDArray[np.float32] | None = None
    """float32 [n + b]: log-probability of each row's token under the model's own distribution."""
    top_ids: Ints | None = None
    """int32 [n + b, k]: the most likely tokens."""
    top_logprobs: NDArray[np.float32] | None = None
    """float32 [n + b, k]"""
    prompt_logprobs: NDArray[np.float32] | None = None
    """float32 [T]: of ``StepInputs.prompt_targets``; NaN where there is none."""
