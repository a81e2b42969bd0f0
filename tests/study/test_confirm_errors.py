"""The joins of times and figures: against naive computations, and on runs whose errors are known exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed import api
from testbed.batch import BatchShape, ForwardMode, StepCost
from testbed.costs import load_host
from testbed.metrics.laws import HOST_LANE
from testbed.metrics.run import Run
from testbed.ports import Stage
from testbed.study.confirm import errors
from testbed.study.confirm.join import Joined, join
from testbed.study.confirm.run import profiles_of
from testbed.study.replay import replay
from tests.study.mutants import host_file, scenario

MakeRun = Callable[..., Run]


def slowed(run: Run, factor: int) -> Run:
    """The same run, ``factor`` times as slow: every time stamp and duration."""
    records = run.records
    tables = {
        name: {key: column * factor if key.endswith("_ns") else column for key, column in table.items()}
        for name, table in (("requests", records.requests), ("steps", records.steps), ("spans", records.spans))
    }
    return Run(run.scenario, replace(records, **tables, token_times_ns=records.token_times_ns * factor), run.meta)


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Joined:
    """A simulation and two paced runs with chunks and both kinds of steps."""
    true = scenario(tmp_path_factory.mktemp("hosts"))
    real = [api.execute(true, paced=True) for _ in range(2)]
    return join("one", api.simulate(true), real, profiles_of(true))


def test_a_run_beside_itself_has_no_error(make_run: MakeRun) -> None:
    run = make_run(100)
    found = errors.figure_errors(run, [run, run])
    assert list(found) == list(errors.FIGURES)
    assert {(row.error, row.noise) for row in found.values()} == {(0.0, 0.0)}
    assert (errors.request_errors(run, run).fillna(0) == 0).all(axis=None)
    assert {share.difference for share in errors.bubbles(run, [run])} == {0.0}


@pytest.mark.parametrize("factor", [2, 10])
def test_a_run_beside_itself_slowed_has_exactly_that_error(make_run: MakeRun, factor: int) -> None:
    run = make_run(100)
    slow = slowed(run, factor)
    found = errors.figure_errors(slow, [run])
    for key, row in found.items():
        if key.endswith(("_ms", "makespan_s")):
            assert row.error == pytest.approx(factor - 1)
        elif key.endswith("throughput"):
            assert row.error == pytest.approx(1 / factor - 1)
        else:
            assert row.error == pytest.approx(0), "shares do not change"
        assert np.isnan(row.noise), "one repeat tells no noise"
    single = errors.request_errors(slow, run).to_numpy()
    assert np.allclose(single[~np.isnan(single)], factor - 1)
    for quantiles in errors.request_quantiles(errors.request_errors(slow, run)):
        assert quantiles[2:] == pytest.approx((factor - 1,) * 5)


def test_noise_is_the_largest_pairwise_difference(make_run: MakeRun) -> None:
    repeats = [make_run(60, host_us=us) for us in (400, 700, 500)]
    for key, row in errors.figure_errors(repeats[0], repeats).items():
        values = [errors.figures_of(run)[key] for run in repeats]
        assert row.repeats == pytest.approx(values)
        apart = max(abs(one - other) for one, other in combinations(values, 2))
        mean = sum(values) / 3
        assert row.real == pytest.approx(mean)
        assert row.noise == pytest.approx(apart / mean if apart else 0)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_relative_is_the_quotient(one: float, other: float) -> None:
    found = float(errors.relative(one, other))
    if one == other:
        assert found == 0
    elif other == 0:
        assert np.isnan(found)
    else:
        assert found == (one - other) / other


def test_request_errors_are_matched_by_id(make_run: MakeRun) -> None:
    run = make_run(50)
    records = run.records
    order = np.arange(49, -1, -1)
    turned = {
        key: [column[i] for i in order] if isinstance(column, list) else column[order]
        for key, column in records.requests.items()
    }
    kept = {key: column[5:] for key, column in turned.items()}
    lengths = np.diff(records.token_offsets)[order][5:]
    other = Run(run.scenario, replace(records, requests=kept, token_offsets=np.concatenate([[0], np.cumsum(lengths)])))
    found = errors.request_errors(run, other)
    assert list(found.index) == [rid for rid in run.records.requests["id"] if rid in kept["id"]]
    assert len(found) == 45 and (found.fillna(0) == 0).all(axis=None)


def test_quantiles_of_request_errors_are_those_of_numpy(make_run: MakeRun) -> None:
    found = errors.request_errors(make_run(80), make_run(80, host_us=900))
    for quantiles in errors.request_quantiles(found):
        values = found[quantiles.latency].dropna()
        assert quantiles.requests == len(values)
        assert quantiles[2:] == pytest.approx([np.percentile(values, p) for p in (5, 25, 50, 75, 95)])
    nothing = errors.request_quantiles(found.iloc[:0])
    assert [row.requests for row in nothing] == [0, 0, 0] and all(np.isnan(row.p50) for row in nothing)


class Doubling:
    """A cost model whose price says which shape it was asked for, on top of twice the true one."""

    def __init__(self, true: Any) -> None:
        self.true = true

    def price(self, shape: BatchShape) -> StepCost:
        cost = self.true.price(shape)
        return cost._replace(gpu_ns=2 * cost.gpu_ns + shape.context_tokens)


def test_every_step_is_priced_from_its_shape(joined: Joined) -> None:
    """Against a loop over the decision's own columns: each step, in order, with the price of exactly its shape."""
    run, again = joined.real[0], joined.replayed[0]
    model = joined.profiles.cost_model
    table = run.records.steps
    found = errors.step_times(run, again, Doubling(model))  # type: ignore[arg-type]
    assert len(found) == len(table["step"]) == len(again.shapes) > 100
    for index, row in enumerate(found.itertuples()):
        shape = again.shapes[index]
        assert sum(shape.new_tokens) == table["new_tokens"][index] and shape.decodes == table["decode_rows"][index]
        assert shape.context_tokens == table["context_tokens"][index]
        assert row.predicted_ns == 2 * model.price(shape).gpu_ns + shape.context_tokens
        assert row.measured_ns == table["end_ns"][index] - table["start_ns"][index]
        mode = ForwardMode(int(table["mode"][index])).name.lower()
        assert row.kind == f"{mode}, graph"
    assert set(found["kind"]) == {"decode, graph", "extend, graph"}


def test_paced_steps_take_what_the_model_says(joined: Joined) -> None:
    """The device of a paced run is the model: no error at all."""
    for row in errors.time_errors(joined.steps, ["kind"]):
        assert (row.error, row.median_error, row.p90_abs_error, row.noise) == (0, 0, 0, 0)


def test_an_eager_step_is_no_shorter_than_its_launch(joined: Joined) -> None:
    run, again = joined.real[0], joined.replayed[0]

    class Eager:
        def price(self, shape: BatchShape) -> StepCost:
            return StepCost(1, 10, False)

    table, spans = run.records.steps, run.records.spans
    found = errors.step_times(run, again, Eager())  # type: ignore[arg-type]
    launched = {
        int(spans["step"][i]): int(spans["end_ns"][i])
        for i in range(len(spans["step"]))
        if spans["lane"][i] == HOST_LANE and spans["name"][i] == Stage.LAUNCH
    }
    expected = [max(1, launched[i] - int(table["start_ns"][i])) for i in range(len(table["step"]))]
    assert found["predicted_ns"].tolist() == expected


def test_every_charge_is_priced_beside_its_span(joined: Joined) -> None:
    """Row i of the replay's work is host span i of the run, priced with exactly its sizes."""
    run, again, profiles = joined.real[1], joined.replayed[1], joined.profiles
    spans = run.records.spans
    host = [i for i in range(len(spans["lane"])) if spans["lane"][i] == HOST_LANE]
    found = errors.host_times(run, again, profiles.cost_model, profiles.host)
    assert len(found) == len(host)
    names = ("rows", "new_tokens", "admitted", "waiting", "matched_tokens")
    for index, (place, row) in enumerate(zip(host, found.itertuples(), strict=True)):
        stage = Stage(int(spans["name"][place]))
        assert row.stage == stage.name.lower() and row.step == spans["step"][place]
        price = profiles.host.price(stage, *(int(again.work[name][index]) for name in names))
        if stage is Stage.LAUNCH:
            cost = profiles.cost_model.price(again.shapes[row.step])
            price += profiles.host.launch_ns(cost.kernels, cost.graph)
        assert row.predicted_ns == price
        assert row.measured_ns == spans["end_ns"][place] - spans["begin_ns"][place]
    assert {"decode", "extend"} <= set(found["kind"])


def test_kinds_of_host_work_are_the_modes_of_its_step(joined: Joined) -> None:
    steps = joined.real[0].records.steps
    modes = {
        int(step): ForwardMode(int(mode)).name.lower() for step, mode in zip(steps["step"], steps["mode"], strict=True)
    }
    mine = joined.host[joined.host["run"] == 0]
    assert mine["kind"].tolist() == [modes.get(step, errors.NO_STEP) for step in mine["step"]]


def test_a_launch_is_priced_by_its_kernels_too(joined: Joined, tmp_path: Path) -> None:
    path = Path(host_file(tmp_path, "kernels"))
    priced = "launch: {graph_us: [7, measured, x], eager_per_kernel_us: [3, measured, x]}"
    path.write_text(path.read_text().replace("launch: {}", priced))

    class Kernels:
        def price(self, shape: BatchShape) -> StepCost:
            return StepCost(1, 40, not shape.new_tokens)

    run, again = joined.real[0], joined.replayed[0]
    found = errors.host_times(run, again, Kernels(), load_host(path))  # type: ignore[arg-type]
    launches = found[found["stage"] == "launch"]
    expected = [100_000 + (3_000 * 40 if kind == "extend" else 7_000) for kind in launches["kind"]]
    assert launches["predicted_ns"].tolist() == expected


def test_steps_behind_a_divergence_are_left_out(joined: Joined) -> None:
    run = joined.real[0]
    cut = replay(run, until_step=20)
    again = replace(joined.replayed[0], divergence=replace(cut.last, step=20))
    profiles = joined.profiles
    assert errors.step_times(run, again, profiles.cost_model)["step"].tolist() == list(range(20))
    charges = errors.host_times(run, again, profiles.cost_model, profiles.host)
    whole = errors.host_times(run, joined.replayed[0], profiles.cost_model, profiles.host)
    assert charges["step"].max() < 20 and charges["step"].max() >= 18
    pd.testing.assert_frame_equal(charges, whole.iloc[: len(charges)])


times = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from([0, 1]), st.integers(0, 10**6), st.integers(1, 10**6)), min_size=1
)


@given(times)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_sums_of_times_are_those_of_a_loop(rows: list[tuple[str, int, int, int]]) -> None:
    frame = pd.DataFrame(rows, columns=["kind", "run", "predicted_ns", "measured_ns"])
    found = errors.time_errors(frame, ["kind"])
    assert [row.measured_ms for row in found] == sorted((row.measured_ms for row in found), reverse=True)
    for row in found:
        mine = [one for one in rows if one[0] == row.name]
        predicted, measured = sum(one[2] for one in mine), sum(one[3] for one in mine)
        single = sorted((one[2] - one[3]) / one[3] for one in mine)
        assert row.number == len(mine)
        assert (row.predicted_ms, row.measured_ms) == pytest.approx((predicted / 1e6, measured / 1e6))
        assert row.error == pytest.approx((predicted - measured) / measured, abs=1e-12)
        assert row.factor == pytest.approx(predicted / measured)
        assert row.median_error == pytest.approx(np.median(single), abs=1e-12)
        assert row.p90_abs_error == pytest.approx(np.percentile(np.abs(single), 90), abs=1e-12)
        each = []
        for run in (0, 1):
            sums = [sum(one[place] for one in mine if one[1] == run) for place in (2, 3)]
            each += [sums[0] / sums[1] - 1] if sums[1] else []
        assert row.noise == pytest.approx(abs(each[0] - each[1]), abs=1e-9) if len(each) == 2 else np.isnan(row.noise)
    assert {row.name for row in found} == {one[0] for one in rows}


def test_groups_are_called_by_all_their_columns(joined: Joined) -> None:
    names = {row.name for row in errors.time_errors(joined.host, ["stage", "kind"])}
    assert {"process, decode", "process, extend"} <= names
    assert errors.time_errors(joined.steps.iloc[:0], ["kind"]) == []


def test_bubbles_are_shares_of_the_window(joined: Joined) -> None:
    shares = {share.cause: share for share in joined.bubbles}
    assert sum(share.simulated for share in shares.values()) == pytest.approx(100)
    assert sum(share.real for share in shares.values()) == pytest.approx(100)
    busy = [run.aggregates()["device_busy_percent"] for run in joined.real]
    assert shares["device_busy"].real == pytest.approx(sum(busy) / 2)
    assert shares["device_busy"].noise == pytest.approx(abs(busy[0] - busy[1]))
    simulated = joined.simulated.aggregates()["bubble_host_percent"]
    assert shares["bubble_host"].difference == pytest.approx(simulated - shares["bubble_host"].real)
