"""``testbed confirm``: a scenario simulated and run, joined."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from testbed.cli import options
from testbed.cli.folders import check_output, output_folder
from testbed.cli.progress import progress_bar
from testbed.cli.simulate import save_run
from testbed.cli.thresholds import Threshold, read_threshold
from testbed.scenario.errors import InputError

if TYPE_CHECKING:
    from testbed.scenario.load import LoadedScenario
    from testbed.scenario.schema import Scenario
    from testbed.study.confirm.run import Confirmation

_OPTION = "--fail-if-error"


def confirm(
    scenario: options.ScenarioFile,
    settings: options.Settings = None,
    output: options.Output = None,
    paced: Annotated[bool, typer.Option("--paced", help="The cost model takes real time; no GPU is used.")] = False,
    repeats: Annotated[int, typer.Option(min=2, help="Real runs of each variant; they tell the noise.")] = 2,
    seed: options.Seed = None,
    fail_if_error: Annotated[
        list[str] | None,
        typer.Option(_OPTION, metavar="'tpot>5'", help="Exit with 1 when an error in percent does. May be repeated."),
    ] = None,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write confirm.html.")] = True,
    progress: options.ShowProgress = True,
) -> None:
    """Simulate and run a scenario in one go, join the two, and say where and why they differ."""
    thresholds = [read_threshold(text, _OPTION) for text in fail_if_error or ()]
    check_output(output)
    loaded = options.read_scenario(scenario, settings, seed)
    variants = loaded.variants or {loaded.scenario.name: loaded.scenario}
    _check(loaded, variants, thresholds, paced)
    found, folder = _confirm(loaded, variants, output, paced, repeats, progress)
    from testbed.study.confirm.text import table

    print(f"{table(found)}\n\nruns: {folder}\nfindings: {found.save(folder)}", flush=True)
    if report:
        from testbed.report.confirm import write_confirmation

        sides = {one.name: (one.simulated, one.real) for one in found.variants}
        page = write_confirmation(found.content(), sides, {one.name: one.steps for one in found.variants}, folder)
        print(f"report: {page}", flush=True)
    missed = [reason for threshold in thresholds if (reason := threshold.missed(_figures(found.worst_errors())))]
    for reason in missed:
        print(f"missed: {reason}", file=sys.stderr)
    if missed:
        raise typer.Exit(1)


def _check(loaded: LoadedScenario, variants: Mapping[str, Scenario], thresholds: list[Threshold], paced: bool) -> None:
    """Refuse what cannot run or be judged before anything has taken its time."""
    from testbed import api, deployment
    from testbed.study.confirm.errors import FIGURES

    for threshold in thresholds:
        threshold.missed(_figures(dict.fromkeys(FIGURES, 0.0)))

    def check(one: Scenario) -> None:
        if not paced and one.executor == "simulated":
            remedy = "use executor: real or paced, or the option --paced"
            raise InputError("there is nothing real to confirm a simulation with", where="executor", remedy=remedy)
        if paced or one.executor == "paced":
            deployment.build_engine(one)
        else:
            api.check_real(one)

    for name, one in variants.items():
        with options.located(loaded, name):
            check(one)


def _confirm(
    loaded: LoadedScenario,
    variants: Mapping[str, Scenario],
    output: Path | None,
    paced: bool,
    repeats: int,
    progress: bool,
) -> tuple[Confirmation, Path]:
    """Run everything, and save each run as it ends; returns what was found and where the runs are."""
    from testbed import api
    from testbed.study.confirm.run import RealRuns
    from testbed.study.confirm.run import confirm as study

    folder: Path | None = None

    def simulate(name: str, one: Scenario) -> Any:
        with options.located(loaded, name), progress_bar(f"{one.name}, simulated", progress) as tick:
            return api.simulate(one, progress=tick)

    def execute(name: str, one: Scenario) -> Any:
        modelled = paced or one.executor == "paced"
        with options.located(loaded, name), progress_bar(f"{one.name}, for real", progress) as tick:
            return api.execute(one, paced=True, progress=tick) if modelled else device.execute(one, tick)

    def keep(name: str, label: str, run: Any) -> None:
        nonlocal folder
        folder = folder or output_folder(output, loaded.scenario.name)  # not before there is something to put in
        with options.located(loaded, name):
            save_run(run, folder / (name if loaded.variants else "") / label)
        if run.meta.get("interrupted"):
            print(f"what had run is in {folder}", file=sys.stderr)
            raise KeyboardInterrupt

    with RealRuns() as device:
        found = study(
            loaded.scenario.name,
            variants,
            execute,
            simulate=simulate,
            repeats=repeats,
            keep=keep,
        )
    assert folder is not None
    return found, folder


def _figures(errors: Mapping[str, float]) -> dict[str, float]:
    """Errors by their keys, and those of the means by the short name of the latency; ``throughput`` is of output."""
    from testbed.metrics.aggregate import LATENCIES

    short = {name: errors[f"mean_{name}_ms"] for name in LATENCIES}
    return {**errors, **short, "throughput": errors["output_throughput"]}
