"""``python -m tests.fidelity paced|cpu|gpu``: calibrate, simulate and run every case, keep results, write the page.

``gpu`` judges both models, each with our own host and with SGLang's injected, within ten minutes; ``--budget`` says
otherwise. Profiles that were calibrated are kept under ``profiles/`` beside the page.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from testbed import api
from testbed.cli.main import invoke
from testbed.engine.device import has_cuda, open_device, processor_name
from testbed.metrics.run import Run
from testbed.scenario.schema import Scenario
from tests.fidelity import page
from tests.fidelity.cases import Target, cases_of
from tests.fidelity.judge import REPEATS, judge, plain
from tests.laws.page import commit

CONTEXT, KV_TOKENS, CHUNK, ROWS = 4_096, 49_152, 512, 256
ENGINE = {
    "kv_tokens": KV_TOKENS,
    "context_length": CONTEXT,
    "chunked_prefill_size": CHUNK,
    "max_running_requests": ROWS,
}
GPU_MODELS = ("qwen3-0.6b", "llama-3.1-8b")
GPU_CASES = ("light", "busy", "saturated", "prefixes", "closed", "strategies")
"""Of the second host, and of the larger model, where time is short."""


@contextmanager
def paced() -> Iterator[Target]:
    """A small model on a modelled H100, whose steps are short enough for the host to matter."""
    yield Target("paced", GPU_MODELS[0], 64, ENGINE, seconds=6.0)


@contextmanager
def cpu(preset: str = GPU_MODELS[0]) -> Iterator[Target]:
    """The engine on the cores of this machine, with a small model of a preset's family."""
    from testbed.engine.models.create import Sizes, create_model

    with TemporaryDirectory(prefix="testbed-") as folder:
        model = create_model(preset, Path(folder) / "small", Sizes())
        yield Target("cpu", str(model), 32, {**ENGINE, "dtype": "float32"}, seconds=6.0)


@contextmanager
def gpu(model: str) -> Iterator[Target]:
    """The engine on CUDA; without one a small model on the CPU, to see that all of it works."""
    engine = {**ENGINE, "page_size": 16, "cuda_graph_max_bs": ROWS}
    if has_cuda():
        yield Target(f"gpu-{model}", model, 64, engine, seconds=2.0)
        return
    with cpu(model) as small:
        yield replace(small, name=f"gpu-{model}", engine={**engine, "dtype": "float32"}, seconds=0.3)


def calibrated(target: Target, minutes: float, folder: Path) -> Target:
    """The target with profiles of this machine, which are kept in ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = [f"engine.{name}={value}" for name, value in target.engine.items()]
    command = ["calibrate", "--model", target.model, "--minutes", f"{minutes:g}", "--out", str(folder), "--no-progress"]
    command += [part for setting in settings for part in ("--set", setting)]
    if status := invoke([*command, *(["--paced"] if target.name == "paced" else [])]):
        raise SystemExit(status)
    for name in ("calibration.html", "figures"):  # the page is large, and made again by the command
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    device = target.device if target.name == "paced" else str(folder / "device.yaml")
    return replace(target, device=device, host=str(folder / "host.yaml"))


@contextmanager
def executing(target: Target) -> Iterator[Callable[[Scenario], Run]]:
    """What runs a scenario of the target; a device is opened once."""
    if target.name == "paced":
        yield lambda one: api.execute(one, paced=True)
        return
    first = next(iter(cases_of(target)[0].scenarios(target).values()))
    with open_device(api.check_real(first)) as opened:
        yield lambda one: api.execute_on(opened, one)


def measure(target: Target, folder: Path, source: dict[str, Any]) -> None:
    """Judge a target; results are written case by case, so that what was measured stays."""
    judged: list[Any] = []
    ranked: list[Any] = []
    with executing(target) as execute:
        for more, order in judge(target, execute):
            judged += more
            ranked += order
            page.keep(target.name, {"source": source, **plain(judged, ranked)}, folder)
            print(f"{target.name} {more[0].case}: " + "; ".join(one.summary() for one in more), flush=True)


def source_of(target: Target, minutes: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Where results came from."""
    return {
        "command": f"`python -m tests.fidelity {arguments.kind}`",
        "commit": arguments.commit or commit(),
        "seed": target.seed,
        "machine": processor_name(),
        "model": Path(target.model).name,
        "device": target.device if target.name == "paced" else "this machine's, calibrated",
        "host": f"calibrated in {minutes:g} minutes"
        + (f"; injected: {target.host_inject}" if target.host_inject else ""),
        "runs": f"requests are sent for {target.seconds:g} s; {REPEATS} real runs of each variant",
        "priority": "ordinary" if os.sched_getscheduler(0) == os.SCHED_OTHER else "real-time: others use the cores",
        "date": datetime.now(UTC).date().isoformat(),
    }


def on_gpu(arguments: argparse.Namespace) -> None:
    """Both models and both hosts, the most telling first, as long as the time allows."""
    until = monotonic() + arguments.budget
    for place, model in enumerate(GPU_MODELS if has_cuda() else GPU_MODELS[:1]):
        with gpu(model) as target:
            minutes = min(arguments.minutes, 1.5 if has_cuda() else 0.1)
            own = calibrated(target, minutes, arguments.folder / "profiles" / target.name)
            left = (until - monotonic()) / (2 * (len(GPU_MODELS) - place))
            for one in (own, replace(own, name=f"{own.name}-as-sglang", host="sglang-0.5", host_inject="sglang-0.5")):
                short = place > 0 or one is not own
                chosen = replace(one, cases=GPU_CASES if short else (), seconds=_seconds(one, left, short))
                chosen = chosen if has_cuda() else replace(chosen, cases=GPU_CASES[:1])
                measure(chosen, arguments.folder, source_of(chosen, minutes, arguments))


def _seconds(target: Target, left_s: float, short: bool) -> float:
    """How long each run may send for the cases to fit: a run takes about half as long again as it sends."""
    chosen = cases_of(replace(target, cases=GPU_CASES if short else ()))
    runs = REPEATS * sum(len(case.variants) for case in chosen)
    return round(max(0.5, min(target.seconds, left_s / runs / 1.5)), 1)


def main() -> int:
    """Parse the command line; returns 0 where the bars of the page hold, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.fidelity", description="Judge simulation by life.")
    parser.add_argument("kind", choices=["paced", "cpu", "gpu"])
    parser.add_argument("--minutes", type=float, default=4.0, help="for calibration (4; on a GPU at most 1.5 a model)")
    parser.add_argument("--seconds", type=float, help="how long requests are sent in one run (6)")
    parser.add_argument("--budget", type=float, default=560, help="gpu: seconds for all of it (560)")
    parser.add_argument("--cases", nargs="*", default=[], help="only these")
    parser.add_argument("--folder", type=Path, default=page.FOLDER)
    parser.add_argument("--commit", help="what the page names where the tree is a copy without its history")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        if arguments.kind == "gpu":
            if not has_cuda():
                print("no GPU: small models on the CPU show that the parts work; nothing is measured or kept")
                arguments.folder = Path(stack.enter_context(TemporaryDirectory()))
            on_gpu(arguments)
        else:
            with {"paced": paced, "cpu": cpu}[arguments.kind]() as target:
                chosen = replace(target, cases=tuple(arguments.cases), seconds=arguments.seconds or target.seconds)
                ready = calibrated(chosen, arguments.minutes, arguments.folder / "profiles" / target.name)
                measure(ready, arguments.folder, source_of(ready, arguments.minutes, arguments))
        print(page.summary(arguments.folder, arguments.kind))
        return 0 if page.holds(arguments.folder, arguments.kind) else 1


if __name__ == "__main__":
    sys.exit(main())
