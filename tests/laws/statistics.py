"""Estimates from simulated queues: a mean with its 99 % interval by batch means, and the checks made of them.

Neighbours in a queue wait alike, so an interval from single customers would be far too narrow. A run is cut into
batches much longer than that memory; their means are nearly independent (G. S. Fishman, Management Science 24(5),
1978).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
LEVEL = 0.99
BATCHES = 20
"""Batches of one run."""


@dataclass(frozen=True)
class Check:
    """One figure of a simulated queue beside what theory says.

    ``half_width`` is that of the 99 % interval around ``found``; 0 where the law is exact. ``bound``: the law is an
    upper bound. ``p_value``: the check is a test of a distribution, and fails below 1 %.
    """

    law: str
    what: str
    theory: float
    found: float
    half_width: float = 0.0
    bound: bool = False
    p_value: float | None = None

    @property
    def holds(self) -> bool:
        """Whether theory lies within the interval."""
        if self.p_value is not None:
            return self.p_value >= 1 - LEVEL
        if self.bound:
            return self.found - self.half_width <= self.theory
        return abs(self.found - self.theory) <= self.half_width

    def __str__(self) -> str:
        mark = "ok  " if self.holds else "OUT "
        if self.p_value is not None:
            return f"{mark}{self.law}: {self.what}: p = {self.p_value:.3f}"
        sign = "<=" if self.bound else "=="
        interval = f" +- {self.half_width:.3g}" if self.half_width else " exactly"
        return f"{mark}{self.law}: {self.what}: {self.found:.6g}{interval} {sign} {self.theory:.6g}"


def batch_means(values: Floats, warm_up: float = 0.05) -> Floats:
    """Means of ``BATCHES`` equal pieces of a series, float64 [BATCHES], its first part left out."""
    start = int(len(values) * warm_up)
    size = (len(values) - start) // BATCHES
    return values[start : start + size * BATCHES].reshape(BATCHES, size).mean(axis=1)


def interval(means: Sequence[Floats]) -> tuple[float, float]:
    """(mean, half width of the 99 % interval) from the batch means of several runs, by Student's t."""
    pooled = np.concatenate(means)
    half = stats.t.ppf((1 + LEVEL) / 2, len(pooled) - 1) * pooled.std(ddof=1) / np.sqrt(len(pooled))
    return float(pooled.mean()), float(half)


def mean_check(law: str, what: str, theory: float, series: Sequence[Floats], **kind: bool) -> Check:
    """Check the mean of a series, one run each."""
    return means_check(law, what, theory, [batch_means(np.asarray(each, np.float64)) for each in series], **kind)


def means_check(law: str, what: str, theory: float, means: Sequence[Floats], **kind: bool) -> Check:
    """Check a mean from batch means, one array a run."""
    return Check(law, what, theory, *interval(means), **kind)
