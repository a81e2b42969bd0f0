"""The device half of ``testbed calibrate``: measure, fit, hold out, write a profile.

Operators are timed one by one through all layers, on the engine's own backend; whole steps by the engine's own runner,
several queued behind one another. What a step takes beyond its operators (copies of inputs, gaps between kernels, the
worker's messages) is an operator of its own, read off plain steps. Everything is measured in rounds over all points, so
that drift hits all alike, and a time is the median of its rounds; the first half of the rounds against the second is
the noise floor. Not measured: all-reduce (the engine runs on one device), penalties, grammars and log-probabilities.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
from ruamel.yaml import YAML

import testbed
from testbed.api import engine_options
from testbed.costs.derive import dump
from testbed.costs.devices import MIB, DeviceProfile, Formula
from testbed.engine.device import needs_installing
from testbed.engine.options import DeviceInfo, EngineOptions
from testbed.sampling import SamplingParams
from testbed.scenario.errors import InputError
from testbed.scenario.models import load_model
from testbed.scenario.schema import Scenario
from testbed.study.calibration.fit import Fit, least_time, predicted_time
from testbed.study.calibration.points import Limits, Point, StepPoint, fits, operator_points, step_points

if TYPE_CHECKING:
    from testbed.engine.measure.bench import Ceilings, DeviceBench

P = TypeVar("P", Point, StepPoint)
Work = Callable[[], object]
Report = Callable[[str], None]

OPERATORS_SHARE = 0.55
"""Of the time, for operators; the rest is for whole steps."""
LONGEST_SHARE = 1 / 200
"""A shape that takes a larger share of its part of the time is the largest of its operator."""
ROUNDS_MAX = 21
REPEATS_MAX = 5
FILL_TOKENS = 512
"""A step that writes KV for the steps that are measured."""
SLACK_TOKENS = 8
"""Contexts grow by a few tokens while a step is measured."""
SHAPE_COLUMNS = ("tokens", "rows", "prefix_tokens", "context", "longest")
LINK_GB_S = 1.0
"""One device has nobody to talk to; the form of a profile wants a number."""


@dataclass(frozen=True)
class DeviceCalibration:
    """A measured device."""

    profile: DeviceProfile
    points: pd.DataFrame
    """A row a point: operator, ``SHAPE_COLUMNS`` (of attention, new and cached tokens and context are those of a row),
    measured_ns (the median of all rounds), first_ns and second_ns (of either half), predicted_ns, floor_ns (at the
    ceilings; 0: none is known), held_out. Operators are those of the cost model; ``prefill_behind_prefix`` and
    ``decode_skew`` are attention too; then whole steps, and what plain ones take beyond their operators."""
    notes: list[str]

    def errors(self) -> pd.DataFrame:
        """By operator: held-out points, mean and p90 of their absolute relative error, signed mean (above 0: predicted
        too slow), and the noise floor: mean relative difference of the same points, fitted ones too, measured twice."""
        return errors_of(self.points)

    def save(self, folder: Path) -> Path:
        """Write ``device.yaml``, ``device.json`` (its tables) and ``device_points.csv``; returns the first's path."""
        path, profile = folder / "device.yaml", self.profile
        (folder / "device.json").write_text(dump(profile.tables), encoding="utf-8")
        self.points.to_csv(folder / "device_points.csv", index=False)
        written: dict[str, Any] = {
            "name": profile.name,
            "device": profile.device,
            "memory_mib": profile.memory_bytes // MIB,
            "bandwidth_gb_s": round(profile.bytes_per_ns, 2),
            "tflops": {dtype: float(f"{rate / 1e3:.4g}") for dtype, rate in profile.flops_per_ns.items()},
            "link_gb_s": profile.link_bytes_per_ns,
            "devices_per_node": 1,
            "tables": "device.json",
            "source": profile.source,
            "formula": {name: getattr(profile.formula, name) for name in Formula.__slots__},
            "decode_skew": profile.decode_skew,
            "fit": profile.fit,
        }
        if profile.launches_per_step is not None:
            written["launches_per_step"] = profile.launches_per_step
        with path.open("w", encoding="utf-8") as file:
            YAML(typ="safe").dump(written, file)
        return path


def errors_of(points: pd.DataFrame) -> pd.DataFrame:
    """See ``DeviceCalibration.errors``."""
    rows = {}
    for operator, part in points.groupby("operator", sort=False):
        held = part[part["held_out"]]
        error = held["predicted_ns"] / held["measured_ns"] - 1
        noise = ((part["second_ns"] - part["first_ns"]) / part["measured_ns"]).abs().mean()
        p90 = error.abs().quantile(0.9)
        rows[operator] = (len(held), error.abs().mean(), p90, error.mean(), noise)
    return pd.DataFrame.from_dict(rows, orient="index", columns=["points", "mean", "p90", "signed", "noise"])


def measure_device(scenario: Scenario, minutes: float = 2.5, report: Report = lambda _: None) -> DeviceCalibration:
    """Measure this machine's device (CUDA, else the CPU) with the scenario's model, engine settings and sampling, in
    about ``minutes``; of these half are for measuring, however long the model takes to load. ``report`` is told of each
    part.

    Raises InputError for a model or engine that cannot run here, and when torch is missing.
    """
    if not minutes > 0:
        raise InputError(f"{minutes} minutes is no time", where="--minutes", remedy="a number above 0")
    options, params = engine_options(scenario), SamplingParams(**scenario.workload.sampling.model_dump())
    with needs_installing():
        from testbed.engine.measure.bench import measure_ceilings, open_bench
    begin = perf_counter()
    report("ceilings")
    ceilings = measure_ceilings()
    report("loading")
    with open_bench(options, params) as bench:
        fit = Fit(bare_profile(bench.info, ceilings), load_model(scenario.model), scenario.engine)
        seconds = max(30 * minutes, 60 * minutes - (perf_counter() - begin))
        calibration = _Measuring(bench, options, fit, seconds, scenario.seed, report)
        calibration.operators()
        calibration.steps()
    return calibration.result(params)


def bare_profile(info: DeviceInfo, ceilings: Ceilings) -> DeviceProfile:
    """A profile of the ceilings alone; its formula stands for what the engine does not do."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy"))
    return DeviceProfile(
        name="calibrated",
        device=info.name,
        memory_bytes=ceilings.memory_bytes,
        bytes_per_ns=round(ceilings.copy_rate, 2),
        flops_per_ns={dtype: float(f"{rate:.4g}") for dtype, rate in ceilings.matrix_rates.items()},
        link_bytes_per_ns=LINK_GB_S,
        devices_per_node=1,
        formula=Formula(0.6, 0.8, 2000.0, 20000.0, 0.6, 10000.0),  # guessed, as in the presets
        decode_skew=0.05,
        source=f"testbed calibrate on {platform.node()} ({platform.system()} {platform.machine()}), "
        f"{date.today().isoformat()}; testbed {testbed.__version__}, {info.backend} backend, {versions}",
        launches_per_step=None if info.kind == "cuda" else 1,
    )


class _Measuring:
    """One calibration on its way."""

    def __init__(
        self, bench: DeviceBench, options: EngineOptions, fit: Fit, seconds: float, seed: int, report: Report
    ) -> None:
        info = bench.info
        self._bench = bench
        self._fit = fit
        self._seconds = seconds
        self._seed = seed
        self._report = report
        self._per_octave = 0.5 if seconds < 20 else 1.0 if seconds < 100 else 2.0
        """How dense the axes are."""
        context = min(info.context_length, info.kv_tokens) - SLACK_TOKENS
        tokens = min(options.chunk_tokens, info.kv_tokens - SLACK_TOKENS)
        rows = min(options.max_running_requests, info.kv_tokens // options.page_size)
        self._limits = Limits(tokens, rows, context, info.kv_tokens, options.page_size)
        self._points: list[dict[str, Any]] = []
        self._notes = [f"device: {info.name}", *info.notes]

    def operators(self) -> None:
        """Time the operators and make their tables."""
        begin, seconds = perf_counter(), self._seconds * OPERATORS_SHARE
        points = operator_points(self._fit.model, self._limits, self._per_octave)
        self._report(f"operators: {len(points)} shapes")
        works, repeats = self._ready([p for p in points if fits(p, self._limits)], 1e9 * seconds * LONGEST_SHARE)
        left = seconds - (perf_counter() - begin)
        times = in_rounds(list(works), lambda p: self._bench.time_ns(works[p], repeats[p]), left, self._seed)
        self._fit.add_operators({point: float(np.median(rounds)) for point, rounds in times.items()})
        operators = self._fit.cost_model().operators
        for point, rounds in times.items():
            predicted = predicted_time(operators, point)
            shape = (point.tokens, point.rows, point.prefix_tokens, point.context, point.longest)
            self._add(point.operator, shape, rounds, predicted, point.held_out, least_time(operators, point))

    def _ready(self, points: Sequence[Point], longest: float) -> tuple[dict[Point, Work], dict[Point, int]]:
        """What is to be timed, and how often in a round. Points come in order of their work: behind one that takes
        ``longest`` (ns) no larger one of its operator is tried."""
        works: dict[Point, Work] = {}
        repeats: dict[Point, int] = {}
        most_work: dict[str, int] = {}
        for point in points:
            if point.work > most_work.get(point.operator, point.work):
                continue
            works[point] = work = self._work(point)
            took = max(1, self._bench.time_ns(work, 1))
            repeats[point] = min(REPEATS_MAX, max(1, int(longest / took / 4)))
            if took > longest and point.operator not in most_work:
                most_work[point.operator] = point.work
                self._notes.append(f"{point.operator}: no larger shapes than {took / 1e6:.0f} ms, for want of time")
        return works, repeats

    def _work(self, point: Point) -> Work:
        if point.context:
            return self._bench.decode_attention(point.contexts)
        if point.operator.startswith("prefill"):
            return self._bench.prefill_attention([point.tokens] * point.rows, [point.prefix_tokens] * point.rows)
        return self._bench.operator(point.operator, point.tokens)

    def steps(self) -> None:
        """Time whole steps, but for those that are expected to take too long, and make the table of what they take
        beyond their operators."""
        begin, seconds = perf_counter(), self._seconds * (1 - OPERATORS_SHARE)
        chunk = min(FILL_TOKENS, self._limits.tokens, self._limits.context)
        filled = self._bench.fill(self._limits.kv_tokens, chunk, seconds / 5)
        limits = replace(self._limits, kv_tokens=filled)
        points = step_points(limits, self._bench.graph_rows, self._per_octave, self._seed)
        prices, longest = self._fit.step_prices(points), 1e9 * seconds * LONGEST_SHARE
        kept = [p for p in points if prices[p] <= longest and limits.holds(p.shape.lengths)]
        if len(kept) < len(points):
            self._notes.append(f"steps: {len(points) - len(kept)} of {len(points)} left away, for want of time or KV")
        self._report(f"steps: {len(kept)} shapes")
        for point in kept:
            self._period(point)  # compiles kernels, and tells a worker's caches from its memory
        times = in_rounds(kept, self._period, seconds - (perf_counter() - begin), self._seed)
        self._fit.add_steps({point: float(np.median(rounds)) for point, rounds in times.items()})
        self._add_steps(times, prices)

    def _period(self, point: StepPoint) -> int:
        return self._bench.period_ns(point.shape, graph=point.kind == "graph")

    def _add_steps(self, times: Mapping[StepPoint, list[int]], prices: Mapping[StepPoint, float]) -> None:
        """Points of whole steps, and of what they take beyond their operators (``prices``)."""
        operators = self._fit.cost_model().operators
        for point, whole in self._fit.step_prices(times).items():
            new, prefix, contexts = point.shape
            context = round(float(np.mean(contexts))) if contexts else 0
            shape = (sum(new), len(new) + len(contexts), sum(prefix), context, max(contexts, default=0))
            self._add(point.what, shape, times[point], whole, point.held_out)
            if point.plain:
                beyond = [time - round(prices[point]) for time in times[point]]
                predicted = operators.step_ns(point.kind, point.tokens)
                self._add(f"beyond operators: {point.kind}", shape, beyond, predicted, point.held_out)

    def _add(
        self,
        operator: str,
        shape: tuple[int, int, int, int, int],
        rounds: Sequence[int],
        predicted: float,
        held_out: bool,
        floor: float = 0.0,
    ) -> None:
        half = len(rounds) // 2
        self._points.append(
            {
                "operator": operator,
                **dict(zip(SHAPE_COLUMNS, shape, strict=True)),
                "measured_ns": float(np.median(rounds)),
                "first_ns": float(np.median(rounds[:half])),
                "second_ns": float(np.median(rounds[half:])),
                "predicted_ns": predicted,
                "floor_ns": floor,
                "held_out": held_out,
            }
        )

    def result(self, params: SamplingParams) -> DeviceCalibration:
        """All of it, with what a reader must know."""
        points, profile = pd.DataFrame(self._points), self._fit.profile
        errors = errors_of(points).round(4).to_dict("index")
        self._notes += [
            f"{name}: {count} of its points beat a ceiling: raised" for name, count in self._fit.raised.items()
        ]
        most = self._limits
        self._notes.append(
            f"measured up to {most.tokens:,} tokens a step, {most.rows:,} rows, contexts of {most.context:,}: what a "
            "scenario has beyond is extrapolated; --set its engine.chunked_prefill_size and engine.context_length"
        )
        self._notes.append("sampling: " + ("greedy" if params.greedy else f"temperature {params.temperature:g}"))
        self._notes.append("not measured: all-reduce (one device), penalties, grammars, log-probabilities")
        self._notes.append(f"axes of {self._per_octave:g} points for a doubling, {self._seconds:.0f} s")
        fit = profile.fit | {"model": self._fit.model.name, "held_out": errors, "raised": dict(self._fit.raised)}
        return DeviceCalibration(replace(profile, fit=fit), points, self._notes)


def in_rounds(points: Sequence[P], time_of: Callable[[P], int], seconds: float, seed: int) -> dict[P, list[int]]:
    """Times of each point from rounds over all of them, each in another order: 2 rounds at least, ``ROUNDS_MAX`` at
    most, and no further one that would end after ``seconds``."""
    times: dict[P, list[int]] = {point: [] for point in points}
    order, begin = np.random.Generator(np.random.Philox(key=seed)), perf_counter()
    for done in range(ROUNDS_MAX):
        if done >= 2 and (perf_counter() - begin) * (done + 1) / done > seconds:
            break
        for i in order.permutation(len(points)).tolist():
            times[points[i]].append(time_of(points[i]))
    return times
