"""The joins of a simulated run with real ones. Each function is one join, and its docstring defines it.

An error is signed and relative: (simulated - real) / real, as a fraction. ``real`` runs are repeats of one scenario;
what they differ by among themselves is the noise floor, below which no error means anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from testbed.batch import ForwardMode
from testbed.costs import CostModel, HostProfile
from testbed.metrics.aggregate import LATENCIES
from testbed.metrics.columns import NS_PER_MS, NS_PER_S, Floats, Ints, ints
from testbed.metrics.laws import HOST_LANE
from testbed.metrics.run import Run
from testbed.metrics.window import run_end_ns
from testbed.ports import Stage
from testbed.runtime.replay import Replayed

PERCENTILES = (50.0, 90.0, 99.0)
FIGURES = (
    *(f"{which}_{name}_ms" for name in LATENCIES for which in ("mean", "p50", "p90", "p99")),
    *("request_throughput", "output_throughput", "makespan_s", "device_busy_percent", "cache_hit_rate"),
)
"""What is compared: aggregates of a run, and ``makespan_s``, from time 0 to its end."""
SHARES = ("device_busy_percent", "bubble_host_percent", "bubble_transfer_percent", "bubble_no_work_percent")
PER_REQUEST = ("ttft_ms", "tpot_ms", "e2el_ms")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NO_STEP = "no step"
"""Kind of the host work of an iteration whose step was not recorded: the run's last ones."""


class FigureError(NamedTuple):
    """One figure on both sides."""

    figure: str
    simulated: float
    real: float
    """Mean over the repeats."""
    error: float
    noise: float
    """The largest pairwise difference of the repeats over their mean; NaN for a single one."""
    repeats: tuple[float, ...]


class Quantiles(NamedTuple):
    """Distribution of per-request errors of one latency (linear interpolation)."""

    latency: str
    requests: int
    """That have the latency on both sides; once for each real run."""
    p5: float
    p25: float
    p50: float
    p75: float
    p95: float


class TimeError(NamedTuple):
    """Predicted beside measured times of one group."""

    name: str
    number: int
    measured_ms: float
    predicted_ms: float
    error: float
    """Of the sums."""
    median_error: float
    """Of the single times, as the next."""
    p90_abs_error: float
    noise: float
    """The largest pairwise difference of the repeats' own errors; NaN for a single one."""

    @property
    def stake_ms(self) -> float:
        """What the error is worth in time."""
        return abs(self.predicted_ms - self.measured_ms)

    @property
    def factor(self) -> float:
        """Predicted over measured; infinite where nothing was measured."""
        return self.predicted_ms / self.measured_ms if self.measured_ms else float("inf")


class Share(NamedTuple):
    """What one cause takes of the device's time, in percent."""

    cause: str
    simulated: float
    real: float
    """Mean over the repeats."""
    difference: float
    """Simulated less real, in percentage points, as the noise."""
    noise: float


def relative(simulated: ArrayLike, real: ArrayLike) -> Floats:
    """(simulated - real) / real, element by element; 0 where both are equal, NaN where only the real one is 0 or one of
    them is undefined."""
    one, other = np.asarray(simulated, dtype=np.float64), np.asarray(real, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = (one - other) / other
    return np.where(one == other, 0.0, np.where(other == 0, np.nan, error))


def spread(values: Sequence[float]) -> float:
    """The largest pairwise difference of repeats; NaN for a single one."""
    return max(values) - min(values) if len(values) > 1 else float("nan")


def figures_of(run: Run) -> dict[str, float]:
    """The figures of one run, by the keys of ``FIGURES``; NaN where undefined."""
    found = run.aggregates(percentiles=PERCENTILES) | {"makespan_s": run_end_ns(run.records) / NS_PER_S}
    return {key: float(found[key]) for key in FIGURES}


def figure_errors(simulated: Run, real: Sequence[Run]) -> dict[str, FigureError]:
    """Error of every figure of ``FIGURES``, by its key."""
    one, others = figures_of(simulated), [figures_of(run) for run in real]
    found = {}
    for key, value in one.items():
        repeats = tuple(other[key] for other in others)
        mean = float(np.mean(repeats))
        noise = float(relative(mean + spread(repeats), mean))
        found[key] = FigureError(key, value, mean, float(relative(value, mean)), noise, repeats)
    return found


def request_errors(simulated: Run, real: Run) -> pd.DataFrame:
    """Error of each request that both runs have, matched by id: index id, columns ``PER_REQUEST``, in the simulation's
    order; NaN where a latency is undefined in one of them."""
    one, other = (run.requests.set_index("id")[list(PER_REQUEST)] for run in (simulated, real))
    other = other.reindex(one.index[one.index.isin(other.index)])
    one = one.loc[other.index]
    return pd.DataFrame(relative(one, other), index=one.index, columns=list(PER_REQUEST))


def request_quantiles(errors: pd.DataFrame) -> list[Quantiles]:
    """Distribution of the columns of ``request_errors``."""
    found = []
    for latency in PER_REQUEST:
        values = errors[latency].dropna().to_numpy()
        quantiles = np.quantile(values, QUANTILES) if len(values) else np.full(len(QUANTILES), np.nan)
        found.append(Quantiles(latency, len(values), *quantiles.tolist()))
    return found


def step_times(run: Run, replayed: Replayed, cost_model: CostModel) -> pd.DataFrame:
    """Every step that ran, as the cost model prices its exact shape, beside what it took: step, kind (mode, and whether
    it ran as a CUDA graph), rows, new_tokens, context_tokens, predicted_ns, measured_ns.

    An eager step also lasts, from its start on the device, until its last kernel is launched
    (``modelled.device_time``): that part is the host's, and taken as it was measured. Steps behind a divergence of the
    replay are left out.
    """
    table = run.records.steps
    kept = ints(table, "step") < _trusted_steps(replayed)
    step, graph = ints(table, "step")[kept], ints(table, "graph")[kept]
    costs = [cost_model.price(replayed.shapes[index]) for index in step.tolist()]
    priced = np.array([cost.gpu_ns for cost in costs], dtype=np.int64)
    foreseen = np.array([cost.graph for cost in costs], dtype=np.bool_)
    launching = _launched_ns(run, step) - ints(table, "start_ns")[kept]
    columns, how = ("rows", "new_tokens", "context_tokens"), ("eager", "graph")
    return pd.DataFrame(
        {
            "step": step,
            "kind": [f"{mode}, {how[one]}" for mode, one in zip(_modes(run, step), graph.tolist(), strict=True)],
            **{name: ints(table, name)[kept] for name in columns},
            "predicted_ns": np.where(foreseen, priced, np.maximum(priced, launching)),
            "measured_ns": ints(table, "gpu_ns")[kept],
        }
    )


def host_times(run: Run, replayed: Replayed, cost_model: CostModel, host: HostProfile) -> pd.DataFrame:
    """Every charge of the host, as its profile prices it, beside the span it took: stage, kind (mode of its step),
    step, predicted_ns, measured_ns.

    A launch is priced as the runtimes do: kernels (of the cost model), rows and new tokens. WAIT is what passes between
    the end of a step on the device and the loop's going on. Charges behind a divergence are left out.
    """
    spans = run.records.spans
    mine = ints(spans, "lane") == HOST_LANE
    measured = (ints(spans, "end_ns") - ints(spans, "begin_ns"))[mine]
    steps = ints(replayed.work, "step")
    behind = np.flatnonzero(steps >= _trusted_steps(replayed))
    count = min(len(measured), int(behind[0]) if len(behind) and replayed.divergence else len(steps))
    names = ("stage", "step", "rows", "new_tokens", "admitted", "waiting", "matched_tokens")
    charges = zip(*(replayed.work[name][:count].tolist() for name in names), strict=True)
    predicted = []
    for stage, step, *sizes in charges:
        cost_ns = host.price(Stage(stage), *sizes)
        if stage == Stage.LAUNCH:
            cost = cost_model.price(replayed.shapes[step])
            cost_ns += host.launch_ns(cost.kernels, cost.graph)
        predicted.append(cost_ns)
    return pd.DataFrame(
        {
            "stage": [Stage(stage).name.lower() for stage in replayed.work["stage"][:count].tolist()],
            "kind": _modes(run, steps[:count]),
            "step": steps[:count],
            "predicted_ns": np.array(predicted, dtype=np.int64),
            "measured_ns": measured[:count],
        }
    )


def time_errors(times: pd.DataFrame, by: Sequence[str]) -> list[TimeError]:
    """``step_times`` or ``host_times`` of all repeats (column ``run``) summed up by the columns ``by``, most time
    first. A group is called by what its columns hold."""
    names = times[list(by)].agg(", ".join, axis=1) if len(times) else pd.Series(dtype=str)
    found = [_time_error(str(name), group) for name, group in times.groupby(names)]
    return sorted(found, key=lambda one: -one.measured_ms)


def _time_error(name: str, times: pd.DataFrame) -> TimeError:
    sums = times.groupby("run")[["predicted_ns", "measured_ns"]].sum()
    predicted, measured = sums["predicted_ns"].to_numpy(), sums["measured_ns"].to_numpy()
    errors = relative(times["predicted_ns"], times["measured_ns"])
    errors = errors[~np.isnan(errors)]
    return TimeError(
        name=name,
        number=len(times),
        measured_ms=float(measured.sum() / NS_PER_MS),
        predicted_ms=float(predicted.sum() / NS_PER_MS),
        error=float(relative(predicted.sum(), measured.sum())),
        median_error=float(np.median(errors)) if len(errors) else np.nan,
        p90_abs_error=float(np.quantile(np.abs(errors), 0.9)) if len(errors) else np.nan,
        noise=spread(relative(predicted, measured).tolist()),
    )


def bubbles(simulated: Run, real: Sequence[Run]) -> list[Share]:
    """Where the device's time went in the measure window, by cause."""
    one, others = simulated.aggregates(), [run.aggregates() for run in real]
    found = []
    for key in SHARES:
        repeats = [other[key] for other in others]
        mean = float(np.mean(repeats))
        found.append(Share(key.removesuffix("_percent"), one[key], mean, one[key] - mean, spread(repeats)))
    return found


def _trusted_steps(replayed: Replayed) -> int:
    """Steps whose shape and work are those of the run: all before a divergence."""
    return replayed.steps if replayed.divergence is None else replayed.divergence.step


def _modes(run: Run, steps: Ints) -> list[str]:
    """The forward mode of each step's number, in words; ``NO_STEP`` for one that was not recorded."""
    names = {mode.value: mode.name.lower() for mode in ForwardMode}
    table = run.records.steps
    known = dict(zip(ints(table, "step").tolist(), ints(table, "mode").tolist(), strict=True))
    return [names.get(known.get(step, 0), NO_STEP) for step in steps.tolist()]


def _launched_ns(run: Run, steps: Ints) -> Ints:
    """When the launch of each step was done: int64 [steps], 0 where there is no such span."""
    spans = run.records.spans
    mine = (ints(spans, "lane") == HOST_LANE) & (ints(spans, "name") == Stage.LAUNCH)
    known = dict(zip(ints(spans, "step")[mine].tolist(), ints(spans, "end_ns")[mine].tolist(), strict=True))
    return np.array([known.get(step, 0) for step in steps.tolist()], dtype=np.int64)
