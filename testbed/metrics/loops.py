"""The loops of a run, by the number that column ``replica`` holds: replicas, their pipeline stages, prefill and decode
engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from testbed.metrics.columns import Bools, Floats, ints
from testbed.metrics.records import Records

ANY = -1
"""Whoever."""


class Loop(NamedTuple):
    """What ``meta["loops"]`` says of a loop, and its number."""

    number: int = 0
    name: str = "replica 0"
    kv_tokens: float = 0.0
    """KV capacity; 0 where it is not known."""
    stage: int = 0
    """In its pipeline. Later stages hold the same requests and tokens as the first, of other layers."""
    answers: int = ANY
    """The loop that answers the requests that this one works for: itself, the first stage of its pipeline, or ``ANY``
    for a prefill engine, whose requests are answered elsewhere."""
    role: str = "null"
    """``prefill`` or ``decode`` where they are apart."""

    def serves(self, records: Records) -> Bools:
        """The requests that it works for: bool [requests]."""
        by = ints(records.requests, "replica")
        return np.ones(len(by), dtype=np.bool_) if self.answers == ANY else by == self.answers


ALONE = Loop()


def loops_of(records: Records, meta: Mapping[str, Any]) -> list[Loop]:
    """Every loop of a run, also one that never had a request. Where ``meta`` names none: the numbers that the records
    hold, at least 0; what answers no request then works for all."""
    if named := meta.get("loops"):
        return [Loop(number, **one) for number, one in enumerate(named)]
    answering = ints(records.requests, "replica")
    seen = np.unique(np.concatenate([answering, ints(records.steps, "replica")]))
    kv_tokens = float(meta.get("kv_tokens") or 0)
    return [
        Loop(number, f"replica {number}", kv_tokens, answers=number if number in answering else ANY)
        for number in seen[seen >= 0].tolist() or [0]
    ]


def is_front(records: Records, meta: Mapping[str, Any]) -> Bools:
    """Whether a step is that of a pipeline's first stage, or of an engine that has one: bool [steps]. What the stages
    after it do to tokens and pages is the same once more."""
    later = [loop.number for loop in loops_of(records, meta) if loop.stage]
    return np.isin(ints(records.steps, "replica"), later, invert=True)


def capacities(records: Records, meta: Mapping[str, Any]) -> Floats:
    """KV capacity (tokens) of the loop of each step, NaN where it is not known: float64 [steps]."""
    loops = loops_of(records, meta)
    by_number = np.full(loops[-1].number + 1, np.nan)
    for loop in loops:
        by_number[loop.number] = loop.kv_tokens or np.nan
    return by_number[ints(records.steps, "replica")]
