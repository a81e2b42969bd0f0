"""Whether simulation puts variants into the order that they have in life, as far as life tells them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from testbed.study.confirm.errors import spread

RANKED = {"output_throughput": -1, "mean_ttft_ms": 1, "mean_tpot_ms": 1, "mean_e2el_ms": 1}
"""Figures that variants are ranked by: 1 where less is better, -1 where more is."""
NOISES = 2.0
"""A real difference counts from this many times the noise on."""


@dataclass(frozen=True)
class Pair:
    """Two variants, the better one in life first."""

    better: str
    worse: str
    real: float
    """Real difference of their means, in the figure's unit, from 0."""
    noise: float
    """The larger of what the repeats of either differ by at most; NaN for a single one, which decides nothing."""
    simulated: float
    """The simulated difference in the same direction: negative where simulation says the opposite."""
    verdict: str
    """``right``, ``wrong``, or ``too close to call``: the real difference does not exceed twice the noise."""


@dataclass(frozen=True)
class Ranking:
    """The variants by one figure, best first."""

    figure: str
    simulated: tuple[str, ...]
    real: tuple[str, ...]
    pairs: tuple[Pair, ...]
    verdict: str
    """``wrong``: some pair is; ``right``: some pair is, none is wrong; ``too close to call``: no pair is decided."""


def rank(figure: str, simulated: Mapping[str, float], real: Mapping[str, Sequence[float]]) -> Ranking:
    """Rank variants by one figure of ``RANKED``. ``simulated``: its value by variant; ``real``: its repeats.

    Every pair whose real means differ by more than ``NOISES`` times its noise must stand in the same order in
    simulation, where a tie is no order. Variants without a value are left out.
    """
    sign = RANKED[figure]
    names = [name for name in simulated if not np.isnan([simulated[name], *real[name]]).any()]
    means = {name: float(np.mean(real[name])) for name in names}
    pairs = []
    for one, other in combinations(names, 2):
        better, worse = (one, other) if sign * means[one] <= sign * means[other] else (other, one)
        gap, noise = abs(means[one] - means[other]), float(np.max([spread(real[name]) for name in (one, other)]))
        foreseen = sign * (simulated[worse] - simulated[better])
        verdict = "too close to call" if not gap > NOISES * noise else "right" if foreseen > 0 else "wrong"
        pairs.append(Pair(better, worse, gap, noise, foreseen, verdict))
    verdicts = [pair.verdict for pair in pairs]
    verdict = next((one for one in ("wrong", "right") if one in verdicts), "too close to call")
    return Ranking(
        figure,
        tuple(sorted(names, key=lambda name: sign * simulated[name])),
        tuple(sorted(names, key=lambda name: sign * means[name])),
        tuple(pairs),
        verdict,
    )
