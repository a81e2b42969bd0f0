"""``testbed compare``: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from testbed.cli import options
from testbed.cli.folders import check_output, output_folder
from testbed.scenario.errors import InputError


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of run folders.", show_default=False)],
    output: options.Output = None,
) -> None:
    """Compare runs in one table; with -o also write it, with a report."""
    check_output(output, "name a new folder with -o")
    loaded = options.load_runs(runs)
    if len(loaded) < 2:
        where = " ".join(str(folder) for folder in runs)
        raise InputError("a comparison needs two runs", where=where, remedy="name another run folder")
    from testbed.study import compare as study

    comparison = study.compare(loaded)
    print(comparison.table())
    if output is None:
        return
    from testbed.report import write_report

    folder = output_folder(output, "comparison")
    comparison.save(folder)
    print(f"report: {write_report(loaded, folder)}")
