"""Closed forms of queueing theory, in the units of their arguments.

Numbers of formulas: L. Kleinrock, Queueing Systems I (1975) and II (1976), unless another source is named. ``rate`` is
that of arrivals, ``service`` the moments of the service time, rho = rate * E[S].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats
from scipy.optimize import brentq


def moments(sizes: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """E[S] and E[S^2] of a discrete law."""
    share = np.asarray(weights, np.float64) / np.sum(weights)
    values = np.asarray(sizes, np.float64)
    return float(share @ values), float(share @ values**2)


def pollaczek_khinchine(rate: float, second_moment: float, rho: float) -> float:
    """Mean wait in M/G/1: Wq = lambda E[S^2] / (2 (1 - rho)) (I, 5.70)."""
    return rate * second_moment / (2 * (1 - rho))


def mm1k_blocking(rho: float, places: int) -> float:
    """Share of arrivals that M/M/1/K turns away, K places with the one in service (I, 3.22)."""
    return (1 - rho) * rho**places / (1 - rho ** (places + 1))


def by_class(rates: Sequence[float], means: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """Mean wait of each class, first class first, in M/G/1 without preemption (A. Cobham, Operations Research 2(1),
    1954; with classes by size the same formula is shortest job first: T. E. Phipps, Operations Research 4(1), 1956)."""
    residual = sum(rate * second for rate, second in zip(rates, seconds, strict=True)) / 2
    waits, before = [], 0.0
    for rate, mean in zip(rates, means, strict=True):
        after = before + rate * mean
        waits.append(residual / ((1 - before) * (1 - after)))
        before = after
    return waits


def bulk_wait(rate: float, service: float, largest: int, states: int = 400) -> float:
    """Mean wait in M/D^b/1: a server takes up to ``largest`` customers at once, one if only one is there.

    Numeric: X, the customers waiting when a service ends, is a Markov chain. From X > 0 the next X is
    max(X - b, 0) + A with A ~ Poisson(rate * service); from X = 0 the next customer starts alone and X becomes A. Over
    a cycle, waiting customers integrate to (left + rate * service / 2) * service; Little's law makes that a wait.
    """
    arrivals = stats.poisson.pmf(np.arange(states), rate * service)
    left = np.maximum(np.arange(states) - largest, 0)
    chain = np.zeros((states, states))
    for x in range(states):
        row = arrivals[: states - left[x]]
        chain[x, left[x] : left[x] + len(row)] = row
    chain[:, -1] += 1 - chain.sum(axis=1)
    system = np.vstack([chain.T - np.eye(states), np.ones(states)])
    share = np.linalg.lstsq(system, np.append(np.zeros(states), 1.0), rcond=None)[0]
    waiting = float(share @ (left + rate * service / 2)) * service / (service + share[0] / rate)
    return waiting / rate


def kingman(rate: float, arrival_variance: float, service_variance: float, rho: float) -> float:
    """Upper bound of the mean wait in GI/G/1 (J. F. C. Kingman, J. Royal Statistical Society B 24(2), 1962)."""
    return rate * (arrival_variance + service_variance) / (2 * (1 - rho))


def repairman_throughput(users: int, service: float, think: float) -> float:
    """Throughput of M/M/1//N: users who think, one exponential server (I, 3.36)."""
    weight, weights = 1.0, [1.0]
    for busy in range(1, users + 1):
        weight *= (users - busy + 1) * service / think
        weights.append(weight)
    return (1 - weights[0] / sum(weights)) / service


def che_hit_rate(popularity: Sequence[float], places: int) -> float:
    """Hit rate of an LRU cache under independent references: each item stays for the characteristic time T, the root
    of sum(1 - exp(-p T)) = places (H. Che, Y. Tung, Z. Wang, IEEE JSAC 20(7), 2002)."""
    p = np.asarray(popularity, np.float64)
    characteristic = brentq(lambda t: float(-np.expm1(-p * t).sum()) - places, 0.0, 1e9)
    return float(-(p * np.expm1(-p * characteristic)).sum())


def lru_hits(references: Sequence[int], places: int) -> int:
    """Hits of a cache that drops what was used longest ago, by following it reference by reference."""
    kept: dict[int, None] = {}
    hits = 0
    for item in references:
        if item in kept:
            hits += 1
            del kept[item]
        elif len(kept) == places:
            del kept[next(iter(kept))]
        kept[item] = None
    return hits
