"""Simulate and run the same scenario in one go: what is run, in which order, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from testbed import api
from testbed.costs import build_cost_model, build_host_profile, load_device
from testbed.engine.device import Device, open_device
from testbed.engine.options import EngineOptions
from testbed.metrics.files import write_json
from testbed.metrics.run import Run
from testbed.scenario.schema import Scenario
from testbed.study.confirm.errors import FIGURES, request_quantiles, time_errors
from testbed.study.confirm.findings import Finding, find, verdict
from testbed.study.confirm.join import Joined, Profiles, join
from testbed.study.confirm.ranking import RANKED, Ranking, rank

FORMAT = 1
"""Version of ``confirm.json``."""
LEAST_REPEATS = 2
"""The noise floor is the same run again."""

Execute = Callable[[str, Scenario], Run]
"""Runs the variant of this name."""
Keep = Callable[[str, str, Run], None]
"""Called with (variant, ``simulated`` or ``real-N``, run) as soon as each run has ended."""


class RealRuns:
    """Runs scenarios on this machine's device. It is opened at the first and stays open while scenarios ask for the
    same one; leaving the block closes it."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._options: EngineOptions | None = None
        self._device: Device | None = None

    def execute(self, scenario: Scenario, progress: api.Progress | None = None) -> Run:
        """See ``api.execute_on``."""
        options = api.check_real(scenario)
        if self._device is None or options != self._options:
            self._opened.close()
            self._device = self._opened.enter_context(open_device(options))
            self._options = options
        return api.execute_on(self._device, scenario, progress=progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


@dataclass(frozen=True, eq=False)
class Confirmation:
    """What simulation says of the variants, beside what they do."""

    name: str
    variants: tuple[Joined, ...]

    @cached_property
    def findings(self) -> dict[str, list[Finding]]:
        """By variant, most important first."""
        return {one.name: find(one) for one in self.variants}

    @cached_property
    def verdicts(self) -> dict[str, str]:
        """By variant, a line each."""
        return {one.name: verdict(one, self.findings[one.name]) for one in self.variants}

    @cached_property
    def rankings(self) -> list[Ranking]:
        """The variants by each figure that they are ranked by; empty for a single one."""
        if len(self.variants) < 2:
            return []
        return [
            rank(
                figure,
                {one.name: one.figures[figure].simulated for one in self.variants},
                {one.name: one.figures[figure].repeats for one in self.variants},
            )
            for figure in RANKED
        ]

    def worst_errors(self) -> dict[str, float]:
        """The largest |error| of every figure over the variants, in percent: what thresholds are held against. NaN
        where one of them has none."""
        return {key: float(np.max([100 * abs(one.figures[key].error) for one in self.variants])) for key in FIGURES}

    def content(self) -> dict[str, Any]:
        """Everything that was found, as plain data: ``confirm.json`` (``docs/confirm.md`` defines each field)."""
        return {
            "format": FORMAT,
            "scenario": self.name,
            "label": str(self.variants[0].real[0].meta.get("label", "")),
            "repeats": len(self.variants[0].real),
            "rankings": [asdict(ranking) for ranking in self.rankings],
            "variants": {one.name: self._variant(one) for one in self.variants},
            "provenance": self.variants[0].real[0].meta.get("provenance", {}),
        }

    def _variant(self, one: Joined) -> dict[str, Any]:
        profiles = one.profiles
        return {
            "verdict": self.verdicts[one.name],
            "findings": [asdict(finding) for finding in self.findings[one.name]],
            "device_profile": profiles.device.name if profiles.device else "constant",
            "host_profile": profiles.host.name,
            "ran_on": one.real[0].meta.get("device"),
            "figures": _rows(one.figures.values()),
            "requests": _rows(request_quantiles(one.requests)),
            "requests_noise": _rows(request_quantiles(one.requests_noise)),
            "steps": _rows(time_errors(one.steps, ["kind"])),
            "host": _rows(time_errors(one.host, ["stage"])),
            "host_by_kind": _rows(time_errors(one.host, ["stage", "kind"])),
            "bubbles": _rows(one.bubbles),
            "first_differences": [asdict(found) if found else None for found in one.differences],
            "first_difference_of_repeats": asdict(one.repeats_difference) if one.repeats_difference else None,
            "replays": [
                {
                    "steps": replayed.steps,
                    "diverges_at": replayed.divergence.step if replayed.divergence else None,
                    "explanation": replayed.divergence.explain() if replayed.divergence else "",
                }
                for replayed in one.replayed
            ],
            "executor_faults": [_rows(faults) for faults in one.faults],
        }

    def save(self, folder: Path | str) -> Path:
        """Write ``confirm.json`` into ``folder``; returns its path."""
        path = Path(folder) / "confirm.json"
        write_json(self.content(), path)
        return path


def confirm(
    name: str,
    variants: Mapping[str, Scenario],
    execute: Execute,
    *,
    simulate: Execute = lambda _, scenario: api.simulate(scenario),
    repeats: int = LEAST_REPEATS,
    keep: Keep = lambda *_: None,
) -> Confirmation:
    """Simulate every variant once, run every variant ``repeats`` times, join.

    ``execute`` makes the real runs. The variants take turns (A B A B), so that whatever drifts on the machine hits all
    alike. Raises InputError for a scenario that cannot run or a run without figures.
    """
    simulated = {}
    for variant, scenario in variants.items():
        simulated[variant] = simulate(variant, scenario)
        keep(variant, "simulated", simulated[variant])
    real: dict[str, list[Run]] = {variant: [] for variant in variants}
    for number in range(1, repeats + 1):
        for variant, scenario in variants.items():
            run = execute(variant, scenario)
            keep(variant, f"real-{number}", run)
            real[variant].append(run)
    joined = (join(one, simulated[one], real[one], profiles_of(scenario)) for one, scenario in variants.items())
    return Confirmation(name, tuple(joined))


def profiles_of(scenario: Scenario) -> Profiles:
    """What a simulation of ``scenario`` is priced with."""
    device = load_device(scenario.device) if isinstance(scenario.device, str) else None
    return Profiles(build_cost_model(scenario), build_host_profile(scenario), device)


def _rows(found: Iterable[Any]) -> list[dict[str, Any]]:
    return [row._asdict() for row in found]
