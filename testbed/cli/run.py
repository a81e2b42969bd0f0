"""``testbed run``: a scenario on the wall clock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from testbed.cli import options
from testbed.cli.progress import Progress
from testbed.cli.simulate import run_scenario
from testbed.cli.thresholds import read_threshold

if TYPE_CHECKING:
    from testbed.scenario.schema import Scenario


def run(
    scenario: options.ScenarioFile,
    settings: options.Settings = None,
    output: options.Output = None,
    paced: Annotated[bool, typer.Option("--paced", help="The cost model takes real time; no GPU is used.")] = False,
    seed: options.Seed = None,
    percentiles: options.Percentiles = None,
    fail_if: options.FailIf = None,
    report: options.WriteReport = True,
    trace: options.WriteTrace = False,
    trace_window: options.TraceWindow = None,
    progress: options.ShowProgress = True,
) -> None:
    """Run a scenario on this machine, or on what its field executor names; print the result, write a run folder."""
    thresholds = [read_threshold(text) for text in fail_if or ()]
    window = options.read_window(trace_window)
    loaded = options.read_scenario(scenario, settings, seed, percentiles)

    def check(one: Scenario) -> None:
        from testbed import api, deployment

        if one.executor == "real" and not paced:
            api.check_real(one)
        else:
            deployment.build_engines(one)

    def execute(one: Scenario, tick: Progress | None) -> Any:
        from testbed import api

        return api.execute(one, paced=paced, progress=tick)

    run_scenario(
        loaded, check, execute, output, thresholds, report=report, trace=trace, window=window, progress=progress
    )
