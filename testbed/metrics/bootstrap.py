"""Confidence intervals by a block bootstrap over requests, deterministic and cheap.

Neighbours in a queue wait alike, so resampling single requests would promise too narrow intervals. The requests of the
window are cut, in order of arrival, into at most 100 blocks, and blocks are drawn with replacement (H. R. Kuensch,
Annals of Statistics 17(3), 1989; blocks here do not overlap). Two runs of the same requests that use the same seed
draw the same blocks: their differences are paired.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from testbed.metrics.columns import Floats, Ints

BLOCKS = 100
RESAMPLES = 1000
_GRID_POINTS = 1025
_GRID_LOGIT = 8.0
_HALF_WORD = np.uint64(32)


class Resampler:
    """Draws of request blocks, shared by every statistic of a run."""

    def __init__(self, requests: int, seed: int = 0, resamples: int = RESAMPLES, blocks: int = BLOCKS) -> None:
        """``requests`` in order of arrival; ``seed`` of a Philox generator whose raw bits choose the blocks."""
        self.requests = requests
        self.blocks = max(1, min(requests, blocks))
        self.block_of: Ints = np.arange(requests) * self.blocks // max(requests, 1)
        raw: NDArray[np.uint64] = np.random.Philox(key=seed).random_raw(resamples * self.blocks)
        drawn = ((raw >> _HALF_WORD) * np.uint64(self.blocks)) >> _HALF_WORD  # multiply-shift to [0, blocks)
        row = np.repeat(np.arange(resamples), self.blocks)
        counts = np.bincount(row * self.blocks + drawn.astype(np.int64), minlength=resamples * self.blocks)
        self.weights: Floats = counts.reshape(resamples, self.blocks).astype(np.float64)

    def statistics(self, values: Floats, owner: Ints, percentiles: Sequence[float]) -> dict[str, Floats]:
        """``mean`` and each ``pN`` of every resample, float64 [resamples]; NaN where a resample holds no value.

        values: float64 [n], no NaN; owner: int64 [n], the request each value belongs to.
        """
        block = self.block_of[owner]
        number = self.weights @ np.bincount(block, minlength=self.blocks)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = (self.weights @ np.bincount(block, weights=values, minlength=self.blocks)) / number
        found = {"mean": mean}
        if not len(values):
            return found | {f"p{percentile:g}": mean for percentile in percentiles}
        grid = _grid(values)
        at_most = np.cumsum(
            np.bincount(
                block * len(grid) + np.minimum(np.searchsorted(grid, values), len(grid) - 1),
                minlength=self.blocks * len(grid),
            ).reshape(self.blocks, len(grid)),
            axis=1,
        )
        below = self.weights @ at_most.astype(np.float64)
        for percentile in percentiles:
            rank = np.ceil(number * (percentile / 100) - 1e-9)
            position = np.minimum((below < rank[:, None]).sum(axis=1), len(grid) - 1)
            found[f"p{percentile:g}"] = np.where(number > 0, grid[position], np.nan)
        return found


def _grid(values: Floats) -> Floats:
    """Values that resampled percentiles are read from: all of them, or 1025 order statistics dense in both tails."""
    ordered = np.sort(values)
    if len(ordered) <= _GRID_POINTS:
        return np.unique(ordered)
    level = 1.0 / (1.0 + np.exp(-np.linspace(-_GRID_LOGIT, _GRID_LOGIT, _GRID_POINTS)))
    index = np.concatenate([[0], np.rint(level * (len(ordered) - 1)).astype(np.int64), [len(ordered) - 1]])
    return np.unique(ordered[index])


def interval(resampled: Floats, level: float = 0.95) -> tuple[float, float]:
    """The central ``level`` of a resampled statistic (percentile method); NaN, NaN where nothing was resampled."""
    known = resampled[~np.isnan(resampled)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
