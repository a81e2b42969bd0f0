"""The device's profile against made-up devices, whose true times are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.batch import BatchShape
from testbed.costs import OperatorCostModel, load_device
from testbed.costs.devices import DeviceProfile, Formula
from testbed.costs.tables import Curve, PrefillAttention
from testbed.engine.measure.steps import StepShape
from testbed.scenario.models import load_model
from testbed.scenario.schema import EngineConfig
from testbed.study.calibration.device import DeviceCalibration, errors_of, in_rounds
from testbed.study.calibration.fit import Fit, least_time, predicted_time
from testbed.study.calibration.points import Limits, Point, StepPoint, amid, axis, fits, operator_points, step_points

LIMITS = Limits(tokens=2048, rows=64, context=4096, kv_tokens=1 << 17, page_size=16)
MODELS = ("llama-3.1-8b", "qwen3-0.6b", "qwen3-30b-a3b")
AXES = {"tokens": 5e5, "rows": 7e5, "prefix_tokens": 40.0, "context": 1100.0}


def bare(dtype: str = "float32") -> DeviceProfile:
    """So fast that no ceiling is near."""
    formula = Formula(0.6, 0.8, 2000.0, 20000.0, 0.6, 10000.0)
    return DeviceProfile(
        "made-up", "made up", 1 << 36, 1e9, {dtype: 1e12}, 1.0, 1, formula, 0.05, "", launches_per_step=1
    )


def fit_of(model: str = "qwen3-0.6b", profile: DeviceProfile | None = None, dtype: str = "float32") -> Fit:
    return Fit(profile or bare(dtype), load_model(model), EngineConfig.model_validate({"dtype": dtype}))


def points_of(fit: Fit, per_octave: float = 1.0) -> list[Point]:
    return [point for point in operator_points(fit.model, LIMITS, per_octave) if fits(point, LIMITS)]


def true_time(point: Point, slopes: Mapping[str, float], skew: float = 0.0) -> float:
    """Of a device whose times are linear along each axis, and where attention over a prompt is quadratic."""
    if "prefill" in point.operator:
        n, p = point.tokens, point.prefix_tokens
        new = 1.0 + n / 1e2
        return slopes["rows"] * point.rows * new * (new + slopes["prefix_tokens"] * p / 1e4)
    if point.context:
        mean, longest = float(np.mean(point.contexts)), max(point.contexts)
        return point.rows * (slopes["rows"] + slopes["context"] * (mean + skew * (longest - mean)))
    return 1e7 + slopes["tokens"] * point.tokens


def prediction(fit: Fit, points: list[Point]) -> dict[Point, float]:
    operators = fit.cost_model().operators
    return {point: predicted_time(operators, point) for point in points}


# ---- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_measured_is_predicted_and_nothing_is_called_unmeasured(model: str, dtype: str) -> None:
    fit = fit_of(model, dtype=dtype)
    times = {point: true_time(point, AXES) for point in points_of(fit)}
    fit.add_operators(times)
    fit.add_steps({StepPoint("decode step", "eager", StepShape((), (), (64,)), False): 1e9})
    for point, predicted in prediction(fit, list(times)).items():
        if not point.held_out:
            assert predicted == pytest.approx(times[point], rel=2e-3), point
    assert fit.cost_model().unmeasured() == ["attention of a batch that prefills and decodes: the sum of its parts"]
    assert fit.raised == {}


slopes = st.fixed_dictionaries({name: st.floats(0.2, 5.0).map(lambda x, s=s: x * s) for name, s in AXES.items()})


@settings(max_examples=25, deadline=None, derandomize=True)
@given(slopes, st.integers(0, 100).map(lambda percent: percent / 100), st.sampled_from(MODELS[:2]))
def test_known_curves_are_recovered_where_nothing_was_measured(
    known: dict[str, float], skew: float, model: str
) -> None:
    fit = fit_of(model)
    times = {point: true_time(point, known, skew) for point in points_of(fit)}
    fit.add_operators(times)
    for point, predicted in prediction(fit, [p for p in times if p.held_out]).items():
        loose = 0.10 if "prefill" in point.operator else 0.01  # equal work is a rule, not the truth
        assert predicted == pytest.approx(times[point], rel=loose), point


@pytest.mark.parametrize("skew", [0.0, 0.3, 1.0])
def test_where_between_mean_and_longest_unequal_rows_lie(skew: float) -> None:
    fit = fit_of()
    fit.add_operators({point: true_time(point, AXES, skew) for point in points_of(fit)})
    shares = fit.profile.tables["decode_skew"]["share"]
    assert len(shares) > 3 and shares == pytest.approx([skew] * len(shares), abs=0.03)


def test_held_out_errors_are_those_of_the_noise() -> None:
    fit, draw = fit_of(), np.random.Generator(np.random.Philox(key=1))
    true = {point: true_time(point, AXES) for point in points_of(fit, 2.0)}
    fit.add_operators({point: time * math.exp(draw.normal(0, 0.05)) for point, time in true.items()})
    lines = [point for point in true if point.held_out and not point.context and "prefill" not in point.operator]
    errors = [predicted / true[point] - 1 for point, predicted in prediction(fit, lines).items()]
    assert 0.02 < np.std(errors) < 0.06
    assert abs(np.mean(errors)) < 0.01


def test_held_out_points_make_no_table() -> None:
    one, other = fit_of(), fit_of()
    times = {point: true_time(point, AXES) for point in points_of(one)}
    one.add_operators(times)
    other.add_operators({point: time * (7 if point.held_out else 1) for point, time in times.items()})
    assert one.profile == other.profile


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.sampled_from(MODELS), st.floats(0.1, 1e4), st.floats(0.1, 1e5))
def test_no_operator_beats_the_ceilings(seed: int, model: str, rate: float, flops: float) -> None:
    profile = replace(bare(), bytes_per_ns=rate, flops_per_ns={"float32": flops})
    fit, draw = fit_of(model, profile), np.random.Generator(np.random.Philox(key=seed))
    points = points_of(fit, 0.5)
    operators = fit.cost_model().operators
    floors = {point: least_time(operators, point) for point in points}
    times = {point: floor * math.exp(draw.normal(0, 1)) for point, floor in floors.items()}
    fit.add_operators(times)
    for point, predicted in prediction(fit, points).items():
        if point.operator != "experts":  # between knots their bound is the chord
            assert predicted >= floors[point] * 0.9995, point
    gemm = fit.profile.tables["gemm"]["float32"]
    for (n, k), row in zip(gemm["shapes"], gemm["ns"], strict=True):  # in the file too, not only as it is read
        least = [max(2.0 * m * n * k / flops, 4.0 * n * k / rate) for m in gemm["m"]]
        assert all(time >= 0.999 * bound - 1 for time, bound in zip(row, least, strict=False))
    beaten = [point.operator for point in points if times[point] < floors[point]]
    assert fit.raised == {name: beaten.count(name) for name in beaten}


@pytest.mark.parametrize("largest", [300, 5000])
def test_tables_are_whole_when_large_shapes_are_missing(largest: int) -> None:
    fit = fit_of()
    times = {point: true_time(point, AXES) for point in points_of(fit) if point.work <= largest or point.tokens == 1}
    fit.add_operators(times)
    for point, predicted in prediction(fit, list(times)).items():
        if not (point.held_out or point.context or "prefill" in point.operator):
            assert predicted == pytest.approx(times[point], rel=2e-3), point
    assert fit.cost_model().price(BatchShape((2000,), (2000,), 60, 60 * 3000, 4000)).gpu_ns > 0


def test_rows_that_end_early_go_on_as_they_did() -> None:
    fit = fit_of()
    times = {point: true_time(point, AXES) for point in points_of(fit)}
    fit.add_operators(
        {point: time for point, time in times.items() if point.work <= 3000 or "prefill" in point.operator}
    )
    decode = [point for point in times if point.operator == "decode_attention" and point.context <= 2048]
    missing = [point for point in decode if point.work > 3000]
    assert len(missing) > 20
    for point, predicted in prediction(fit, missing).items():
        assert predicted == pytest.approx(times[point], rel=0.03), point


def test_a_row_of_one_point_is_left_away_unless_there_is_no_other() -> None:
    fit = fit_of()
    times = {point: true_time(point, AXES) for point in points_of(fit)}
    few = {p: t for p, t in times.items() if p.operator != "decode_attention" or p.rows == 1 or p.context == 16}
    fit.add_operators(few)
    assert fit.profile.tables["decode"]["float32"][0]["batch"] == [1]
    fit.add_operators({p: t for p, t in few.items() if p.operator != "decode_attention" or p.context == 16})
    assert fit.profile.tables["decode"]["float32"][0]["context"] == [16]


# ---- steps -----------------------------------------------------------------------------------------------------------


def measured_steps(fit: Fit, extra: Mapping[str, tuple[float, float]], graph_rows: list[int]) -> dict[StepPoint, float]:
    """The operators' price and a line over the tokens, by kind."""
    points = step_points(LIMITS, graph_rows, 1.0, seed=3)
    prices = fit.step_prices(points)
    return {p: prices[p] + extra[p.kind][0] + extra[p.kind][1] * p.tokens for p in points}


def test_what_is_beyond_the_operators_is_found_by_kind() -> None:
    engine = EngineConfig.model_validate({"dtype": "float32", "cuda_graph_max_bs": 64})
    fit = Fit(replace(bare(), launches_per_step=None), load_model("qwen3-0.6b"), engine)
    fit.add_operators({point: true_time(point, AXES) for point in points_of(fit)})
    extra = {"graph": (2e6, 1e3), "eager": (5e6, 3e3), "prefill": (7e6, 50.0)}
    steps = measured_steps(fit, extra, [1, 2, 4, *range(8, 65, 8)])
    fit.add_steps(steps)
    assert {point.kind for point in steps} == set(extra)
    for point, price in fit.step_prices(steps).items():
        if point.kind != "graph":  # a graph is padded to its rows
            assert price == pytest.approx(steps[point], rel=2e-3), point
    assert fit.cost_model().price_decode(16, 16 * 64, 64).graph
    assert fit.cost_model().breakdown(BatchShape((), (), 16, 16 * 64, 64))["step"] == pytest.approx(
        2e6 + 16e3, rel=1e-3
    )


def test_a_step_faster_than_its_operators_takes_nothing_beyond_them() -> None:
    fit = fit_of()
    fit.add_operators({point: true_time(point, AXES) for point in points_of(fit)})
    before = fit.step_prices(step_points(LIMITS, (), 1.0, 0))
    fit.add_steps({point: 0.5 * price for point, price in before.items()})
    assert fit.step_prices(before) == before


def test_a_queued_device_launches_once_and_has_no_graphs(tmp_path: Path) -> None:
    model = fit_of().cost_model()
    assert model.price_decode(9, 9 * 64, 64)[1:] == (1, False)
    assert model.price(BatchShape((9,), (0,)))[1:] == (1, False)
    many = OperatorCostModel(
        load_model("qwen3-0.6b"), replace(bare(), launches_per_step=None), EngineConfig(dtype="float32")
    )
    assert many.price_decode(9, 9 * 64, 64).kernels > 100
    assert many.price_decode(9, 9 * 64, 64).graph


def test_a_profile_of_another_model_says_so() -> None:
    fit = fit_of("qwen3-0.6b")
    fit.add_operators({point: true_time(point, AXES) for point in points_of(fit)})
    fit.add_steps({StepPoint("prefill step", "prefill", StepShape((64,), (0,)), False): 1e9})
    other = OperatorCostModel(load_model("llama-3.1-8b"), fit.profile, EngineConfig(dtype="float32"))
    said = " ".join(other.unmeasured())
    for words in (
        "bytes of another model's tokens",
        "vocabulary of",
        "in proportion",
        "nearest measured heads",
        "GEMM n=",
    ):
        assert words in said
    assert other.operators.step_ns("prefill", 64) == pytest.approx(
        fit.cost_model().operators.step_ns("prefill", 64) * 32 / 28
    )


# ---- a calibration ---------------------------------------------------------------------------------------------------


def calibrated() -> DeviceCalibration:
    fit = fit_of()
    fit.add_operators({point: true_time(point, AXES, 0.4) for point in points_of(fit)})
    fit.add_steps(measured_steps(fit, {"eager": (5e6, 3e3), "prefill": (7e6, 50.0)}, []))
    return DeviceCalibration(fit.profile, pd.DataFrame({"operator": ["o"], "measured_ns": [1.0]}), [])


def test_a_saved_profile_prices_as_the_one_in_memory(tmp_path: Path) -> None:
    calibration = calibrated()
    read = load_device(calibration.save(tmp_path))
    engine = EngineConfig(dtype="float32")
    one, other = (OperatorCostModel(load_model("qwen3-0.6b"), p, engine) for p in (calibration.profile, read))
    for shape in (BatchShape((), (), 7, 7 * 300, 900), BatchShape((50, 900), (700, 0), 3, 600, 300)):
        assert one.price(shape) == other.price(shape)
    assert read == replace(calibration.profile, name=read.name)
    assert one.unmeasured() == other.unmeasured()


def test_errors_are_those_of_the_held_out_points() -> None:
    draw = np.random.Generator(np.random.Philox(key=5))
    rows = 40
    points = pd.DataFrame(
        {
            "operator": ["a", "b"] * (rows // 2),
            "measured_ns": draw.uniform(1, 9, rows),
            "predicted_ns": draw.uniform(1, 9, rows),
            "first_ns": draw.uniform(1, 9, rows),
            "second_ns": draw.uniform(1, 9, rows),
            "held_out": draw.uniform(size=rows) < 0.5,
        }
    )
    errors = errors_of(points)
    for name in ("a", "b"):
        mine = points[points.operator == name].to_dict("records")
        held = [row["predicted_ns"] / row["measured_ns"] - 1 for row in mine if row["held_out"]]
        assert errors.loc[name, "points"] == len(held)
        assert errors.loc[name, "mean"] == pytest.approx(sum(map(abs, held)) / len(held))
        assert errors.loc[name, "signed"] == pytest.approx(sum(held) / len(held))
        assert errors.loc[name, "p90"] == pytest.approx(np.percentile(np.abs(held), 90))
        noise = [abs(row["first_ns"] - row["second_ns"]) / row["measured_ns"] for row in mine]
        assert errors.loc[name, "noise"] == pytest.approx(sum(noise) / len(noise))


def test_rounds_go_over_all_points_in_changing_order() -> None:
    points, seen = [Point("o", tokens) for tokens in range(1, 9)], []

    def time_of(point: Point) -> int:
        seen.append(point)
        return point.tokens

    times = in_rounds(points, time_of, seconds=-1.0, seed=0)
    assert times == {point: [point.tokens] * 2 for point in points}
    first, second = seen[:8], seen[8:]
    assert first != second and set(first) == set(second) == set(points)
    assert all(len(rounds) == 21 for rounds in in_rounds(points, time_of, seconds=1e9, seed=0).values())


# ---- what is measured ------------------------------------------------------------------------------------------------


@given(st.integers(1, 100), st.integers(1, 10000), st.sampled_from([0.5, 1.0, 2.0, 4.0]), st.integers(2, 4))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_held_out_knots_lie_between_the_others(low: int, more: int, per_octave: float, every: int) -> None:
    knots = axis(low, low + more, per_octave)
    assert knots == sorted(set(knots)) and knots[0] == low and knots[-1] == low + more
    held = amid(knots, every)
    assert not set(held) & set(knots)
    assert all(knots[0] < x < knots[-1] for x in held)


limits = st.builds(
    Limits,
    tokens=st.integers(16, 4096),
    rows=st.integers(1, 128),
    context=st.integers(16, 4096),
    kv_tokens=st.integers(512, 1 << 16),
    page_size=st.sampled_from([1, 16]),
)


@given(limits, st.integers(0, 99), st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_steps_are_what_an_engine_takes(limits: Limits, seed: int, graphs: bool) -> None:
    points = step_points(limits, [1, 2, 4, 8] if graphs else [], 1.0, seed)
    assert points == step_points(limits, [1, 2, 4, 8] if graphs else [], 1.0, seed)
    for point in points:
        new, prefix, contexts = point.shape
        assert len(new) == len(prefix) and sum(new) + len(contexts) <= max(limits.tokens, limits.rows)
        assert len(new) + len(contexts) <= max(limits.rows, 1) + 1
        assert all(1 <= n + p <= limits.context for n, p in zip(new, prefix, strict=True))
        assert all(4 <= context <= limits.context for context in contexts)
        assert point.kind == "prefill" or (point.kind == "graph") <= (len(contexts) <= 8)
        assert point.held_out or point.plain
    kinds = {point.what for point in points if point.held_out and not point.plain}
    assert {"decode step", "prefill step", "prefill step behind prefix"} <= kinds


# ---- tables ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)), min_size=2, max_size=6), st.floats(0, 100))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_inverse_of_a_rising_curve(steps: list[tuple[float, float]], x: float) -> None:
    xs, ys = np.cumsum([s for s, _ in steps]), np.cumsum([s for _, s in steps])
    curve = Curve(xs, ys)
    assert curve.inverse(curve.at(x)) == pytest.approx(max(x, xs[0]))


BEHIND = {
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "batch": [1, 4],
    "length": [1, 16, 256, 4096],
    "ns": [[900.0, 1600.0, 90000.0, 4e7], [3000.0, 6000.0, 300000.0, 1.5e8]],
    "behind": {"prefix": [16, 1024], "chunk": [1, 16, 256], "ns": [[1000.0, 2000.0, 95000.0], [40000.0, 50000.0, 4e5]]},
}


def test_a_chunk_behind_a_prefix_costs_what_was_measured() -> None:
    table = PrefillAttention([BEHIND], 4, 2, 16)
    assert table.exact and table.measures_prefix
    for i, prefix in enumerate(BEHIND["behind"]["prefix"]):
        for chunk, time in zip(BEHIND["behind"]["chunk"], BEHIND["behind"]["ns"][i], strict=True):
            assert table.at([chunk], [prefix]) == pytest.approx(time)
    assert table.at([256], [0]) == pytest.approx(90000)
    assert table.at([256] * 4, [0] * 4) == pytest.approx(300000)
    alone = table.at([16], [1024])
    assert alone < table.at([16] * 3, [1024] * 3) < 4.5 * alone
    assert table.at([4096, 1], [0, 16]) >= table.at([4096], [0])
