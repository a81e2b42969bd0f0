"""Which experts the tokens of a step choose, on which ranks those lie, and what the busiest rank gets to do.

Under expert parallelism every layer waits for its slowest rank. How much work that has depends on how popular experts
are in the long run (``popularity``), on where they lie (``place``), and on chance: few tokens cannot choose evenly.
So tokens are drawn, once, from the generator that ``("experts", seed, layer)`` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit

from testbed.costs.devices import DeviceProfile
from testbed.costs.links import move_ns
from testbed.costs.tables import Curve
from testbed.scenario.experts import Experts
from testbed.workload.draw import Floats, Uniforms

Ints = NDArray[np.int64]
DRAWN_TOKENS = 512
"""Tokens drawn for each layer, a power of two. What more of them would bring the busiest rank is extrapolated."""


def popularity(experts: int, topk: int, skew: float) -> Floats:
    """The share of all tokens that choose each expert, by Zipf's law: float64 [experts], falling, of sum ``topk``.

    The i-th share is proportional to ``i ** -skew``; where that would be more than 1, every token chooses the expert
    (once), and the law holds for the others.
    """
    weights = np.arange(1, experts + 1, dtype=np.float64) ** -skew
    for always in range(topk):
        shares = (topk - always) * weights[always:] / weights[always:].sum()
        if shares[0] <= 1:
            return np.concatenate([np.ones(always), shares])
    return np.repeat([1.0, 0.0], [topk, experts - topk])


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the copies of a layer's experts lie: copy j of expert e on rank ``ranks[first[e] + j]``, j < copies[e]."""

    ranks: Ints
    """int64 [copies of all experts]"""
    first: Ints
    """int64 [experts]"""
    copies: Ints
    """int64 [experts]"""

    def shares(self, popularity: Floats, ranks: int) -> Floats:
        """Pairs of a token and an expert that each rank gets of one token on average: float64 [ranks]."""
        of_copies = np.repeat(popularity / self.copies, self.copies)
        shares: Floats = np.bincount(self.ranks, of_copies, minlength=ranks).astype(np.float64)
        return shares

    def ranks_of(self, choices: Ints) -> Ints:
        """Where tokens go that choose these experts, int64 [tokens, topk]: they take the copies in turn."""
        turn = np.arange(len(choices))[:, None] % self.copies[choices]
        return self.ranks[self.first[choices] + turn]


def place(popularity: Floats, ranks: int, config: Experts) -> Placement:
    """Lay out a layer's experts, ``popularity`` float64 [experts], as ``config`` says; every rank gets equally many."""
    experts = len(popularity)
    every = np.arange(experts)
    copies = np.ones(experts, np.int64)
    if config.placement == "contiguous":
        return Placement(every // (experts // ranks), every, copies)
    if config.placement == "round_robin":
        return Placement(every % ranks, every, copies)
    for _ in range(config.redundant):
        copies[np.argmax(popularity / copies)] += 1
    of_copies = np.repeat(popularity / copies, copies)
    return Placement(_balanced(of_copies, ranks), np.cumsum(copies) - copies, copies)


def _balanced(loads: Floats, ranks: int) -> Ints:
    """A rank for each load, the largest first, each to the least loaded rank that has room: int64 [loads]."""
    out = np.empty(len(loads), np.int64)
    room = np.full(ranks, len(loads) // ranks)
    total = np.zeros(ranks)
    for i in np.argsort(-loads, kind="stable"):
        rank = np.argmin(np.where(room > 0, total, np.inf))
        out[i] = rank
        room[rank] -= 1
        total[rank] += loads[i]
    return out


def choose(popularity: Floats, topk: int, tokens: int, uniforms: Uniforms) -> Ints:
    """The distinct experts that tokens choose: int64 [tokens, topk].

    The largest of a logit and logistic noise, as a router takes them: Pareto sampling (Rosen 1997), which includes an
    expert nearly as often as ``popularity`` says (3 % off at most, but for few experts and much skew).
    """
    noise = logit(uniforms.take(tokens * len(popularity))).reshape(tokens, -1)
    least_first: Ints = np.argpartition(-(logit(popularity) + noise), topk - 1, axis=1)
    return least_first[:, :topk]


class ExpertLoad:
    """What the ranks of one expert-parallel group get to do, for each of some layers."""

    def __init__(
        self, experts: int, topk: int, ranks: int, config: Experts, layers: Sequence[int], seed: int = 0
    ) -> None:
        """``layers``: their numbers in the model; each has popular experts of its own."""
        self.ranks, self.topk = ranks, topk
        self._pairs = np.zeros((len(layers), DRAWN_TOKENS, ranks), np.int64)
        """Experts of each token on each rank."""
        self._most: Floats = np.zeros(len(layers))
        """Pairs a token of the rank that is the busiest in the long run."""
        shares = popularity(experts, topk, config.skew)
        for i, layer in enumerate(layers):
            uniforms = Uniforms(seed, "experts", layer)
            here = shares[np.argsort(uniforms.take(experts))]
            placement = place(here, ranks, config)
            chosen = placement.ranks_of(choose(here, topk, DRAWN_TOKENS, uniforms))
            np.add.at(self._pairs[i], (np.arange(DRAWN_TOKENS)[:, None], chosen), 1)
            self._most[i] = placement.shares(here, ranks).max()
        self._knots = [1 << i for i in range(DRAWN_TOKENS.bit_length())]
        self._busiest: Floats = np.array([self._mean_of_most(tokens) for tokens in self._knots])

    def busiest(self, tokens: float) -> Floats:
        """Pairs of a token and an expert on the busiest rank of each layer, expected for a step of ``tokens``: float64
        [layers]; from ``tokens * topk / ranks`` (even) to ``tokens * topk`` (one rank has all).

        Beyond the drawn tokens the long run's busiest rank takes its share of them, and what chance adds grows with
        their square root.
        """
        drawn = self._knots[-1]
        if tokens >= drawn:
            by_chance = self._busiest[-1] - drawn * self._most
            long_run: Floats = tokens * self._most + by_chance * (tokens / drawn) ** 0.5
            return long_run
        low = max(0, int(tokens).bit_length() - 1)
        weight = (tokens - self._knots[low]) / self._knots[low]
        between: Floats = self._busiest[low] * (1 - weight) + self._busiest[low + 1] * weight
        return between

    def reached(self, groups: int) -> float:
        """Into how many of ``groups`` (of neighbouring ranks: nodes, or single ranks) a token goes, on average."""
        layers, tokens, _ = self._pairs.shape
        return float(self._pairs.reshape(layers, tokens, groups, -1).any(-1).sum(-1).mean())

    def _mean_of_most(self, tokens: int) -> Floats:
        """The busiest rank's pairs, averaged over all the steps of ``tokens`` that were drawn: float64 [layers]."""
        steps = self._pairs.reshape(len(self._pairs), -1, tokens, self.ranks).sum(2)
        most: Floats = steps.max(-1).mean(1)
        return most


def busiest_rank(load: ExpertLoad, every: Curve, launch_ns: float, elsewhere_ns: float = 0.0) -> Curve:
    """Time over tokens of the rank that a layer waits for, averaged over the layers.

    ``every``: the time of all experts on one device. A rank with so many pairs of a token and an expert takes its part
    of that time at the number of tokens that would bring as many to every rank; ``launch_ns`` of it are not shared.
    ``elsewhere_ns``: what each token takes beside, for its experts on other ranks.
    """

    def at(tokens: float) -> float:
        evenly = load.busiest(tokens) * load.ranks / load.topk
        part = sum(every.at(x) for x in evenly.tolist()) / len(evenly) - launch_ns
        return launch_ns + part / load.ranks + tokens * elsewhere_ns

    return Curve(every.xs, [at(x) for x in every.xs])


def exchange(load: ExpertLoad, device: DeviceProfile, nodes: int, token_bytes: float, knots: Sequence[float]) -> Curve:
    """Time over tokens of sending ``token_bytes`` of each to the ranks of its experts, or back; the mean of the layers.

    As DeepEP does: over the network once to each node, where the devices take equal parts, and within the node once to
    each rank, however many of its experts lie there. A busy rank is sent more, in proportion to its pairs.
    """
    per_node = load.ranks // nodes
    copies = load.reached(load.ranks) / load.topk
    between = load.reached(nodes) / nodes * (nodes - 1) / nodes / per_node

    def at(tokens: float) -> float:
        most = float(np.minimum(tokens, copies * load.busiest(tokens)).mean())
        return move_ns(device, most * (per_node - 1) / per_node * token_bytes, between * tokens * token_bytes)

    return Curve(knots, [at(x) for x in knots])


@lru_cache(maxsize=16)
def expert_load(experts: int, topk: int, ranks: int, config: Experts, layers: range, seed: int) -> ExpertLoad:
    """The same, drawn once for all replicas of an engine."""
    return ExpertLoad(experts, topk, ranks, config, layers, seed)
