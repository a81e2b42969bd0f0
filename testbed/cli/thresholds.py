"""``--fail-if 'ttft_p99_ms>500'`` and the scenario's ``slo``: what makes a finished run a failed one."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from testbed.scenario.describe import did_you_mean
from testbed.scenario.errors import InputError

if TYPE_CHECKING:
    from testbed.scenario.schema import Scenario

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
    option: str = "--fail-if"
    """That it was given with."""

    def missed(self, figures: Mapping[str, float]) -> str:
        """Why the run fails, or ''. A figure that the run could not determine fails too: it proves nothing.

        Raises InputError when there is no such figure.
        """
        if self.key not in figures:
            hint = did_you_mean(self.key, figures) or f"figures: {', '.join(figures)}"
            raise InputError(f"there is no figure {self.key!r}", where=f"{self.option} '{self.text}'", remedy=hint)
        value = figures[self.key]
        if math.isnan(value):
            return f"{self.key} is undefined in this run ({self.option} '{self.text}')"
        return f"{self.key} is {value:g} ({self.option} '{self.text}')" if _SIGNS[self.sign](value, self.limit) else ""


def read_threshold(text: str, option: str = "--fail-if") -> Threshold:
    """``KEY<LIMIT`` (or <=, >, >=); latencies may be named ``ttft_p99_ms`` or ``p99_ttft_ms``. Raises InputError."""
    found = _FORM.fullmatch(text)
    where = f"{option} '{text}'"
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
    return Threshold(text, key, found["sign"], limit, option)


def check_thresholds(thresholds: Sequence[Threshold], scenario: Scenario) -> None:
    """Raise InputError for a figure that no run of ``scenario`` has, before the run has taken its time."""
    if not thresholds:
        return
    import numpy as np

    from testbed.metrics.recorder import Recorder
    from testbed.metrics.run import Run

    records = Recorder().records({}, b"")
    records.steps["flops"] = records.steps["bytes"] = np.zeros(0)  # the cost model adds them to a run
    nothing = Run({}, records)
    slo = scenario.slo.model_dump() if scenario.slo else None
    figures = nothing.aggregates(_percentiles(thresholds, scenario.percentiles), slo=slo)
    for threshold in thresholds:
        threshold.missed(figures)


def _percentiles(thresholds: Sequence[Threshold], chosen: Sequence[float]) -> list[float]:
    """The chosen percentiles and those that thresholds speak of."""
    asked = [float(found[1]) for threshold in thresholds if (found := _PERCENTILE.match(threshold.key))]
    return list(dict.fromkeys([*chosen, *asked]))


def missed_thresholds(run: Any, thresholds: list[Threshold]) -> list[str]:
    """Everything that the run (``testbed.metrics.run.Run``) missed: limits of its ``slo``, then ``--fail-if``."""
    late = [
        f"slo: {mark.key} is {mark.value:g}, the limit is {mark.limit:g}" for mark in run.slo_marks() if not mark.met
    ]
    figures = run.aggregates(percentiles=_percentiles(thresholds, run.percentiles))
    return late + [reason for threshold in thresholds if (reason := threshold.missed(figures))]
