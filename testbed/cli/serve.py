"""``testbed serve``: an engine behind an OpenAI-compatible HTTP server."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from testbed.cli import options
from testbed.cli.folders import check_output, output_folder
from testbed.scenario.errors import InputError


class Backend(StrEnum):
    """What computes."""

    REAL = "real"
    PACED = "paced"


Keyed = typer.Option(envvar="TESTBED_API_KEY", show_envvar=True, help="Clients must send it.", show_default=False)
AdminKeyed = typer.Option(
    envvar="TESTBED_ADMIN_KEY", show_envvar=True, help="Opens the administrator's addresses.", show_default=False
)
MANY = typer.Option("--limit", metavar="NAME=NUMBER", help="What a request may ask for, e.g. n=8. May be repeated.")

RECORD = typer.Option(
    "--record",
    "-o",
    metavar="FOLDER",
    help="Keep every request, step and message, and write a run folder at the end; new or empty.",
    show_default=False,
)

NEEDED = ("fastapi", "httptools", "llguidance", "prometheus_client", "tokenizers", "uvicorn", "uvloop", "zmq")
"""What the parts of a server import that the extra ``serve`` installs."""


def serve(
    model: Annotated[
        str | None, typer.Option(help="A preset or a model folder; default: a tiny model.", show_default=False)
    ] = None,
    backend: Annotated[
        Backend, typer.Option(help="This machine's device, or the cost model in real time.")
    ] = Backend.REAL,
    device: Annotated[str | None, typer.Option(help="Of a paced server: a device profile.")] = None,
    host_profile: Annotated[
        str | None, typer.Option(help="Spend this host's times in the loop, where they are longer than ours.")
    ] = None,
    settings: options.Settings = None,
    tokenizer: Annotated[str | None, typer.Option(help="A folder; default: the model's, or our own.")] = None,
    output_tokens: Annotated[
        str | None, typer.Option(metavar="LENGTHS", help="Of a paced server: where requests end that heed EOS.")
    ] = None,
    served_model_name: Annotated[list[str] | None, typer.Option(help="What clients call the model.")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 30000,
    workers: Annotated[int, typer.Option(min=1, max=64, help="HTTP processes.")] = 1,
    api_key: Annotated[str, Keyed] = "",
    admin_key: Annotated[str, AdminKeyed] = "",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    max_queued: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are turned away.")] = 1024,
    connections: Annotated[int, typer.Option(min=1, help="Open connections.")] = 4096,
    drain_s: Annotated[float, typer.Option(min=0, help="For running requests, when told to end.")] = 30.0,
    header_s: Annotated[float, typer.Option(min=0.1, help="For the head of a request.")] = 10.0,
    body_s: Annotated[float, typer.Option(min=0.1, help="For its body.")] = 30.0,
    idle_s: Annotated[float, typer.Option(min=0.1, help="For the next request on a connection.")] = 30.0,
    write_s: Annotated[float, typer.Option(min=0.1, help="For a client to take what is sent.")] = 30.0,
    answer_s: Annotated[float, typer.Option(min=0.1, help="For the engine's answer to /health_generate.")] = 10.0,
    header_bytes: Annotated[int, typer.Option(min=1024, help="Of a request's head.")] = 64 << 10,
    limit: Annotated[list[str] | None, MANY] = None,
    record: Annotated[Path | None, RECORD] = None,
) -> None:
    """Serve a model to OpenAI's and SGLang's clients; Ctrl-C or SIGTERM lets running requests end first."""
    _check_installed()
    from testbed.server import launch
    from testbed.server import options as serving

    _check_modelled(backend, {"--device": device, "--output-tokens": output_tokens})
    shorthands = {"device": device, "host_inject": host_profile, "workload.lengths.output_tokens": output_tokens}
    given = [f"{field}={value}" for field, value in shorthands.items() if value is not None]
    loaded = serving.load_serving(model, backend.value, [*given, *(settings or ()), f"seed={seed}"])
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    scenario = loaded.scenario
    tiny = model is None and backend is Backend.REAL
    chosen = serving.ServeOptions(
        scenario=serving.encoded(scenario),
        backend=backend.value,
        tiny=tiny,
        tokenizer=str(serving.find_tokenizer(scenario.model, tokenizer)),
        names=tuple(served_model_name or [serving.TINY if tiny else Path(scenario.model).name]),
        host=host,
        port=port,
        workers=workers,
        api_key=api_key,
        admin_key=admin_key,
        max_queued=max_queued,
        connections=connections,
        header_bytes=header_bytes,
        waits=serving.Waits(header_s, body_s, idle_s, write_s, answer_s, drain_s),
        limits=serving.read_limits(limit or ()),
        record=_made(record),
        command=_without_keys(sys.argv, (api_key, admin_key)),
    )
    status = launch.serve(chosen, lambda line: print(line, flush=True))
    if status:
        raise typer.Exit(status)


def _check_modelled(backend: Backend, options: Mapping[str, str | None]) -> None:
    """Raises InputError for options that would mean nothing to a real device."""
    for name, value in options.items():
        if value is not None and backend is Backend.REAL:
            remedy = "add --backend paced, or leave it out"
            raise InputError("is an option of modelled devices", where=name, remedy=remedy)


def _made(record: Path | None) -> str:
    """The folder, made now: not only once there is something to lose. Raises InputError."""
    check_output(record, "name a new folder with --record")
    return "" if record is None else str(output_folder(record, "serve").resolve())


def _without_keys(arguments: Sequence[str], keys: Sequence[str]) -> str:
    command = " ".join(arguments)
    for key in filter(None, keys):
        command = command.replace(key, "***")
    return command


def _check_installed() -> None:
    """Raises InputError where a part of the server could not be loaded: only its own process would see that."""
    for name in NEEDED:
        if find_spec(name) is None:
            message = f"serving needs {name}, which is not installed"
            raise InputError(message, where="serve", remedy="pip install 'testbed[serve]'")
