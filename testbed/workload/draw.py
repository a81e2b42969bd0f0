"""Random numbers: raw bits of Philox through an inverse distribution function, in blocks.

Library distribution methods change their streams between versions; the bits of a counter-based generator do not.
Every quantity has a generator of its own, named by what it is for, and every value takes exactly one number from it:
changing the arrival rate leaves the lengths as they were (common random numbers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import gamma as gamma_function
from scipy.special import gammaincinv, ndtr, ndtri

from testbed.scenario.workload import Empirical, Exponential, Fixed, Lognormal, Uniform
from testbed.tokens import stream_key

Floats = NDArray[np.float64]
Quantiles = Callable[[Floats], Floats]
"""An inverse distribution function: float64 [n] in (0, 1) to float64 [n]."""

_FIRST_BLOCK = 16
_LARGEST_BLOCK = 4096


class Uniforms:
    """Numbers in the open interval (0, 1), the sequence named by ``seed`` and ``names``."""

    def __init__(self, seed: int, *names: str | int) -> None:
        self._bits = np.random.Philox(key=stream_key("draw", seed, *names))

    def take(self, count: int) -> Floats:
        """The next ``count`` numbers: odd multiples of 2**-53, so neither 0 nor 1 is ever drawn."""
        words = self._bits.random_raw(count)
        return (words >> np.uint64(12)).astype(np.float64) * 2.0**-52 + 2.0**-53


def blocks(uniforms: Uniforms) -> Iterator[Floats]:
    """Endless blocks of numbers, small at first; the sequence does not depend on the sizes of the blocks."""
    size = _FIRST_BLOCK
    while True:
        yield uniforms.take(size)
        size = min(2 * size, _LARGEST_BLOCK)


def values(quantiles: Quantiles, uniforms: Uniforms) -> Iterator[float]:
    """Endless draws."""
    for block in blocks(uniforms):
        yield from quantiles(block).tolist()


def exponential(mean: float, u: Floats) -> Floats:
    """Inverse of ``1 - exp(-x / mean)``."""
    return -mean * np.log1p(-u)


def gamma(mean: float, cv: float, u: Floats) -> Floats:
    """Gamma with this mean and coefficient of variation: shape ``cv ** -2``."""
    shape = cv**-2
    draws: Floats = gammaincinv(shape, u) * (mean / shape)
    return draws


@cache
def weibull_shape(cv: float) -> float:
    """The shape k with ``cv**2 + 1 = G(1 + 2/k) / G(1 + 1/k)**2``, solved numerically."""

    def excess(log_k: float) -> float:
        k = np.exp(log_k)
        return float(gamma_function(1 + 2 / k) / gamma_function(1 + 1 / k) ** 2 - 1 - cv**2)

    return float(np.exp(brentq(excess, np.log(0.05), np.log(200.0))))


def weibull(mean: float, cv: float, u: Floats) -> Floats:
    """Weibull with this mean and coefficient of variation."""
    shape = weibull_shape(cv)
    return (mean / float(gamma_function(1 + 1 / shape))) * (-np.log1p(-u)) ** (1 / shape)


def lognormal(mu: float, sigma: float, u: Floats) -> Floats:
    """Inverse of the lognormal distribution with these moments of the logarithm."""
    draws: Floats = np.exp(mu + sigma * ndtri(u))
    return draws


def lognormal_parameters(law: Lognormal) -> tuple[float, float]:
    """``(mu, sigma)`` of the logarithm, from whichever parameters were given."""
    if law.p50 is not None and law.p95 is not None:
        return float(np.log(law.p50)), float(np.log(law.p95 / law.p50) / ndtri(0.95))
    sigma = law.sigma or 0.0
    if law.median is not None:
        return float(np.log(law.median)), sigma
    return float(np.log(law.mean or 1.0)) - sigma**2 / 2, sigma


def truncated(inner: Quantiles, below: float, above: float, u: Floats) -> Floats:
    """``inner`` without the probability ``below`` in its left and ``above`` in its right tail."""
    return inner(np.minimum(below + u * (1 - below - above), 1 - 2.0**-53))


def table(probabilities: Floats, quantiles: Floats, u: Floats) -> Floats:
    """Straight lines between the points of a quantile table."""
    return np.interp(u, probabilities, quantiles)


def sample(data: Floats, u: Floats) -> Floats:
    """Draw with replacement from ``data``, float64 [n]."""
    return data[(u * len(data)).astype(np.int64)]


def parametric(law: Fixed | Uniform | Lognormal | Exponential, *, whole: bool = False) -> Quantiles:
    """The inverse distribution function of a law that needs no data; ``whole``: of integers, both ends included."""
    if isinstance(law, Fixed):
        return partial(_constant, law.value)
    if isinstance(law, Uniform):
        # Integers are rounded later: half a unit more at both ends gives each of them the same probability.
        margin = 0.5 if whole else 0.0
        return partial(table, np.array([0.0, 1.0]), np.array([law.low - margin, law.high + margin]))
    if isinstance(law, Exponential):
        inner: Quantiles = partial(exponential, law.mean)
        below = -np.expm1(-law.min / law.mean)
        above = 0.0 if law.max is None else np.exp(-law.max / law.mean)
        return partial(truncated, inner, float(below), float(above))
    mu, sigma = lognormal_parameters(law)
    return partial(truncated, partial(lognormal, mu, sigma), *_lognormal_tails(law, mu, sigma))


def quantile_table(law: Empirical) -> Quantiles:
    """The inverse distribution function of a table of quantiles in a scenario."""
    points = sorted((float(key[1:]) / 100, value) for key, value in (law.quantiles or {}).items())
    probabilities, quantiles = zip(*points, strict=True)
    return partial(table, np.array(probabilities), np.array(quantiles))


def whole_tokens(draws: Floats) -> NDArray[np.int64]:
    """Lengths, int64 [n]: rounded to the nearest, at least 1 (and at most what 31 bits hold)."""
    return np.clip(np.floor(draws + 0.5), 1, 2**31 - 1).astype(np.int64)


def _constant(value: float, u: Floats) -> Floats:
    return np.full(len(u), value)


def _lognormal_tails(law: Lognormal, mu: float, sigma: float) -> tuple[float, float]:
    below = 0.0 if law.min == 0 else float(ndtr((np.log(law.min) - mu) / sigma))
    above = 0.0 if law.max is None else float(ndtr((mu - np.log(law.max)) / sigma))
    return below, above
