"""``testbed bench``: a server under the load of a scenario."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from testbed.cli import options
from testbed.cli.progress import Progress
from testbed.cli.simulate import run_scenario
from testbed.cli.thresholds import read_threshold
from testbed.scenario.errors import InputError

if TYPE_CHECKING:
    from testbed.scenario.schema import Scenario

SENT = {"name", "workload", "seed", "measure", "slo", "percentiles", "compare"}
"""Fields that matter to a client; the others describe the server."""


def bench(
    url: Annotated[str, typer.Argument(help="An OpenAI-compatible server: http://HOST:PORT.", show_default=False)],
    scenario: options.ScenarioFile,
    settings: options.Settings = None,
    output: options.Output = None,
    seed: options.Seed = None,
    percentiles: options.Percentiles = None,
    fail_if: options.FailIf = None,
    model: Annotated[str, typer.Option(help="The model's name on the server; default: the first it lists.")] = "",
    api_key: Annotated[
        str, typer.Option(help="Sent as bearer token.", envvar="OPENAI_API_KEY", show_envvar=True, show_default=False)
    ] = "",
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Send text, made with this tokenizer, instead of token ids.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat endpoint; needs --tokenizer.")] = False,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds after which a request is given up.")] = 1800.0,
    report: options.WriteReport = True,
    trace: options.WriteTrace = False,
    trace_window: options.TraceWindow = None,
    progress: options.ShowProgress = True,
) -> None:
    """Send a scenario's workload to a server; print the result, write a run folder."""
    thresholds = [read_threshold(text) for text in fail_if or ()]
    window = options.read_window(trace_window)
    loaded = options.read_scenario(scenario, settings, seed, percentiles)
    from testbed.study.bench import Server
    from testbed.study.bench.client import bench as drive
    from testbed.study.bench.client import check_bench

    server = Server(url, model, api_key, tokenizer, chat, timeout)

    def check(one: Scenario) -> None:
        check_bench(one)
        if one.model_dump(exclude=SENT) != loaded.scenario.model_dump(exclude=SENT):
            remedy = "compare workloads; start a server for each engine, bench each, then `testbed compare` the runs"
            raise InputError("variants of the engine do not reach the server", where="compare", remedy=remedy)

    def execute(one: Scenario, tick: Progress | None) -> Any:
        return drive(server, one, progress=tick)

    run_scenario(
        loaded, check, execute, output, thresholds, report=report, trace=trace, window=window, progress=progress
    )
