"""``testbed simulate``: a scenario in virtual time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from testbed.cli import options
from testbed.cli.folders import check_output, output_folder
from testbed.cli.progress import Progress, progress_bar
from testbed.cli.thresholds import Threshold, missed_thresholds, read_threshold

if TYPE_CHECKING:
    from testbed.scenario.load import LoadedScenario
    from testbed.scenario.schema import Scenario

Execute = Callable[["Scenario", Progress | None], Any]
"""Runs one scenario and returns its ``Run``."""


def simulate(
    scenario: options.ScenarioFile,
    settings: options.Settings = None,
    output: options.Output = None,
    seed: options.Seed = None,
    percentiles: options.Percentiles = None,
    fail_if: options.FailIf = None,
    report: options.WriteReport = True,
    trace: options.WriteTrace = False,
    progress: options.ShowProgress = True,
) -> None:
    """Run a scenario in virtual time; print the result, write a run folder."""
    thresholds = [read_threshold(text) for text in fail_if or ()]
    loaded = options.read_scenario(scenario, settings, seed, percentiles)

    def execute(one: Scenario, tick: Progress | None) -> Any:
        from testbed import api

        return api.simulate(one, progress=tick)

    run_scenario(loaded, execute, output, thresholds, report=report, trace=trace, progress=progress)


def run_scenario(
    loaded: LoadedScenario,
    execute: Execute,
    output: Path | None,
    thresholds: list[Threshold],
    *,
    report: bool,
    trace: bool,
    progress: bool,
) -> None:
    """Run a scenario, or each of its variants; print, save, report; ends with status 1 when a threshold is missed."""
    check_output(output)
    _check_variants(loaded)
    folder: Path | None = None
    runs: list[tuple[Path, Any]] = []
    reasons: list[str] = []
    for name, one in (loaded.variants or {"": loaded.scenario}).items():
        with options.located(loaded, name), progress_bar(one.name, progress) as tick:
            run = execute(one, tick)
        folder = folder or output_folder(output, loaded.scenario.name)  # not before there is something to put into it
        run.save(folder / name)
        print(f"{run.table()}\n\nrun: {folder / name}\n", flush=True)
        runs.append((folder / name, run))
        prefix = f"{name}: " if name else ""
        reasons += [prefix + reason for reason in missed_thresholds(run, thresholds)]
    _report(runs, compared=bool(loaded.variants), report=report, trace=trace)
    for reason in reasons:
        print(f"missed: {reason}", file=sys.stderr)
    if reasons:
        raise typer.Exit(1)


def _check_variants(loaded: LoadedScenario) -> None:
    """Refuse what cannot run before the first variant has taken its time (a single scenario is refused anyway)."""
    from testbed.api import build_engine

    for name, one in loaded.variants.items():
        with options.located(loaded, name):
            build_engine(one)


def _report(runs: list[tuple[Path, Any]], *, compared: bool, report: bool, trace: bool) -> None:
    """The comparison of variants or the report of a single run; Perfetto traces."""
    if compared:
        from testbed.study.compare import compare

        comparison = compare([run for _, run in runs])
        print(comparison.table(), flush=True)
        folder = comparison.save(runs[0][0].parent / "comparison")
    else:
        folder = runs[0][0]
    if report:
        from testbed.report import write_report

        print(f"\nreport: {write_report([run for _, run in runs], folder)}", flush=True)
    if trace:
        from testbed.report import write_trace

        for place, run in runs:
            print(f"trace: {write_trace(run, place / 'trace.pftrace')}", flush=True)
