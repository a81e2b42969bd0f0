"""``testbed simulate``: a scenario in virtual time."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from testbed.cli import options
from testbed.cli.folders import check_output, output_folder
from testbed.cli.progress import Progress, progress_bar
from testbed.cli.thresholds import Threshold, check_thresholds, missed_thresholds, read_threshold

if TYPE_CHECKING:
    from testbed.scenario.load import LoadedScenario
    from testbed.scenario.schema import Scenario

Check = Callable[["Scenario"], object]
"""Raises InputError for a scenario that cannot run."""
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
    trace_window: options.TraceWindow = None,
    progress: options.ShowProgress = True,
) -> None:
    """Run a scenario in virtual time; print the result, write a run folder."""
    thresholds = [read_threshold(text) for text in fail_if or ()]
    window = options.read_window(trace_window)
    loaded = options.read_scenario(scenario, settings, seed, percentiles)

    def check(one: Scenario) -> None:
        from testbed import deployment

        deployment.build_engines(one)

    def execute(one: Scenario, tick: Progress | None) -> Any:
        from testbed import api

        return api.simulate(one, progress=tick)

    run_scenario(
        loaded, check, execute, output, thresholds, report=report, trace=trace, window=window, progress=progress
    )


def run_scenario(
    loaded: LoadedScenario,
    check: Check,
    execute: Execute,
    output: Path | None,
    thresholds: list[Threshold],
    *,
    report: bool,
    trace: bool,
    window: tuple[int, int] | None,
    progress: bool,
) -> None:
    """Run a scenario, or each of its variants; print, save, report; ends with status 1 when a threshold is missed.

    A run that was interrupted is printed and saved; then the command ends as after any Ctrl-C."""
    check_output(output)
    check_thresholds(thresholds, loaded.scenario)
    _check_variants(loaded, check)
    folder: Path | None = None
    runs: list[tuple[Path, Any]] = []
    reasons: list[str] = []
    for name, one in (loaded.variants or {"": loaded.scenario}).items():
        with options.located(loaded, name):
            with _interruptible(folder), progress_bar(one.name, progress) as tick:
                run = execute(one, tick)
            folder = folder or output_folder(output, loaded.scenario.name)  # not before there is something to put in
            save_run(run, folder / name)
        _print(run, name, folder / name)
        if run.meta.get("interrupted"):
            raise KeyboardInterrupt
        runs.append((folder / name, run))
        prefix = f"{name}: " if name else ""
        reasons += [prefix + reason for reason in missed_thresholds(run, thresholds)]
    _report(runs, loaded.scenario.name if loaded.variants else "", report=report, trace=trace, window=window)
    for reason in reasons:
        print(f"missed: {reason}", file=sys.stderr)
    if reasons:
        raise typer.Exit(1)


def _print(run: Any, name: str, folder: Path) -> None:
    """The table, the place, and on stderr the news."""
    print(f"{run.table()}\n\nrun: {folder}", flush=True)
    for note in run.meta["notes"]:
        if not note.startswith(("unmeasured: ", "guess: ")):  # these are in the report; what was cut is news
            print(f"note: {name}{': ' if name else ''}{note}", file=sys.stderr)


@contextmanager
def _interruptible(folder: Path | None) -> Iterator[None]:
    """Say on Ctrl-C where the variants are that had finished."""
    try:
        yield
    except KeyboardInterrupt:
        if folder is not None:
            print(f"finished variants are in {folder}", file=sys.stderr)
        raise


def save_run(run: Any, folder: Path) -> None:
    """Save the run, or nothing of it; also one without figures is told where it lies."""
    from testbed.metrics.window import EmptyWindow

    try:
        run.save(folder)
    except EmptyWindow:
        print(f"run: {folder}", flush=True)
        if run.meta.get("interrupted"):
            raise KeyboardInterrupt from None
        raise
    except BaseException:  # Ctrl-C, a full disk
        shutil.rmtree(folder)
        raise


def _check_variants(loaded: LoadedScenario, check: Check) -> None:
    """Refuse what cannot run before the first variant has taken its time (a single scenario is refused anyway)."""
    for name, one in loaded.variants.items():
        with options.located(loaded, name):
            check(one)


def _report(
    runs: list[tuple[Path, Any]], compared: str, *, report: bool, trace: bool, window: tuple[int, int] | None
) -> None:
    """The report of each run, the comparison of variants (``compared``: what they are variants of), Perfetto traces."""
    if report:
        from testbed.report import write_report

        for place, run in runs:
            page = write_report(run, place)
        if not compared:
            print(f"report: {page}", flush=True)
    if compared:
        from testbed.study.compare import compare

        comparison = compare([run for _, run in runs])
        print(f"\n{comparison.table()}", flush=True)
        folder = comparison.save(runs[0][0].parent / "comparison")
        if report:
            print(f"report: {write_report(comparison.runs, folder, title=compared)}", flush=True)
    if trace or window:
        for place, run in runs:
            print(options.written_trace(run, place / "trace.pftrace", window), flush=True)
