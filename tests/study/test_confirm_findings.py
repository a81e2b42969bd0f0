"""Whatever is wrong is called by its name, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from testbed import api
from testbed.costs import device_presets, load_device
from testbed.metrics.run import Run
from testbed.metrics.table import percent
from testbed.study.confirm.errors import FigureError
from testbed.study.confirm.findings import CAVEATS, HEADLINE, PROFILES, find, is_profile_of, verdict
from testbed.study.confirm.join import Joined, join
from testbed.study.confirm.run import confirm, profiles_of
from testbed.study.confirm.text import table
from tests.study.mutants import MUTANTS, called, confirmed, scenario


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_named(name: str, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    found = confirmed(mutant, tmp_path)
    findings = [finding for finding in found.findings["one"] if finding.cause not in CAVEATS]
    if not mutant.cause:  # a busy machine may stretch a stage of the host: that is a cause too, but nothing else is
        assert {finding.cause for finding in findings} <= {"host profile"}
        return
    named = called(mutant, findings)
    assert named is not None, [str(one) for one in findings]
    if mutant.factor is not None:
        assert named.factor is not None and mutant.factor / 2 < named.factor < mutant.factor * 1.01
    assert f"{findings[0].cause}: {findings[0].figure}" in found.verdicts["one"]
    assert found.verdicts["one"].startswith(("agrees", "differs")) == (named.cause in PROFILES)
    assert named.remedy and str(named) in table(found)


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Joined:
    true = scenario(tmp_path_factory.mktemp("hosts"))
    real = [api.execute(true, paced=True) for _ in range(2)]
    return join("one", api.simulate(true), real, profiles_of(true))


def causes(joined: Joined) -> dict[str, str]:
    """Places by cause."""
    return {finding.cause: finding.place for finding in find(joined)}


def relabelled(joined: Joined, **meta: Any) -> Joined:
    real = tuple(Run(run.scenario, run.records, {**run.meta, **meta}) for run in joined.real)
    return replace(joined, real=real)


def test_a_profile_of_another_device(joined: Joined) -> None:
    h100 = load_device("h100-sxm")
    on = relabelled(joined, label="real", device="NVIDIA H100 80GB HBM3")
    with_profile = replace(on, profiles=replace(on.profiles, device=h100))
    assert "other device" not in causes(with_profile)
    other = relabelled(with_profile, label="real", device="NVIDIA A100-SXM4-80GB")
    assert causes(other)["other device"] == "NVIDIA A100-SXM4-80GB"
    assert "constants of the scenario" in next(str(one) for one in find(on) if one.cause == "other device")
    assert "other device" not in causes(joined), "a paced run is the model itself"


@pytest.mark.parametrize("preset", device_presets())
def test_presets_know_their_devices(preset: str) -> None:
    """Names as drivers report them: each belongs to its own preset alone."""
    names = {
        "a100-sxm": "NVIDIA A100-SXM4-80GB",
        "b200": "NVIDIA B200",
        "h100-sxm": "NVIDIA H100 80GB HBM3",
        "h200-sxm": "NVIDIA H200",
        "l40s": "NVIDIA L40S",
        "rtx-4090": "NVIDIA GeForce RTX 4090",
        "rtx-pro-6000": "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    }
    device = load_device(preset)
    assert [other for other, ran in names.items() if is_profile_of(device, ran)] == [preset]
    calibrated = replace(device, name="this machine", device="AMD EPYC 7B13")
    assert is_profile_of(calibrated, "AMD EPYC 7B13") and not is_profile_of(calibrated, "Intel Xeon")


def test_another_memory(joined: Joined) -> None:
    (finding,) = (one for one in find(relabelled(joined, kv_tokens=123)) if one.cause == "memory")
    assert "simulated with 400 KV tokens, run with 123" in finding.figure and "123" in finding.remedy


def test_an_interrupted_run(joined: Joined) -> None:
    assert causes(relabelled(joined, interrupted=True))["interrupted"] in ("run 1", "run 2")
    assert "interrupted" not in causes(joined)


def with_figures(joined: Joined, **changes: float) -> Joined:
    """Every headline figure with these fields."""
    figures = {key: joined.figures[key]._replace(**changes) for key in HEADLINE}
    return replace(joined, figures=joined.figures | figures)


def sound(joined: Joined) -> Joined:
    """Without the findings that a busy machine may add."""
    return replace(joined, steps=joined.steps.iloc[:0], host=joined.host.iloc[:0])


def test_noise_is_told_with_the_figure(joined: Joined) -> None:
    noisy = with_figures(joined, noise=0.2)
    assert causes(noisy)["noise"] in HEADLINE
    assert "noise" not in causes(with_figures(joined, noise=0.04))
    single = with_figures(joined, noise=float("nan"))
    assert "noise" not in causes(single)


def test_too_few_requests_for_a_percentile(joined: Joined) -> None:
    assert causes(joined)["few requests"] == "p90", "1.6 of 16 requests lie beyond it"


def test_profiles_come_in_the_order_of_what_they_cost(joined: Joined) -> None:
    steps = joined.steps.assign(predicted_ns=joined.steps["measured_ns"] * 2)
    host = joined.host.assign(
        predicted_ns=np.where(
            joined.host["stage"] == "send", joined.host["measured_ns"] * 50, joined.host["measured_ns"]
        )
    )
    found = [one for one in find(replace(joined, steps=steps, host=host)) if one.cause not in CAVEATS]
    assert [one.place for one in found] == ["send", "decode, graph", "extend, graph"]
    assert [one.factor for one in found] == pytest.approx([50, 2, 2])
    assert "quieter" in found[0].remedy, "the host that is injected is the one simulated"
    less = replace(joined, steps=joined.steps.assign(predicted_ns=joined.steps["measured_ns"] * 0.92), host=host)
    assert "device profile" not in causes(less), "8 % is no wrong profile"
    few = joined.steps.assign(predicted_ns=joined.steps["measured_ns"].where(joined.steps["step"] > 1, 10**6))
    assert "device profile" not in causes(replace(joined, steps=few)), "two steps are worth nothing"


def test_an_error_below_its_own_noise_is_no_wrong_profile(joined: Joined) -> None:
    factor = np.where(joined.steps["run"] == 0, 1.0, 1.4)
    steps = joined.steps.assign(predicted_ns=joined.steps["measured_ns"] * factor)
    assert "device profile" not in causes(replace(joined, steps=steps))


def test_verdicts(joined: Joined) -> None:
    quiet = sound(joined)

    def said(**changes: float) -> str:
        changed = with_figures(quiet, **changes)
        return verdict(changed, find(changed))

    assert said(error=0.03, noise=0.04).startswith("agrees within the noise, 3.0 % (")
    assert said(error=-0.03, noise=0.01).startswith("agrees within 3.0 % (")
    noisy = said(error=0.5, noise=0.6)
    assert noisy.startswith("differs by up to 50.0 %") and "%), within the noise" in noisy, "hidden, not in agreement"
    assert (
        said(error=0.3, noise=0.01)
        == "differs by up to 30.0 % (output_throughput, noise 1.0 %), and no join names a cause"
    )
    nothing = {key: FigureError(key, *[float("nan")] * 4, ()) for key in joined.figures}
    assert verdict(replace(quiet, figures=nothing), []).startswith("nothing to compare")


def test_variants_take_turns_and_every_run_is_kept(tmp_path: Path) -> None:
    """A B A B, the simulations first."""
    true = scenario(tmp_path, count=3)
    order: list[tuple[str, str]] = []
    kept: list[tuple[str, str]] = []

    def noted(kind: str, run: Callable[[Any], Run]) -> Callable[[str, Any], Run]:
        def execute(name: str, one: Any) -> Run:
            order.append((kind, name))
            return run(one)

        return execute

    found = confirm(
        "two",
        {"a": true, "b": true},
        noted("real", lambda one: api.execute(one, paced=True)),
        simulate=noted("simulated", api.simulate),
        repeats=3,
        keep=lambda name, label, run: kept.append((name, label)),
    )
    assert order == [("simulated", "a"), ("simulated", "b"), *[("real", "a"), ("real", "b")] * 3]
    assert kept == [(n, "simulated") for n in "ab"] + [(n, f"real-{k}") for k in (1, 2, 3) for n in "ab"]
    assert [len(one.real) for one in found.variants] == [3, 3]
    assert found.rankings[0].figure == "output_throughput"
    text = table(found)
    assert "ranking by mean_ttft_ms: " in text
    for one in found.variants:
        assert f"{one.name}: {found.verdicts[one.name]}" in text
        assert percent(one.figures["mean_tpot_ms"].error) in text
    worst = found.worst_errors()
    errors = [abs(one.figures["mean_tpot_ms"].error) for one in found.variants]
    assert worst["mean_tpot_ms"] == pytest.approx(100 * max(errors))
