"""Options that several commands share, and the reading of a scenario with them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from testbed.scenario.errors import InputError
from testbed.scenario.load import LoadedScenario, load_scenario

ScenarioFile = Annotated[Path, typer.Argument(help="The scenario, a YAML file.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field, e.g. engine.loop=normal. May be repeated."),
]
Seed = Annotated[int | None, typer.Option(min=0, help="Replace the scenario's seed.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write; new or empty.")]
Percentiles = Annotated[str | None, typer.Option(metavar="50,99", help="Percentiles of the result table.")]
FailIf = Annotated[
    list[str] | None,
    typer.Option(metavar="'ttft_p99_ms>500'", help="Exit with 1 when this holds. May be repeated."),
]
ShowProgress = Annotated[bool, typer.Option("--progress/--no-progress", help="A progress bar (terminals only).")]
WriteReport = Annotated[bool, typer.Option("--report/--no-report", help="Write report.html.")]
WriteTrace = Annotated[bool, typer.Option("--trace/--no-trace", help="Write trace.pftrace for Perfetto.")]

TraceWindow = Annotated[
    str | None,
    typer.Option(metavar="A:B", help="Trace from second A to second B of the run; default: its first 5,000 steps."),
]


def read_window(text: str | None) -> tuple[int, int] | None:
    """``A:B`` in seconds as nanoseconds; raises InputError for anything else."""
    if text is None:
        return None
    try:
        begin, end = (round(float(part) * 1e9) for part in text.split(":"))
    except (ValueError, OverflowError):
        remedy = "two numbers of seconds, such as --trace-window 10:20"
        raise InputError(f"{text!r} is no window of time", where="--trace-window", remedy=remedy) from None
    return begin, end


def written_trace(run: Any, path: Path, window: tuple[int, int] | None) -> str:
    """Write a Perfetto trace; a line that says where it is and which part of the run it covers."""
    from testbed.report.trace import covered, write_trace

    begin, end, whole = (time / 1e9 for time in covered(run, window))
    return f"trace: {write_trace(run, path, window)} ({begin:.6g} s to {end:.6g} s of a run of {whole:.6g} s)"


def read_scenario(
    path: Path, settings: Sequence[str] | None, seed: int | None = None, percentiles: str | None = None
) -> LoadedScenario:
    """Load the scenario with all options applied; its warnings go to stderr."""
    overrides = list(settings or ())
    if seed is not None:
        overrides.append(f"seed={seed}")
    if percentiles is not None:
        overrides.append(f"percentiles=[{percentiles}]")
    loaded = load_scenario(path, overrides)
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return loaded


@contextmanager
def located(loaded: LoadedScenario, variant: str = "") -> Iterator[None]:
    """Errors that name a field of the scenario leave this block with the file, line and column of that field."""
    try:
        yield
    except InputError as error:
        raise loaded.located(error, variant) from error


def load_runs(folders: Sequence[Path]) -> list[Any]:
    """The runs of run folders; a folder that holds several (a comparison, or a confirmation of variants) gives each of
    them."""
    from testbed.metrics.run import Run

    # A shell's runs/x-1/* names the comparison beside the runs too.
    chosen = [folder for folder in folders if not (folder / "compare.json").is_file()] or folders
    found = [inner for folder in chosen for inner in _run_folders(folder)]
    return [Run.load(folder) for folder in found]


def _run_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError("no such run folder", where=str(folder), remedy="`testbed simulate` writes one below runs/")
    if (folder / "run.json").is_file():
        return [folder]
    inside = sorted(file.parent for depth in ("*", "*/*") for file in folder.glob(f"{depth}/run.json"))
    if not inside:
        remedy = "name a folder that `testbed simulate` or `testbed run` has written"
        raise InputError("is no run folder: there is no run.json in it", where=str(folder), remedy=remedy)
    return inside
