"""A batch as the device sees it, its shape as a cost model sees it, and a step's result."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from testbed.request import Request


class ForwardMode(IntEnum):
    """What a step computes (SGLang's names). The values are part of the decision log's format."""

    EXTEND = 1
    DECODE = 2
    MIXED = 3

    @property
    def is_extend(self) -> bool:
        """Whether the batch contains prefill tokens."""
        return self is not ForwardMode.DECODE


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


class StepCost(NamedTuple):
    """The price of a step: device time, kernels to launch, and whether one CUDA graph holds them all."""

    gpu_ns: int
    kernels: int
    graph: bool
