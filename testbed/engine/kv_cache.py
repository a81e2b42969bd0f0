"""What the device remembers between steps: keys and values, whose they are, and the tokens that were just drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from testbed.scenario.models import ModelSpec

RELAY_DEPTH = 4
"""Positions of one slot that the relay holds apart: two steps are in flight at most."""


class KvCache:
    """Keys and values by page, one pair of buffers a layer: each [pages * page_size, kv_heads, head_dim]. Page 0 takes
    the writes of padding rows."""

    def __init__(self, spec: ModelSpec, kv_tokens: int, page_size: int, dtype: torch.dtype, device: torch.device):
        tokens = (kv_tokens // page_size + 1) * page_size
        shape = (tokens, spec.kv_heads, spec.head_dim)
        self.layers = [
            (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(spec.layers)
        ]


class TokenRelay:
    """The tokens that were drawn and not yet fed back: a step's rows leave theirs here, the next step finds its inputs,
    and the host need not know them. Indexed by slot and position, so that a mix-up cannot go unseen: a token is taken
    out when it is read."""

    def __init__(self, slots: int, device: torch.device) -> None:
        """``slots``: with the spare one."""
        self._tokens = torch.full((slots * RELAY_DEPTH,), -1, dtype=torch.int32, device=device)
        self._tokens[-RELAY_DEPTH:] = 0  # padding rows of a CUDA graph embed what they find at the spare slot
        self._checks = device.type == "cpu"

    def put(self, slots: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """Row i's token stands at ``positions[i]`` of the sequence in ``slots[i]``: all int32 [rows]."""
        self._tokens[_place(slots, positions)] = token_ids.clamp(min=0)

    def take(self, slots: Tensor, positions: Tensor) -> Tensor:
        """The tokens at these places, int32 [rows]. Raises RuntimeError, on a CPU, for one that nobody left."""
        places = _place(slots, positions)
        found = self._tokens[places]
        if self._checks:
            if bool((found < 0).any()):
                raise RuntimeError("a row decodes a token that no step has left for it")
            self._tokens[places] = -1
        return found


def _place(slots: Tensor, positions: Tensor) -> Tensor:
    return slots * RELAY_DEPTH + positions % RELAY_DEPTH
