"""``testbed calibrate``: measure this device and this host, write their profiles."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from testbed.cli import options
from testbed.cli.folders import check_output, output_folder
from testbed.scenario.errors import InputError

if TYPE_CHECKING:
    from testbed.report.calibration import Half
    from testbed.scenario.schema import Scenario
    from testbed.study.calibration.device import DeviceCalibration
    from testbed.study.calibration.host import HostCalibration

MODEL = "qwen3-0.6b"
"""Also the family of the small model that a CPU is calibrated with."""
DEVICE_SHARE = 0.5
"""Of the time, for the device."""
DEVICE_ENGINE = {"chunked_prefill_size": 8192, "context_length": 16_384}
"""What a GPU is measured up to: a scenario's default chunk, and contexts of long prompts."""
NOISY_PERCENT = 15
"""Repeats that differ by more were not measured on a quiet machine."""


def calibrate(
    model: Annotated[str | None, typer.Option(help=f"Default: {MODEL}; on a CPU a small one of its family.")] = None,
    output: Annotated[
        Path | None, typer.Option("--out", "--output", "-o", help="Folder to write; new or empty.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="About how long it may take, loading not counted.")] = 5.0,
    paced: Annotated[bool, typer.Option("--paced", help="Only the host, for runs whose device is modelled.")] = False,
    settings: options.Settings = None,
    seed: options.Seed = None,
    progress: options.ShowProgress = True,
) -> None:
    """Measure this machine's device and host with the engine itself; write profiles that scenarios can name."""
    if not (0 < minutes < math.inf):
        raise InputError(f"{minutes:g} minutes is no time", where="--minutes", remedy="a number above 0")
    for text in settings or ():
        if text.split("=")[0].split(".")[0] in ("workload", "compare", "host", "host_inject", "executor"):
            remedy = "set model, device or engine fields; workloads are its own, and the host is this machine"
            raise InputError("a calibration does not ask for it", where=f"--set {text}", remedy=remedy)
    check_output(output)
    with ExitStack() as stack:
        chosen = model or stack.enter_context(_default_model(paced))
        scenario = _scenario(chosen, settings, seed, paced)
        _check(scenario, paced)
        folder = stack.enter_context(_whole_or_nothing(output))
        until = time.monotonic() + 60 * minutes

        def tell(text: str) -> None:
            if progress and sys.stderr.isatty():
                print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

        device = None
        if not paced:
            from testbed.study.calibration.device import measure_device

            device = measure_device(_for_device(scenario, settings), minutes * DEVICE_SHARE, tell)
            scenario = scenario.model_copy(update={"device": str(device.save(folder))})
        host = _measure_host(scenario, max(until - time.monotonic(), 1.0), paced, tell)
        tell("")
        host.save(folder)
        halves = _halves(device, host)
        _write(folder, halves, host)
    _print(folder, halves, paced)
    if model is None and Path(chosen).is_absolute():
        print(f"The small model is gone; `testbed model init {MODEL} DIR` makes it again (engine.dtype: float32).")


@contextmanager
def _default_model(paced: bool) -> Iterator[str]:
    """The model to calibrate with where none is named."""
    from testbed.engine.device import has_cuda, needs_installing

    if paced or has_cuda():
        yield MODEL
        return
    with needs_installing():
        from testbed.engine.models.create import Sizes, create_model
    with TemporaryDirectory(prefix="testbed-") as folder:
        yield str(create_model(MODEL, Path(folder) / "small", Sizes()))


def _scenario(model: str, settings: list[str] | None, seed: int | None, paced: bool) -> Scenario:
    """What is calibrated; its workload is a placeholder."""
    from testbed.engine.device import has_cuda
    from testbed.scenario.load import load_scenario
    from testbed.study.calibration.workloads import ENGINE

    engine: dict[str, Any] = dict(ENGINE)
    if not paced and not has_cuda():
        engine["dtype"] = "float32"  # what a CPU computes well in
    mapping = {
        "name": "calibration",
        "model": model,
        "engine": engine,
        "workload": {
            "arrivals": {"kind": "all_at_once"},
            "lengths": {"prompt_tokens": 1, "output_tokens": 1},
            "count": 1,
        },
    }
    return load_scenario(mapping, [*(settings or ()), *([] if seed is None else [f"seed={seed}"])]).scenario


def _for_device(scenario: Scenario, settings: list[str] | None) -> Scenario:
    """A GPU is measured for batches as large as scenarios make them by default, where nothing else is set: the host's
    runs want a small chunk, to cut many prompts within seconds."""
    from testbed.engine.device import has_cuda

    asked = {text.partition("=")[0].removeprefix("engine.") for text in settings or ()}
    larger = {name: value for name, value in DEVICE_ENGINE.items() if has_cuda() and name not in asked}
    return scenario.model_copy(update={"engine": scenario.engine.model_copy(update=larger)})


def _check(scenario: Scenario, paced: bool) -> None:
    from testbed import api, deployment

    if paced:
        deployment.build_engine(scenario)
    else:
        api.check_real(scenario)


@contextmanager
def _whole_or_nothing(output: Path | None) -> Iterator[Path]:
    """The folder; when the block fails or is interrupted, it is gone again."""
    folder = output_folder(output, "calibration")
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _measure_host(scenario: Scenario, seconds: float, paced: bool, tell: Any) -> HostCalibration:
    from testbed import api
    from testbed.costs import build_cost_model
    from testbed.engine.device import open_device
    from testbed.study.calibration.host import measure_host

    if paced:
        return measure_host(scenario, seconds, lambda one: api.execute(one, paced=True), tell=tell)
    with open_device(api.check_real(scenario)) as opened:
        cost_model = build_cost_model(scenario)
        return measure_host(
            scenario, seconds, lambda one: api.execute_on(opened, one), cost_model=cost_model, tell=tell
        )


def _halves(device: DeviceCalibration | None, host: HostCalibration) -> list[Half]:
    """What was measured, each half with a note where the machine was not quiet."""
    from testbed.report.calibration import Half

    halves = [Half("host", "host.yaml", host.points, host.errors(), host.notes)]
    if device is not None:
        points = device.points.rename(columns={"operator": "name"})
        halves.insert(0, Half("device", "device.yaml", points, _device_errors(device), device.notes))
    return [replace(half, notes=[*_weather(half.errors), *half.notes]) for half in halves]


def _weather(errors: Any) -> Iterator[str]:
    noise = float(errors["noise_percent"].abs().median())
    if noise > NOISY_PERCENT:
        yield f"measured again, times differ by {noise:.0f} % (median): something else runs here; calibrate again"


def _write(folder: Path, halves: list[Half], host: HostCalibration) -> None:
    """``calibration.json`` and the page."""
    from testbed.metrics.files import write_json
    from testbed.report.calibration import write_calibration

    provenance = {"command": " ".join(sys.argv), "host": host.where, **host.provenance()}
    content = {"format": 1, "provenance": provenance}
    for half in halves:
        content[half.name] = {"errors": half.errors.to_dict("records"), "notes": list(half.notes)}
    write_json(content, folder / "calibration.json")
    write_calibration(halves, provenance, folder)


def _device_errors(device: DeviceCalibration) -> Any:
    """The device's held-out errors in the host's form: percent, and the operator as a column."""
    errors = device.errors()
    shares = {"mean": "mean_error_percent", "p90": "p90_error_percent", "signed": "signed_percent"}
    table = errors.assign(**{name: 100 * errors[name] for name in (*shares, "noise")})
    return table.rename(columns={**shares, "noise": "noise_percent"}).rename_axis("operator").reset_index()


def _print(folder: Path, halves: list[Half], paced: bool) -> None:
    for half in halves:
        heads = {column: str(column).replace("_percent", "_%") for column in half.errors}
        table = half.errors.rename(columns=heads).round(2).to_string(index=False)
        print(f"{half.name}: errors on what was held out\n{table}\n")
        for note in half.notes:
            print(f"note: {half.name}: {note}", file=sys.stderr)
    print(f"In a scenario on this machine{' (paced runs)' if paced else ''}:")
    for half in halves:
        print(f"  {half.name}: {folder / half.file}")
    print(f"\nreport: {folder / 'calibration.html'}", flush=True)
