"""``--fail-if 'ttft_p99_ms>500'`` and the scenario's ``slo``: what makes a finished run a failed one."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from testbed.scenario.describe import did_you_mean
from testbed.scenario.errors import InputError

_FORM = re.compile(r"\s*(?P<key>[a-z][\w.]*)\s*(?P<sign><=|>=|<|>)\s*(?P<limit>\S+)\s*")
_SIGNS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_LATENCY = re.compile(r"(?P<metric>ttft|tpot|itl|e2el)_(?P<statistic>mean|median|std|max|p[\d.]+)_ms")

_PERCENTILE = re.compile(r"p(\d{1,2}(?:\.\d+)?)_")


class Threshold(NamedTuple):
    """A condition on one figure of a run under which the command fails."""

    text: str
    key: str
    sign: str
    limit: float

    def missed(self, figures: Mapping[str, float]) -> str:
        """Why the run fails, or ''. A figure that the run could not determine fails too: it proves nothing.

        Raises InputError when there is no such figure.
        """
        if self.key not in figures:
            hint = did_you_mean(self.key, figures) or f"figures: {', '.join(figures)}"
            raise InputError(f"there is no figure {self.key!r}", where=f"--fail-if '{self.text}'", remedy=hint)
        value = figures[self.key]
        if math.isnan(value):
            return f"{self.key} is undefined in this run (--fail-if '{self.text}')"
        return f"{self.key} is {value:g} (--fail-if '{self.text}')" if _SIGNS[self.sign](value, self.limit) else ""


def read_threshold(text: str) -> Threshold:
    """``KEY<LIMIT`` (or <=, >, >=); latencies may be named ``ttft_p99_ms`` or ``p99_ttft_ms``. Raises InputError."""
    found = _FORM.fullmatch(text)
    where = f"--fail-if '{text}'"
    if not found:
        raise InputError("is not of the form FIGURE>NUMBER", where=where, remedy="write for example 'ttft_p99_ms>500'")
    try:
        limit = float(found["limit"])
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise InputError(f"{found['limit']!r} is not a finite number", where=where, remedy="write a number, e.g. 500")
    named = _LATENCY.fullmatch(found["key"])
    key = f"{named['statistic']}_{named['metric']}_ms" if named else found["key"]
    return Threshold(text, key, found["sign"], limit)


def missed_thresholds(run: Any, thresholds: list[Threshold]) -> list[str]:
    """Everything that the run (``testbed.metrics.run.Run``) missed: limits of its ``slo``, then ``--fail-if``."""
    late = [
        f"slo: {mark.key} is {mark.value:g}, the limit is {mark.limit:g}" for mark in run.slo_marks() if not mark.met
    ]
    asked = [float(found[1]) for threshold in thresholds if (found := _PERCENTILE.match(threshold.key))]
    figures = run.aggregates(percentiles=list(dict.fromkeys([*run.percentiles, *asked])))
    return late + [reason for threshold in thresholds if (reason := threshold.missed(figures))]
