"""How the experts of a mixture lie on the devices that share them, and how evenly tokens choose them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from testbed.scenario.base import Model, NonNegativeInt


class Experts(Model):
    """Expert parallelism: what ``parallel.ep`` devices do with a layer's experts. Without effect where ``ep`` is 1."""

    placement: Literal["contiguous", "round_robin", "balanced"] = "contiguous"
    """Which rank holds which experts: neighbours together, in turn, or by load (most loaded first, each to the least
    loaded rank, as EPLB does)."""
    skew: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Exponent of Zipf's law over a layer's experts: the i-th most popular is chosen ``i ** -skew`` times as often as
    the first, but by no token twice; 0: evenly."""
    redundant: NonNegativeInt = 0
    """Further copies of a layer's most loaded experts (EPLB's redundant experts); needs ``placement: balanced``."""
    dispatch: Literal["all_reduce", "all_to_all"] = "all_reduce"
    """``all_reduce``: every rank has every token, and the sum of their outputs is reduced. ``all_to_all``: a token goes
    to the ranks of its experts and back (DeepEP); needs ``ep`` equal to ``tp``."""
