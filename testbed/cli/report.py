"""``testbed report``: the report of a run that was saved before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from testbed.cli import options


def report(
    run: Annotated[Path, typer.Argument(help="A run folder, or a folder of run folders.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write; default: the run's.")] = None,
    trace: options.WriteTrace = False,
    trace_window: options.TraceWindow = None,
) -> None:
    """Write the HTML report of a run, or of all runs in a folder."""
    from testbed.report import write_report

    window = options.read_window(trace_window)
    runs = options.load_runs([run])
    single = (run / "run.json").is_file()
    folder = output or run
    folder.mkdir(parents=True, exist_ok=True)
    print(f"report: {write_report(runs[0] if single else runs, folder)}")
    if trace or window:
        names = ["trace.pftrace"] if single else [f"trace-{number}.pftrace" for number in range(1, len(runs) + 1)]
        for one, name in zip(runs, names, strict=True):
            print(options.written_trace(one, folder / name, window))
