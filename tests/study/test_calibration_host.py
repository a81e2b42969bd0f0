"""The host half of a calibration: lines through times that are known, errors against a naive model, files read back."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed import execute, load_scenario
from testbed.costs import HostProfile, load_host
from testbed.costs.host import Terms
from testbed.metrics.columns import ints
from testbed.metrics.run import Run
from testbed.ports import Stage
from testbed.scenario.errors import InputError
from testbed.scenario.schema import Scenario
from testbed.study.calibration.host import (
    AGAIN,
    FIT,
    HELD_OUT,
    MOST_CONTEXT,
    PARTS,
    WARM_STEPS,
    HostCalibration,
    charges_of,
    fit_host,
    measure_host,
)
from testbed.study.calibration.lines import ACCIDENT_NS, fit_line, is_tail, tail_mean, terms_that_pay
from testbed.study.calibration.workloads import ENGINE, host_workloads

FEW = settings(max_examples=25, deadline=None, derandomize=True)
QUICK = {"constant": {"prefill_ns": 60_000, "decode_ns": 40_000}}


def work(seed: int, charges: int = 3000) -> pd.DataFrame:
    """Charges as a loop makes them, of every kind and part."""
    rng = np.random.default_rng(seed)
    stage = rng.integers(0, len(Stage), charges)
    prefill = (rng.random(charges) < 0.4) & (stage <= Stage.LAUNCH)
    admitted = np.where(prefill & (stage <= Stage.SCHEDULE), rng.integers(1, 12, charges), 0)
    new_tokens = np.where(prefill, rng.integers(1, 600, charges), 0)
    schedule = stage == Stage.SCHEDULE
    return pd.DataFrame(
        {
            "stage": [Stage(int(one)).name.lower() for one in stage],
            "kind": np.where(prefill, "prefill", "decode"),
            "step": np.arange(charges) + WARM_STEPS,
            "rows": np.where(stage == Stage.RECEIVE, 0, rng.integers(1, 257, charges)),
            "new_tokens": new_tokens,
            "admitted": admitted,
            "waiting": np.where(schedule, rng.integers(0, 300, charges), 0),
            "matched_tokens": np.where(prefill & schedule, rng.integers(0, 900, charges), 0),
            "graph": 0,
            "eager_kernels": 0,
            "part": rng.choice(PARTS, charges),
        }
    )


def price(host: HostProfile, charge: pd.Series) -> int:
    """A charge priced by a profile, as the runtimes do."""
    sizes = [int(charge[name]) for name in ("rows", "new_tokens", "admitted", "waiting", "matched_tokens")]
    stage = Stage[charge.stage.upper()]
    launch = host.launch_ns(1, True) * charge.graph + host.launch_ns(int(charge.eager_kernels), False)
    return host.price(stage, *sizes) + (int(launch) if stage is Stage.LAUNCH else 0)


def profile(terms: Terms) -> HostProfile:
    same = dict.fromkeys(Stage, terms)
    return HostProfile("known", same, same)


def table(charges: int, seed: int) -> np.ndarray:
    """Columns as a SCHEDULE stage has them: float64 [charges, 5]."""
    rng = np.random.default_rng(seed)
    high = (257, 600, 12, 300)
    return np.column_stack([np.ones(charges), *(rng.integers(0, most, charges) for most in high)]).astype(np.float64)


# What a whole range of a term adds is from as much as the fixed part to ten times it: below that nothing is to be seen.
SHARES = st.lists(st.sampled_from([0.0, 1.0, 3.0, 10.0]), min_size=4, max_size=4)


@FEW
@given(SHARES, st.integers(0, 2**16), st.sampled_from([1_000, 30_000]))
def test_a_known_line_is_found_through_noise_and_weather(shares: list[float], seed: int, fixed_ns: int) -> None:
    columns = table(2500, seed)
    known = fixed_ns * np.array([1.0, *(share / most for share, most in zip(shares, (257, 600, 12, 300), strict=True))])
    rng = np.random.default_rng(seed + 1)
    truth = columns @ known
    measured = truth * rng.lognormal(-0.02, 0.2, len(truth))
    weather = rng.random(len(truth)) < 0.004
    measured[weather] += 10 * truth[weather] + 2e6
    chosen = terms_that_pay(columns, measured)
    assert chosen == [term for term in range(5) if known[term]]
    line = fit_line(columns[:, chosen], measured)
    assert np.quantile(np.abs(columns[:, chosen] @ line / truth - 1), 0.99) < 0.08
    assert (columns[:, chosen] @ line).sum() == pytest.approx(truth.sum(), rel=0.015)
    assert (is_tail(measured, columns[:, chosen] @ line) == weather).all()


@FEW
@given(SHARES, st.integers(0, 2**16))
def test_the_line_keeps_the_sum_of_what_is_not_tail(shares: list[float], seed: int) -> None:
    columns = table(500, seed)
    rng = np.random.default_rng(seed)
    measured = (columns @ np.array([20_000.0, *shares])) * rng.exponential(1.0, 500)
    predicted = columns @ fit_line(columns, measured)
    kept = ~is_tail(measured, predicted)
    assert predicted[kept].sum() == pytest.approx(measured[kept].sum(), rel=1e-3)


def test_the_tail_is_shared_out_but_no_accident() -> None:
    predicted = np.full(100, 1_000.0)
    measured = predicted.copy()
    measured[7], measured[8] = 1_000 + 300_000, 1_000 + 20 * ACCIDENT_NS
    measured[9] = 5_000  # far off, but not by much
    assert is_tail(measured, predicted).nonzero()[0].tolist() == [7, 8]
    assert tail_mean(measured, predicted) == pytest.approx((300_000 + ACCIDENT_NS) / 100)
    assert tail_mean(np.empty(0), np.empty(0)) == 0


def calibrated(seed: int, launches: bool = False) -> HostCalibration:
    """A calibration from made-up times: every stage costs the same, with a fifth of noise."""
    charges = work(seed)
    if launches:
        graph = (charges.kind == "decode") & (charges.stage == "launch")
        charges["graph"] = graph.astype(int)
        charges["eager_kernels"] = 300 * ((charges.stage == "launch") & ~graph).astype(int)
    known = profile(Terms(5_000, 20, 30, 9_000, 0, 40, 0))
    times = np.array([price(known, charge) for _, charge in charges.iterrows()], dtype=np.float64)
    times += 70_000 * charges.graph + 8_000 * charges.eager_kernels
    charges["measured_ns"] = times * np.random.default_rng(seed).lognormal(0, 0.2, len(times))
    return fit_host(charges.assign(workload="made up", loop="normal"), "a test", ["a note"])


@pytest.mark.parametrize("launches", [False, True])
def test_a_written_profile_prices_as_it_was_fitted(tmp_path: Path, launches: bool) -> None:
    found = calibrated(3, launches)
    host = load_host(found.save(tmp_path))
    for _, charge in found.charges.iterrows():
        assert price(host, charge) == pytest.approx(charge.predicted_ns, abs=4)  # each term is cut to a whole ns
    assert {parameter.mark for parameter in host.parameters if parameter.value} == {"measured"}
    assert host.fit["reference_loop_us"] > 0
    assert host.fit["held_out"]["all"]["charges"] == (found.charges.part == HELD_OUT).sum()
    assert ("launch", "decode") in [(line.stage.name.lower(), line.kind) for line in found.lines]
    if launches:
        assert found.launches.graph == pytest.approx(70_000 + 5_000, rel=0.05)  # the stage's own fixed part is in both
        assert found.launches.eager_per_kernel == pytest.approx(8_000 + 5_000 / 300, rel=0.05)


def test_errors_are_those_of_a_naive_model() -> None:
    found = calibrated(5)
    told = found.errors().set_index(["stage", "kind"])
    for stage, kind in [("schedule", "prefill"), ("send", "decode"), ("all", "")]:
        mine = [
            row
            for row in found.charges.to_dict("records")
            if stage == "all" or (row["stage"], row["kind"]) == (stage, kind)
        ]
        held = [(row["measured_ns"], row["predicted_ns"]) for row in mine if row["part"] == HELD_OUT]
        first, again = (mean(row["measured_ns"] for row in mine if row["part"] == part) for part in (FIT, AGAIN))
        row = told.loc[(stage, kind)]
        assert row.charges == len(held)
        assert row.mean_us == pytest.approx(mean(m for m, _ in held) / 1e3)
        assert row.sum_error_percent == pytest.approx(100 * (sum(p for _, p in held) / sum(m for m, _ in held) - 1))
        off = mean(abs(p - m) for m, p in held) / mean(m for m, _ in held)
        assert row.mean_error_percent == pytest.approx(100 * off)
        worse = sum(abs(p - m) / m * 100 > row.p90_error_percent for m, p in held)
        assert worse == pytest.approx(len(held) / 10, abs=1)
        assert row.noise_percent == pytest.approx(100 * (again / first - 1))


def test_a_kind_without_charges_is_told(tmp_path: Path) -> None:
    charges = calibrated(3).charges
    found = fit_host(charges[(charges.stage != "receive") | (charges.kind == "decode")], "a test")
    assert "receive, prefill: no charge was seen; it is priced 0 (more --minutes see more)" in found.notes
    assert load_host(found.save(tmp_path)).price(Stage.RECEIVE, admitted=1) == 0


@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_charges_are_the_host_spans_of_a_run(loop: str) -> None:
    scenario = load_scenario(
        {
            "model": "qwen3-0.6b",
            "device": QUICK,
            "engine": {**ENGINE, "loop": loop},
            "workload": {
                "arrivals": {"kind": "closed_loop", "users": 8},
                "lengths": {"prompt_tokens": 700, "output_tokens": 9},
                "count": 24,
            },
        }
    ).scenario
    run = execute(scenario, paced=True)
    charges = charges_of(run)
    spans = run.spans[(run.spans.lane == 0) & (run.spans.step >= WARM_STEPS)]
    assert charges.stage.tolist() == spans.label.tolist()
    assert charges.measured_ns.tolist() == spans.duration_ns.tolist()
    launches = charges[charges.stage == "launch"]
    steps = run.steps[run.steps.step >= WARM_STEPS]
    assert launches.rows.tolist() == steps.rows.tolist()
    assert launches.new_tokens.tolist() == ints(run.records.steps, "new_tokens")[WARM_STEPS:].tolist()
    assert set(charges.kind) == {"decode", "prefill"}


def test_workloads_stay_within_the_context_and_are_runnable() -> None:
    for context in (256, 2048, 8192):
        for name, changes in host_workloads(0.5, context).items():
            lengths = changes["workload"]["lengths"]
            prefix = changes["workload"].get("prefix", {"prefix_tokens": {"high": 0}})["prefix_tokens"]["high"]
            most = prefix + lengths["prompt_tokens"]["high"] + lengths["output_tokens"]["high"]
            assert most < context, (name, context)


def test_what_the_time_does_not_allow_is_told() -> None:
    scenario = load_scenario(
        {
            "model": "qwen3-0.6b",
            "device": QUICK,
            "engine": ENGINE,
            "workload": {"arrivals": {"kind": "all_at_once"}, "lengths": {"prompt_tokens": 1, "output_tokens": 1},
                         "count": 1},
        }
    ).scenario  # fmt: skip
    told: list[str] = []
    found = measure_host(scenario, 1e-3, lambda one: execute(one, paced=True), tell=told.append)
    assert told == [f"host: rows under the normal loop, {part}" for part in PARTS]
    assert set(found.charges.part) == set(PARTS)
    assert found.notes[0].startswith("left out, for the time was up: rows under the overlap loop, prompts under")


def test_a_broken_fit_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / "host.yaml"
    path.write_text("stages: {}\nlaunch: {}\nfit: 3\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_host(path)
    assert caught.value.where.endswith("fit")


def test_a_long_context_makes_no_longer_requests() -> None:
    """A calibration of long contexts ends in time too."""
    seen: list[Scenario] = []

    def stop(one: Scenario) -> Run:
        seen.append(one)
        raise KeyboardInterrupt

    for context in (2048, MOST_CONTEXT, 32_768):
        content = {
            "model": "qwen3-0.6b",
            "engine": {"context_length": context},
            "workload": {"arrivals": {"kind": "all_at_once"}, "lengths": {"prompt_tokens": 1, "output_tokens": 1},
                         "count": 1},
        }  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            measure_host(load_scenario(content).scenario, 1.0, stop)
    short, most, long = (one.workload for one in seen)
    assert short != most == long
