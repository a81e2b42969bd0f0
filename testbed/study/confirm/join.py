"""A simulated run and its real repeats, joined in every way there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from testbed.costs import CostModel, DeviceProfile, HostProfile
from testbed.metrics.columns import NS_PER_MS
from testbed.metrics.run import Run
from testbed.metrics.window import run_end_ns
from testbed.runtime.replay import Replayed
from testbed.study.confirm import errors
from testbed.study.confirm.decisions import Difference, compare_decisions
from testbed.study.confirm.executor import Fault, executor_faults
from testbed.study.replay import replay


@dataclass(frozen=True)
class Profiles:
    """What the simulation was priced with."""

    cost_model: CostModel
    host: HostProfile
    device: DeviceProfile | None
    """None for a device of constant times."""


@dataclass(frozen=True, eq=False)
class Joined:
    """One variant: its simulation beside its real runs. Frames are defined by the functions that make them, in
    ``errors``; those of times hold all repeats, told apart by the column ``run``."""

    name: str
    simulated: Run
    real: tuple[Run, ...]
    replayed: tuple[Replayed, ...]
    """Of each real run."""
    profiles: Profiles
    figures: dict[str, errors.FigureError]
    requests: pd.DataFrame
    """Per-request errors against every real run."""
    requests_noise: pd.DataFrame
    """Per-request errors of the second real run against the first; empty for a single one."""
    steps: pd.DataFrame
    host: pd.DataFrame
    bubbles: list[errors.Share]
    differences: tuple[Difference | None, ...]
    """First different decision of the simulation and each real run."""
    repeats_difference: Difference | None
    """Likewise of the first two real runs: what timing alone does."""
    faults: tuple[tuple[Fault, ...], ...]
    """Of the executor, in each real run."""

    @property
    def real_ms(self) -> float:
        """How long the real runs lasted in all."""
        return sum(run_end_ns(run.records) for run in self.real) / NS_PER_MS


def join(name: str, simulated: Run, real: Sequence[Run], profiles: Profiles) -> Joined:
    """Join a simulated run with real runs of the same scenario, all with their journals.

    Raises InputError for a run without a journal or without figures.
    """
    replayed = tuple(replay(run, own_code=True) for run in real)
    pairs = list(zip(real, replayed, strict=True))
    model, host = profiles.cost_model, profiles.host
    steps = [errors.step_times(run, again, model) for run, again in pairs]
    charges = [errors.host_times(run, again, model, host) for run, again in pairs]
    against = [errors.request_errors(simulated, run) for run in real]
    repeat = real[1:2] or real[:1]
    return Joined(
        name=name,
        simulated=simulated,
        real=tuple(real),
        replayed=replayed,
        profiles=profiles,
        figures=errors.figure_errors(simulated, real),
        requests=pd.concat(against),
        requests_noise=errors.request_errors(repeat[0], real[0]) if len(real) > 1 else against[0].iloc[:0],
        steps=_numbered(steps),
        host=_numbered(charges),
        bubbles=errors.bubbles(simulated, real),
        differences=tuple(compare_decisions(simulated, run) for run in real),
        repeats_difference=compare_decisions(real[0], repeat[0], ("first run", "second run")),
        faults=tuple(tuple(executor_faults(run, simulated)) for run in real),
    )


def _numbered(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat([frame.assign(run=number) for number, frame in enumerate(frames)], ignore_index=True)
