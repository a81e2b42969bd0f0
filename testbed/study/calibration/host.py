"""The host half of a calibration: short runs of the loop on this machine, and what each of its stages costs.

A run on the wall clock says how long every charge of a stage took (its host spans), its replay what was charged. The
join of the two is the data; ``lines`` draws one through each stage, apart for steps that only decode and for those
that admit or prefill, in the form of ``testbed.costs.host``. Every workload runs three times under both loops: once to
fit, once with another seed to judge (held out), once again as it was (the noise floor).

* *Warm-up* is left out: the first ``WARM_STEPS`` steps of a run touch memory for the first time, and take milliseconds.
* *The garbage collector* runs as it does in any run; what it costs is in the lines (small) and their tails (large).
* *WAIT* is what passes between the device's end and the loop's going on; the device's time is not in it.
* *Idle*: a wake-up that comes late is in no span, and RECEIVE after a sleep is not told apart: it has less to do (no
  ends to send) with colder caches, and the two about cancel. ``sparse`` is among the workloads, so the mean is fair.
* *Launches* on a real device are told by what is launched (``launch`` of the profile: a graph, or so many kernels); one
  model's graphs all have the same kernels, so their share cannot be told from the fixed part, and stays in it. A paced
  device launches nothing: what pricing a step takes there is the LAUNCH stage.
* Caches are colder the longer the loop waited for the device: a profile holds for steps of about the length that it was
  calibrated with.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from ruamel.yaml import YAML

import testbed
from testbed.costs import CostModel, load_device
from testbed.costs.host import Terms
from testbed.engine.device import processor_name
from testbed.metrics.columns import ints
from testbed.metrics.files import plain
from testbed.metrics.run import Run
from testbed.ports import Stage
from testbed.runtime.replay import WORK_COLUMNS
from testbed.scenario.models import load_model
from testbed.scenario.schema import Scenario
from testbed.scenario.workload import WorkloadConfig
from testbed.study.calibration.lines import Floats, fit_line, tail_mean, terms_that_pay
from testbed.study.calibration.workloads import LOOPS, host_workloads
from testbed.study.replay import replay

WARM_STEPS = 10
FIT, HELD_OUT, AGAIN = "fit", "held out", "again"
PARTS = (FIT, HELD_OUT, AGAIN)
KINDS = [
    *((stage, "decode") for stage in Stage),
    *((stage, "prefill") for stage in (Stage.RECEIVE, Stage.SCHEDULE, Stage.PREPARE, Stage.LAUNCH, Stage.PROCESS)),
]
"""What is fitted apart (PROCESS: steps that end requests); the other stages are not told the kind of their step."""
REFERENCE_US = 57.0
"""1,000 dictionary increments on the core that host profiles are stated for (host_times.md, section 2)."""
OVERHEAD_S = 0.4
"""Of a run: it is built, drained and replayed."""
LEAST_S = 0.02
"""Of sending requests in a run."""
CONTEXT, MOST_CONTEXT = 2048, 4096
"""Tokens that lengths follow from: where the engine names no context, and at most. Longer requests would outlast their
runs, and few would fit into the pool together."""

Execute = Callable[[Scenario], Run]
Tell = Callable[[str], None]


class Line(NamedTuple):
    """What a stage costs in one kind of step."""

    stage: Stage
    kind: str
    """``decode``, or ``prefill``: a step that admits or prefills."""
    terms: Terms
    """ns; the tail's mean is part of ``fixed``."""
    tail: float
    """That mean, ns."""
    charges: int
    """How many it was fitted to."""


class Launches(NamedTuple):
    """What giving work to a real device costs the host, ns."""

    graph: float = 0.0
    eager_per_kernel: float = 0.0


@dataclass(frozen=True)
class HostCalibration:
    """A host that was measured."""

    lines: tuple[Line, ...]
    launches: Launches
    charges: pd.DataFrame
    """One row a charge: ``stage``, ``kind``, ``rows`` ... ``matched_tokens``, ``measured_ns``, ``predicted_ns``,
    ``workload``, ``loop``, ``part``."""
    reference_us: float
    """1,000 dictionary increments on this core."""
    where: str
    """What was calibrated: model, device, kind of run."""
    date: str
    notes: tuple[str, ...] = ()

    @property
    def points(self) -> pd.DataFrame:
        """For plots, in the order of ``errors``: ``name``, ``measured_ns``, ``predicted_ns``, ``held_out``."""
        some = pd.concat([self._charges_of(line) for line in self.lines])
        some = some[some.part != AGAIN]
        return pd.DataFrame(
            {
                "name": some.stage + ", " + some.kind,
                "measured_ns": some.measured_ns,
                "predicted_ns": some.predicted_ns,
                "held_out": some.part == HELD_OUT,
            }
        )

    def errors(self) -> pd.DataFrame:
        """By stage and kind, and ``all`` of them, on the held-out runs: ``charges``, ``mean_us``, ``sum_error_percent``
        (signed: predicted less measured, over measured), ``mean_error_percent`` (mean of the absolute errors over the
        mean), ``p90_error_percent`` (of the absolute relative errors), ``tail_percent`` (what the tail took beyond the
        line, of the measured time), ``noise_percent`` (the mean of the same workloads run again, against the first)."""
        groups = {(line.stage.name.lower(), line.kind): self._charges_of(line) for line in self.lines}
        groups["all", ""] = self.charges
        return pd.DataFrame(
            [{"stage": stage, "kind": kind, **_errors(group)} for (stage, kind), group in groups.items()]
        )

    def _charges_of(self, line: Line) -> pd.DataFrame:
        return self.charges[self.charges.stage.eq(line.stage.name.lower()) & self.charges.kind.eq(line.kind)]

    def mapping(self) -> dict[str, Any]:
        """The profile as ``load_host`` reads it."""
        speed = round(self.reference_us / REFERENCE_US, 4)
        errors = self.errors().round(2).to_dict("records")
        return {
            "name": "calibrated",
            "source": f"testbed calibrate on {processor_name()}: {self.where}",
            "at_cpu_speed": speed,
            "stages": self._stages(),
            "launch": {
                "graph_us": _parameter(self.launches.graph, "launch of a graph, whatever is in it"),
                "graph_per_kernel_us": [0, "derived", "cannot be told from graph_us with one model"],
                "eager_per_kernel_us": _parameter(self.launches.eager_per_kernel, "launch of a step over its kernels"),
            },
            "fit": {
                **self.provenance(),
                "held_out": {" ".join([row.pop("stage"), row.pop("kind")]).strip(): row for row in errors},
            },
        }

    def provenance(self) -> dict[str, Any]:
        """Where, when and with what it was measured."""
        return {
            "reference_loop_us": round(self.reference_us, 2),
            "machine": f"{processor_name()}, {os.cpu_count()} cores",
            "date": self.date,
            "testbed": testbed.__version__,
            "python": platform.python_version(),
        }

    def _stages(self) -> dict[str, Any]:
        stages: dict[str, Any] = {}
        for line in self.lines:
            how = f"fitted to {line.charges:,} charges"
            forms = {f"{term}_us": _parameter(ns, how) for term, ns in line.terms._asdict().items() if ns}
            if line.tail:
                forms["fixed_us"][2] += f"; {line.tail / 1e3:.3g} us of it is the tail"
            stages.setdefault(line.stage.name.lower(), {})[line.kind] = forms
        return stages

    def save(self, folder: Path) -> Path:
        """Write ``host.yaml``; returns its path."""
        yaml: Any = YAML(typ="safe", pure=True)
        yaml.default_flow_style = None  # a parameter is one line
        yaml.sort_base_mapping_type_on_output = False
        yaml.width = 200
        path = folder / "host.yaml"
        with path.open("w", encoding="utf-8") as file:
            yaml.dump(plain(self.mapping()), file)
        return path


def measure_host(
    scenario: Scenario,
    seconds: float,
    execute: Execute,
    *,
    cost_model: CostModel | None = None,
    tell: Tell = lambda text: None,
) -> HostCalibration:
    """Calibrate the host within about ``seconds``.

    ``scenario``: model, device and engine; its workload, loop and batching are replaced. ``execute`` runs one, paced or
    real. ``cost_model``: of a real device, whose launches are counted in kernels; None for a paced one. ``tell`` is
    called with a line before each run. Raises KeyboardInterrupt when a run was interrupted.
    """
    context = min(scenario.engine.context_length or CONTEXT, MOST_CONTEXT)
    runs = len(PARTS) * len(LOOPS) * len(host_workloads(1.0, context))
    each_s = max(seconds / runs - OVERHEAD_S, LEAST_S)
    until = time.monotonic() + seconds
    execute(next(_scenarios(scenario, LEAST_S, context))[1])  # imports, first touches
    tables: list[pd.DataFrame] = []
    left_out: dict[str, None] = {}
    for labels, one in _scenarios(scenario, each_s, context):
        about = f"{labels['workload']} under the {labels['loop']} loop"
        if about in left_out or (tables and labels["part"] == FIT and time.monotonic() > until):
            left_out[about] = None
            continue
        tell(f"host: {about}, {labels['part']}")
        run = execute(one)
        if run.meta.get("interrupted"):
            raise KeyboardInterrupt
        tables.append(charges_of(run, cost_model).assign(**labels))
    charges = pd.concat(tables, ignore_index=True)
    notes = [f"left out, for the time was up: {', '.join(left_out)}"] if left_out else []
    device = load_device(scenario.device).device if isinstance(scenario.device, str) else "a device of constant times"
    label = f"{device}, which is modelled (paced)" if cost_model is None else device
    return fit_host(charges, f"{load_model(scenario.model).name} on {label}", notes)


def _scenarios(scenario: Scenario, seconds: float, context_tokens: int) -> Iterator[tuple[dict[str, str], Scenario]]:
    """The runs of a calibration with their labels, the three parts of a workload one after the other: a machine that
    gets slower meanwhile does so for all of them."""
    for name, changes in host_workloads(seconds, context_tokens).items():
        workload = WorkloadConfig.model_validate(changes["workload"])
        for loop in LOOPS:
            engine = scenario.engine.model_copy(update={"loop": loop, "batching": changes["batching"]})
            for part in PARTS:
                seed = scenario.seed + (part == HELD_OUT)
                update = {"name": f"calibrate {name}", "engine": engine, "workload": workload, "seed": seed}
                yield {"workload": name, "loop": loop, "part": part}, scenario.model_copy(update=update)


def charges_of(run: Run, cost_model: CostModel | None = None) -> pd.DataFrame:
    """What was charged in a run on the wall clock and what it took, warm-up left out: the columns of a replay's work,
    with ``stage`` by name, ``kind``, ``measured_ns``, and of a real device's launches ``graph`` (1 or 0) and
    ``eager_kernels`` (how many, outside a graph)."""
    replayed = replay(run, own_code=True)
    if replayed.divergence is not None:
        raise RuntimeError(f"a calibration run cannot be replayed: {replayed.divergence.explain()}")
    work = replayed.work
    host = ints(run.records.spans, "lane") == 0
    begin, end, name = (ints(run.records.spans, column)[host] for column in ("begin_ns", "end_ns", "name"))
    if not np.array_equal(name, work["stage"]):
        raise RuntimeError("the host spans of a run are not its charges")
    table = pd.DataFrame({column: work[column] for column in WORK_COLUMNS})
    table["measured_ns"] = end - begin
    table["graph"] = table["eager_kernels"] = 0
    if cost_model is not None:
        launch = table.stage == Stage.LAUNCH
        graph = ints(run.records.steps, "graph")
        kernels = np.array([cost_model.price(shape).kernels for shape in replayed.shapes], dtype=np.int64)
        table.loc[launch, "graph"] = graph
        table.loc[launch, "eager_kernels"] = kernels * (1 - graph)
    table["kind"] = np.where((table.new_tokens > 0) | (table.admitted > 0), "prefill", "decode")
    table["stage"] = table.stage.map({stage.value: stage.name.lower() for stage in Stage})
    return table[table.step >= WARM_STEPS]


def fit_host(charges: pd.DataFrame, where: str, notes: Sequence[str] = ()) -> HostCalibration:
    """Fit the part ``fit`` of ``charges`` and predict all of them."""
    charges = charges.assign(predicted_ns=0.0)
    lines: list[Line] = []
    launches = Launches()
    by_device = charges.stage.eq("launch") & bool((charges.graph + charges.eager_kernels).any())
    if by_device.any():
        launches, found, predicted = _fit_launches(charges[by_device])
        lines += found
        charges.loc[by_device, "predicted_ns"] = predicted
    for stage, kind in KINDS:
        group = charges[charges.stage.eq(stage.name.lower()) & charges.kind.eq(kind) & ~by_device]
        fitted = group[group.part == FIT]
        if len(fitted):
            terms, tail_ns = _fit(_columns(fitted), fitted.measured_ns.to_numpy(np.float64))
            terms["fixed"] = round(terms["fixed"] + tail_ns, 3)
            lines.append(Line(stage, kind, Terms(**terms), tail_ns, len(fitted)))
            charges.loc[group.index, "predicted_ns"] = sum(terms[name] * x for name, x in _columns(group).items())
    lines.sort(key=lambda line: line.stage)
    seen = [(line.stage, line.kind) for line in lines]
    missing = [f"{stage.name.lower()}, {kind}" for stage, kind in KINDS if (stage, kind) not in seen]
    notes = [*notes, *(f"{what}: no charge was seen; it is priced 0 (more --minutes see more)" for what in missing)]
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return HostCalibration(tuple(lines), launches, charges, reference_loop_us(), where, date, tuple(notes))


def _fit(columns: Mapping[str, Floats], measured_ns: Floats) -> tuple[dict[str, float], float]:
    """Coefficients (ns) by column, 0 for what does not pay; and the mean of the tail."""
    table = np.column_stack(list(columns.values()))
    chosen = terms_that_pay(table, measured_ns)
    line = np.zeros(table.shape[1])
    line[chosen] = fit_line(table[:, chosen], measured_ns)
    terms = {name: round(float(value), 3) for name, value in zip(columns, line, strict=True)}
    return terms, tail_mean(measured_ns, table @ line)


def _fit_launches(group: pd.DataFrame) -> tuple[Launches, list[Line], Floats]:
    """Launches on a real device: what is launched, and what preparing it adds by rows and new tokens.

    Their tail is left out: where the device is a process that was woken on the loop's own core, it computes while the
    launch seems to last, so that the time is not lost.
    """
    names = {"graph": "graph", "eager_per_kernel": "eager_kernels", "per_row": "rows", "per_new_token": "new_tokens"}
    columns = {term: group[column].to_numpy(np.float64) for term, column in names.items()}
    part = (group.part == FIT).to_numpy()
    measured = group.measured_ns.to_numpy(np.float64)
    found, _ = _fit({term: values[part] for term, values in columns.items()}, measured[part])
    terms = Terms(per_row=found["per_row"], per_new_token=found["per_new_token"])
    lines = [Line(Stage.LAUNCH, kind, terms, 0.0, int(part.sum())) for kind in ("decode", "prefill")]
    predicted = np.sum([found[term] * values for term, values in columns.items()], axis=0)
    return Launches(found["graph"], found["eager_per_kernel"]), lines, predicted


def _columns(charges: pd.DataFrame) -> dict[str, Floats]:
    """What each term of a profile is multiplied with: float64 [charges] by the names of ``Terms``."""
    values = {name: charges[name].to_numpy(np.float64) for name in WORK_COLUMNS if name not in ("stage", "step")}
    return {
        "fixed": np.ones(len(charges)),
        "per_row": values["rows"],
        "per_new_token": values["new_tokens"],
        "per_admitted": values["admitted"],
        "per_waiting": values["waiting"],
        "per_matched_token": values["matched_tokens"],
        "per_waiting_x_admitted": values["waiting"] * values["admitted"],
    }


def _errors(group: pd.DataFrame) -> dict[str, float]:
    held, first, again = (group[group.part == part] for part in (HELD_OUT, FIT, AGAIN))
    measured, predicted = held.measured_ns.to_numpy(np.float64), held.predicted_ns.to_numpy(np.float64)
    if not len(held) or not measured.sum():
        measured = predicted = np.full(1, np.nan)
    error = np.abs(predicted - measured)
    noise = again.measured_ns.mean() / first.measured_ns.mean() - 1 if len(again) and len(first) else np.nan
    return {
        "charges": len(held),
        "mean_us": float(measured.mean() / 1e3),
        "sum_error_percent": float(100 * (predicted.sum() / measured.sum() - 1)),
        "mean_error_percent": float(100 * error.mean() / measured.mean()),
        "p90_error_percent": float(100 * np.quantile(error / np.maximum(measured, 1.0), 0.9)),
        "tail_percent": float(100 * tail_mean(measured, predicted) / measured.mean()),
        "noise_percent": float(100 * noise),
    }


def _parameter(ns: float, how: str) -> list[Any]:
    return [round(ns / 1e3, 6), "measured", how]


def reference_loop_us(repeats: int = 300) -> float:
    """The loop that tells the speed of a core: 1,000 dictionary increments, median of ``repeats``, us."""
    counts = dict.fromkeys(range(1000), 0)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter_ns()
        for key in counts:
            counts[key] = counts[key] + 1
        times.append(time.perf_counter_ns() - begin)
    return statistics.median(times) / 1e3
