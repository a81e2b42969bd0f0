"""The ``testbed`` command: its subcommands, and what each way of ending means to a shell.

Exit status: 0 done; 1 a threshold (``slo``, ``--fail-if``) was missed; 2 the input is wrong; 3 an internal error, with
a report file; 130 interrupted; 141 nobody reads the output any more.
"""

from __future__ import annotations

import os
import platform
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import testbed
from testbed.cli import (
    bench,
    calibrate,
    compare,
    confirm,
    model,
    presets,
    replay,
    report,
    run,
    serve,
    simulate,
    trace,
    validate,
)
from testbed.scenario.errors import InputError

OK, MISSED, WRONG_INPUT, INTERNAL, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 130, 141

app = typer.Typer(
    name="testbed",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"testbed {testbed.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Try LLM-serving strategies in virtual time; confirm them on a GPU."""


for _command in (
    simulate.simulate,
    run.run,
    validate.validate,
    calibrate.calibrate,
    compare.compare,
    confirm.confirm,
    replay.replay,
    serve.serve,
    bench.bench,
    report.report,
    presets.presets,
):
    app.command()(_command)
app.add_typer(model.app, name="model")
app.add_typer(trace.app, name="trace")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with its exit status."""
    status = invoke(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt
    raise SystemExit(status)


def invoke(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit status (see the module) and never raises."""
    try:
        app(args=list(arguments), prog_name="testbed")
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):
            return BROKEN_PIPE
        if ended.code == INTERRUPTED:  # typer's own answer to Ctrl-C
            print("interrupted", file=sys.stderr)
        return _flushed(ended.code if isinstance(ended.code, int) else OK)
    except InputError as error:
        for one in error.errors:
            print(f"error: {one}".replace(f"{Path.cwd()}{os.sep}", ""), file=sys.stderr)
        return WRONG_INPUT
    except BrokenPipeError:
        return _flushed(BROKEN_PIPE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        file = _error_report(arguments, error)
        print(f"internal error: {type(error).__name__}: {error}\n  details are in {file}", file=sys.stderr)
        return INTERNAL
    return OK


def _flushed(status: int) -> int:
    """``status``, once all output has left: a closed pipe would otherwise complain while Python shuts down."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return status


def _error_report(arguments: Sequence[str], error: Exception) -> Path:
    """Write what a developer needs to know: here or, where that is forbidden, in the temporary folder."""
    text = "\n".join(
        [
            f"command: testbed {shlex.join(arguments)}",
            f"python: {platform.python_version()} on {platform.platform()}",
            "",
            *traceback.format_exception(error),
        ]
    )
    for folder in (Path.cwd(), Path(tempfile.gettempdir())):
        try:
            handle, name = tempfile.mkstemp(prefix="testbed-error-", suffix=".txt", dir=folder, text=True)
        except OSError:
            continue
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        return Path(name)
    return Path(os.devnull)


if __name__ == "__main__":
    main()
