"""``testbed trace``: what a workload looks like, and public traces to fetch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at a trace, or fetch a public one.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def stats(
    file: Annotated[str, typer.Argument(help="A trace file, or a name under TESTBED_DATA.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Rows, rate, burstiness, lengths and shareable prefixes of a trace."""
    from testbed.workload.traces.reader import find_trace
    from testbed.workload.traces.stats import trace_stats

    figures = trace_stats(find_trace(file, Path()))
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        shown = "  ".join(f"{key} {_number(part)}".strip() for key, part in inner)
        print(f"{name:<20} {shown}")


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Name of the trace; see `testbed presets traces`.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to keep it in; default: TESTBED_DATA or data/traces.")
    ] = None,
) -> None:
    """Fetch a public trace and prove its checksum."""
    from testbed.scenario.paths import trace_folder
    from testbed.workload.traces.known import fetch_trace

    print(fetch_trace(name, output or trace_folder()))


def _number(value: object) -> str:
    """At most four significant digits after the decimal point; never the exponent of a large count."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
