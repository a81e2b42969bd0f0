"""A line through measured times: what a stage of the host costs by what it depends on.

Times of a host are not noise around a line. A few charges in a thousand take ten or a thousand times as long, because
the operating system gave the core to somebody else or the garbage collector walked the heap. Such weather says nothing
about the stage, and least squares would follow it. So:

* the *tail* is cut: charges above ``TAIL_FACTOR`` times the line and ``TAIL_NS`` over it. What it took beyond the line,
  shared out over all charges, is a constant of its own: sums are what throughput sees;
* what is left is fitted with coefficients from 0 (non-negative least squares: Lawson and Hanson, *Solving Least Squares
  Problems*, 1974, ch. 23), each charge weighed by 1 / its predicted time. Small and large values then both matter, and
  the line keeps the sum: with weights 1 / p the normal equations of the terms that are above 0, each times its
  coefficient, add up to ``sum(measured - p) = 0``;
* a term pays when the error on the other half of the charges grows by more than ``PAYS`` without it; others stay out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Floats = NDArray[np.float64]

TAIL_FACTOR = 4.0
TAIL_NS = 50_000
ACCIDENT_NS = 5_000_000
"""Of a longer pause only this much is shared out: a slice of the operating system's scheduler is shorter, and one
accident in a run of seconds would stand in the profile for ever."""
PASSES = 8
SETTLED = 1e-4
"""Cutting and weighing end when no coefficient changes by more: mostly after three or four passes."""
PAYS = 0.005


def fit_line(columns: Floats, measured_ns: Floats) -> Floats:
    """Coefficients from 0 of ``columns`` (float64 [charges, terms]) for ``measured_ns`` (float64 [charges]).

    The first pass weighs by 1 / measured squared: hardly anything of the tail, and a bit low. The next ones weigh by
    what the pass before predicts, without the tail that it tells.
    """
    line = _weighted(columns, measured_ns, 1.0 / np.maximum(measured_ns, 1.0))
    for _ in range(PASSES):
        kept = ~is_tail(measured_ns, columns @ line)
        root = 1.0 / np.sqrt(np.maximum(columns[kept] @ line, 1.0))
        before, line = line, _weighted(columns[kept], measured_ns[kept], root)
        if np.allclose(line, before, rtol=SETTLED, atol=0):
            break
    return line


def is_tail(measured_ns: Floats, predicted_ns: Floats) -> NDArray[np.bool_]:
    """Which charges are weather: bool [charges]."""
    return (measured_ns > TAIL_FACTOR * predicted_ns) & (measured_ns > predicted_ns + TAIL_NS)


def tail_mean(measured_ns: Floats, predicted_ns: Floats) -> float:
    """What the tail took beyond the line (ns), over all charges; of each no more than ``ACCIDENT_NS``."""
    beyond = np.where(is_tail(measured_ns, predicted_ns), measured_ns - predicted_ns, 0.0)
    return float(np.minimum(beyond, ACCIDENT_NS).mean()) if len(beyond) else 0.0


def terms_that_pay(columns: Floats, measured_ns: Floats) -> list[int]:
    """Indices of the columns worth having, ascending; the worst goes first, while one can go.

    Error: sum of (measured - predicted)**2 / predicted over the even charges under the line of the odd ones, and the
    other way round, without the tail of the line of all terms. Some term always stays; none when all columns are 0.
    """
    kept = ~is_tail(measured_ns, columns @ fit_line(columns, measured_ns))
    columns, measured_ns = columns[kept], measured_ns[kept]
    chosen = [term for term in range(columns.shape[1]) if columns[:, term].any()]
    least = _crossed_error(columns[:, chosen], measured_ns)
    while len(chosen) > 1:
        without = [[term for term in chosen if term != gone] for gone in chosen]
        errors = [_crossed_error(columns[:, terms], measured_ns) for terms in without]
        best = int(np.argmin(errors))
        if errors[best] > least * (1 + PAYS):
            break
        chosen, least = without[best], min(least, errors[best])
    return chosen


def _crossed_error(columns: Floats, measured_ns: Floats) -> float:
    total = 0.0
    for fitted, judged in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        predicted = columns[judged] @ fit_line(columns[fitted], measured_ns[fitted])
        total += float((np.square(measured_ns[judged] - predicted) / np.maximum(predicted, 1.0)).sum())
    return total


def _weighted(columns: Floats, measured_ns: Floats, root: Floats) -> Floats:
    """Least squares from 0 with each row times ``root`` (the root of its weight); columns are scaled alike first."""
    scale = np.maximum(np.abs(columns).max(axis=0, initial=0.0), 1e-30)
    rows = np.column_stack([columns / scale, measured_ns]) * root[:, None]
    small = np.asarray(np.linalg.qr(rows, mode="r"))  # has the normal equations of all the rows in a dozen of them
    solution, _ = nnls(small[:, :-1], small[:, -1])
    return np.asarray(solution / scale, dtype=np.float64)
