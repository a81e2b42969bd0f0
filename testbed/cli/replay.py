"""``testbed replay``: a recorded run through scheduler and loop again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from testbed.cli import options


def replay(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of run folders.", show_default=False)],
    until_step: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many steps and show what was decided.")
    ] = None,
    own_code: Annotated[
        bool, typer.Option("--own-code", help="Import the loop, strategy or policy that the run names.")
    ] = False,
) -> None:
    """Replay runs: every decision and every record must come out as recorded. Exit with 1 where one does not."""
    from testbed.study.replay import replay as study

    equal = True
    for run in options.load_runs(runs):
        found = study(run, until_step=until_step, own_code=own_code)
        equal &= found.equal
        print(f"{run.folder}: {found.verdict()}")
        if found.divergence is not None or until_step is not None:
            print(found.last.explain())
    if not equal:
        raise typer.Exit(1)
