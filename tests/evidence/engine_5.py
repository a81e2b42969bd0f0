"""``testbed run`` on the CPU with a tiny model ends the quickstart scenario; Ctrl-C ends it with the records so far.

The command runs as a terminal runs it, from the model's making to the report. Its folders are read again: every request
served, real, the laws of the records held, nothing called simulated. Then it is started once more, for real and over
the modelled device, and interrupted when the progress bar shows that some requests have ended. At smoke size the
scenario has 40 requests.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from testbed import Run
from testbed.cli.main import INTERRUPTED, OK
from testbed.metrics.laws import violations
from tests.cli.terminal import Command, is_alive
from tests.evidence.evidence import Evidence
from tests.laws.page import ROOT

SCENARIO = str(ROOT / "scenarios" / "default.yaml")
MODEL = ("llama-3.1-8b", "tiny", "--layers", "2", "--hidden", "64")
SMALL = ("--set", "workload.count=40", "--set", "workload.rate_scale=8")
SOME_FINISHED = r"[1-9][\d,]* of [\d,]+ finished"
PATIENCE_S = 5400.0


def check(smoke: bool) -> Evidence:
    """Run it to the end, then interrupt it twice."""
    size = SMALL if smoke else ()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with Command("model", "init", *MODEL, cwd=place) as command:
            made = command.ended().status == OK
        served, details, wrong = _finished(place, size)
        for name, options in (("real", ()), ("paced", ("--paced", "--set", "engine.kv_tokens=100000"))):
            ended_s, broken = _interrupted(place, name, options)
            details.append(f"Ctrl-C, {name}: ended after {ended_s:.1f} s")
            wrong += broken
    return Evidence(
        figure=f"{served} requests served in two variants; {len(wrong)} objections, Ctrl-C included",
        bar="all served, records sound, status 130 with the records so far, no process left",
        passed=made and not wrong,
        details=(*wrong, *details),
    )


def _finished(place: Path, size: tuple[str, ...]) -> tuple[int, list[str], list[str]]:
    """Requests served, figures to show, objections."""
    with Command("run", SCENARIO, "--set", "model=tiny", *size, "-o", "whole", cwd=place) as command:
        ended = command.ended(PATIENCE_S)
    if ended.status != OK:
        return 0, [], [f"status {ended.status}: {ended.stderr[-2000:]}"]
    served, details, wrong = 0, [], []
    for name in ("normal", "overlap"):
        run = Run.load(place / "whole" / name)
        done = (np.asarray(run.records.requests["finish_ns"]) >= 0).sum()
        served += int(done)
        page = (place / "whole" / name / "report.html").read_text(encoding="utf-8")
        wrong += [f"{name}: {law}" for law in violations(run.records)]
        if run.meta["label"] != "real" or "simulated" in page or done != run.scenario["workload"]["count"]:
            wrong.append(f"{name}: {run.meta['label']}, {done} served, simulated: {'simulated' in page}")
        figures = run.aggregates()
        details.append(
            f"{name}: {figures['duration']:.0f} s, {len(run.records.steps['step'])} steps, {run.meta['device']}, "
            f"busy {figures['device_busy_percent']:.0f} %, host {figures['bubble_host_percent']:.1f} %"
        )
    if not (place / "whole" / "comparison" / "report.html").is_file():
        wrong.append("no comparison was written")
    return served, details, wrong


def _interrupted(place: Path, name: str, options: tuple[str, ...]) -> tuple[float, list[str]]:
    """Seconds from Ctrl-C to the end, objections."""
    folder = place / f"cut-{name}"
    with Command("run", SCENARIO, "--set", "model=tiny", *options, "-o", folder.name, cwd=place) as command:
        command.wait_for(SOME_FINISHED)
        begin_s = time.monotonic()
        command.interrupt()
        ended = command.ended()
        ended_s = time.monotonic() - begin_s
    wrong = [f"process {pid} is left" for pid in command.workers_seen if is_alive(pid)]
    if ended.status != INTERRUPTED or "Traceback" in ended.stderr or "Serving Benchmark Result" not in ended.stdout:
        return ended_s, [*wrong, f"status {ended.status}: {ended.stderr[-2000:]}"]
    if [path.name for path in folder.iterdir()] != ["normal"]:
        wrong.append("not the interrupted variant alone was saved")
    run = Run.load(folder / "normal")
    finish = np.asarray(run.records.requests["finish_ns"])
    if not (0 < (finish >= 0).sum() < run.scenario["workload"]["count"] and run.meta["interrupted"]):
        wrong.append(f"{(finish >= 0).sum()} requests ended; notes: {run.meta['notes']}")
    return ended_s, [f"{name}: {objection}" for objection in (*wrong, *violations(run.records))]
