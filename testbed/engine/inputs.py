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


@dataclass(slots=True)
class SlotSampling:
    """From this step on, the request in ``slot`` is sampled like this. Sent with the prefill that ends its prompt,
    again after a retraction."""

    slot: int
    params: SamplingParams
    seed: int
    """In [0, 2**64)."""
    prompt_tokens: int
    prompt_ids: Ints = field(default_factory=lambda: NONE)
    """int32: only where a repetition penalty wants them."""
    output_ids: Ints = field(default_factory=lambda: NONE)
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
    """One launch. int32 arrays unless said otherwise."""

    index: int
    # -- prefilling rows
    prefill_slots: Ints = field(default_factory=lambda: NONE)
    """[n]"""
    prefix_lens: Ints = field(default_factory=lambda: NONE)
    """[n]: tokens of KV that exist."""
    new_lens: Ints = field(default_factory=lambda: NONE)
    """[n]: tokens to compute."""
    token_ids: Ints = field(default_factory=lambda: NONE)
    """[sum of new_lens]"""
    ends: Ints = field(default_factory=lambda: NONE)
    """[n]: 1 where this completes the prompt, so that the row's token counts; else 0."""
    # -- page table: rows written anew
    table_slots: Ints = field(default_factory=lambda: NONE)
    """[m]"""
    table_lens: Ints = field(default_factory=lambda: NONE)
    """[m]: pages of each."""
    table_pages: Ints = field(default_factory=lambda: NONE)
    """[sum of table_lens]"""
    # -- decoding rows
    decode_slots: Ints = field(default_factory=lambda: NONE)
    """[b]"""
    positions: Ints = field(default_factory=lambda: NONE)
    """[b]: position of the token whose KV is computed; the row attends to ``position + 1`` tokens."""
    opening: Ints = field(default_factory=lambda: NONE)
    """[o]: decoding rows whose token is the first of a page."""
    opened: Ints = field(default_factory=lambda: NONE)
    """[o]: that page."""
    # -- sampling
    sampling: list[SlotSampling] = field(default_factory=list)
    needs: SamplingNeeds = field(default_factory=SamplingNeeds)
    forced: Ints | None = None
    """[n + b]: tokens that replace the computed ones (``tokens: oracle``)."""
    prompt_logprobs: Ints = field(default_factory=lambda: NONE)
    """[n], or empty for no row: position from which on the row wants the log-probabilities of its prompt; -1: none."""
    defer_sampling: bool = False
    """Compute the logits only; sampling follows with a call of its own."""


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
    """float32 [sum of new_lens]: element i is the log-probability of the prompt token that follows new token i of the
    step; NaN where nobody asked or nothing follows."""
