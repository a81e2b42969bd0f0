"""Simulate and run every case of a target, and keep what a page needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from testbed.metrics.run import Run
from testbed.scenario.schema import Scenario
from testbed.study.confirm.errors import time_errors
from testbed.study.confirm.join import Joined
from testbed.study.confirm.run import Confirmation, confirm
from tests.fidelity.cases import Case, Target, cases_of

FIGURES = ("output_throughput", "mean_tpot_ms", "mean_e2el_ms", "mean_ttft_ms")
"""What bars are set on: error of the mean, in percent, with the noise of the repeats beside it."""
TAILS = ("p99_ttft_ms", "p99_tpot_ms", "p99_itl_ms", "device_busy_percent")
"""Reported beside them."""
REPEATS = 2

Execute = Callable[[Scenario], Run]


@dataclass(frozen=True)
class Judged:
    """One variant of one case."""

    case: str
    variant: str
    requests: int
    steps: int
    retractions: int
    figures: dict[str, dict[str, float]]
    """By figure: simulated, real, error and noise (both in percent of the real mean)."""
    device_error: float
    """Percent: predicted less measured device time of the steps that ran, over measured."""
    host_error: float
    """Percent, likewise, of all host stages."""
    replayed: bool
    """Every decision of every real run came out again."""
    faults: int
    """Tokens that were not the oracle's."""
    same_decisions: int | None
    """Steps until simulation and life first decide differently; None: they never do."""
    findings: tuple[str, ...]

    def summary(self) -> str:
        """One line."""
        errors = (
            f"{key.split('_')[1]} {self.figures[key]['error']:+.1f} [{self.figures[key]['noise']:.1f}]"
            for key in FIGURES
        )
        return f"{self.variant} {', '.join(errors)}"


@dataclass(frozen=True)
class Ranked:
    """One figure of one case: how the variants are ordered."""

    case: str
    figure: str
    right: int
    wrong: int
    close: int
    """Pairs that life does not tell apart by twice the noise."""


def judge(target: Target, execute: Execute) -> Iterator[tuple[list[Judged], list[Ranked]]]:
    """Case by case."""
    for case in cases_of(target):
        found = confirm(case.name, case.scenarios(target), lambda _, one: execute(one), repeats=REPEATS)
        yield [_judged(case, found, one) for one in found.variants], [*_ranked(case, found)]


def _judged(case: Case, found: Confirmation, one: Joined) -> Judged:
    figures = {}
    for key in (*FIGURES, *TAILS):
        row = one.figures[key]
        figures[key] = {
            "simulated": row.simulated,
            "real": row.real,
            "error": 100 * row.error,
            "noise": 100 * row.noise,
        }
    return Judged(
        case=case.name,
        variant=one.name,
        requests=len(one.simulated.records.requests["id"]),
        steps=len(one.real[0].records.steps["step"]),
        retractions=int(np.sum(one.real[0].records.steps["retracted"])),
        figures=figures,
        device_error=_summed_error(one.steps),
        host_error=_summed_error(one.host),
        replayed=all(replayed.divergence is None for replayed in one.replayed),
        faults=sum(len(faults) for faults in one.faults),
        same_decisions=min((diff.step for diff in one.differences if diff is not None), default=None),
        findings=tuple(str(finding) for finding in found.findings[one.name]),
    )


def _summed_error(times: Any) -> float:
    whole = time_errors(times.assign(all="all"), ["all"])
    return 100 * whole[0].error if whole else float("nan")


def _ranked(case: Case, found: Confirmation) -> Iterator[Ranked]:
    for ranking in found.rankings:
        verdicts = [pair.verdict for pair in ranking.pairs]
        counts = (verdicts.count(name) for name in ("right", "wrong", "too close to call"))
        yield Ranked(case.name, ranking.figure, *counts)


def plain(judged: list[Judged], ranked: list[Ranked]) -> dict[str, Any]:
    """For JSON."""
    return {"judged": [asdict(one) for one in judged], "ranked": [asdict(one) for one in ranked]}
