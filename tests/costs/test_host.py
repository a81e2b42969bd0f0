from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.costs import HostProfile, build_host_profile, constant_host, host_presets, load_host
from testbed.ports import Stage
from testbed.scenario.errors import InputError
from testbed.scenario.schema import Scenario

KERNELS = 360
"""Of a fused dense model of 32 layers."""


def step_us(host: HostProfile, rows: int, kernels: int = KERNELS) -> float:
    stages = [stage for stage in Stage if stage is not Stage.FINISH]  # nothing ends
    return (sum(host.price(stage, rows=rows) for stage in stages) + host.launch_ns(kernels, graph=True)) / 1e3


@pytest.mark.parametrize(
    ("name", "fixed", "slope"),
    [("sglang-0.5", 535, 1.85), ("vllm-v1", 675, 8.1), ("vllm-v1-early", 1200, 8.1), ("vllm-v0", 3500, 80)],
)
@pytest.mark.parametrize("rows", [1, 32, 256])
def test_a_decode_step_costs_what_is_known_of_the_engine(name: str, fixed: float, slope: float, rows: int) -> None:
    assert step_us(load_host(name), rows) == pytest.approx(fixed + slope * rows, rel=0.025)


def test_above_the_knee_the_slope_doubles() -> None:
    host = load_host("sglang-0.5")
    below, above = step_us(host, 500) - step_us(host, 400), step_us(host, 700) - step_us(host, 600)
    assert above == pytest.approx(2 * below, rel=0.01)


def test_an_admitting_step_by_hand() -> None:
    host = load_host("sglang-0.5")
    cost = host.price(Stage.SCHEDULE, rows=4, new_tokens=1000, admitted=2, waiting=100, matched_tokens=50)
    assert cost == 60_000 + 2 * 40_000 + 50 * 20 + 100 * 60 + 100 * 2 * 7
    assert host.price(Stage.SCHEDULE, rows=4, waiting=100) == 25_000 + 4 * 150


def test_waiting_requests_cost_nothing_in_a_decode_step() -> None:
    for name in host_presets():
        host = load_host(name)
        assert host.price(Stage.SCHEDULE, rows=8, waiting=10_000) == host.price(Stage.SCHEDULE, rows=8)


def test_launching() -> None:
    host = load_host("sglang-0.5")
    assert host.launch_ns(KERNELS, graph=True) == 20_000 + 250 * KERNELS
    assert host.launch_ns(KERNELS, graph=False) == 8_000 * KERNELS
    assert host.launch_ns(0, graph=True) == host.launch_ns(0, graph=False) == 0


def test_nothing_costs_nothing() -> None:
    host = load_host("none")
    assert step_us(host, 100) == 0
    assert host.price(Stage.SCHEDULE, 1, 2, 3, 4, 5) == 0
    assert host.guesses() == []


def test_constant_is_charged_once() -> None:
    host = constant_host(7)
    assert [host.price(stage, rows=3, admitted=1) for stage in Stage] == [0, 7, 0, 0, 0, 0, 0, 0, 0]
    assert host.launch_ns(9, graph=False) == 0


def test_tensor_parallelism_adds_the_broadcast() -> None:
    one, two = load_host("sglang-0.5"), load_host("sglang-0.5", tp=2)
    assert two.price(Stage.RECEIVE) - one.price(Stage.RECEIVE) == 150_000
    assert len(two.guesses()) == len(one.guesses()) + 1


def test_cpu_speed_scales_everything() -> None:
    reference, slow = load_host("sglang-0.5"), load_host("sglang-0.5", cpu_speed=1.2)
    assert step_us(slow, 64) == pytest.approx(2 * step_us(reference, 64), rel=1e-6)


def test_guesses_are_named_with_values() -> None:
    assert any(line.startswith("stages.prepare.fixed = 250 us") for line in load_host("sglang-0.5").guesses())
    guessed = {line.split(".")[1] for line in load_host("testbed").guesses() if line.startswith("stages.")}
    assert guessed == {"launch", "sample", "wait"}, "of our own host, what a GPU adds is not measured yet"


def test_our_host_is_leaner() -> None:
    assert step_us(load_host("testbed"), 256, 0) < 0.2 * step_us(load_host("sglang-0.5"), 256, 0)


@given(
    st.sampled_from(host_presets()),
    st.sampled_from(list(Stage)),
    st.tuples(*[st.integers(0, 3000)] * 5),
    st.integers(0, 4),
    st.integers(0, 500),
)
def test_no_argument_makes_a_stage_cheaper(
    name: str, stage: Stage, sizes: tuple[int, ...], which: int, more: int
) -> None:
    host = load_host(name)
    larger = [size + (more if i == which else 0) for i, size in enumerate(sizes)]
    kinds = {bool(new_tokens or admitted) for _, new_tokens, admitted, _, _ in (sizes, larger)}
    assert host.price(stage, *sizes) >= 0
    assert len(kinds) > 1 or host.price(stage, *sizes) <= host.price(stage, *larger)  # a kind of step has its own line


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_in_the_same_form(tmp_path: Path) -> None:
    text = "stages: {wait: {decode: {fixed_us: [3, measured, x]}}}\nlaunch: {graph_us: [2, guessed, y]}\n"
    host = load_host(write(tmp_path / "mine.yaml", text))
    assert (host.name, host.price(Stage.WAIT), host.price(Stage.WAIT, admitted=1)) == ("mine", 3000, 0)
    assert host.guesses() == ["launch.graph = 2 us (y)"]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("stages: {}\n", "launch"),
        ("stages: {}\nlaunch: {}\nfoo: 1\n", "foo"),
        ("stages: {waiting: {}}\nlaunch: {}\n", "stages: waiting"),
        ("stages: {wait: {fixed: [1, measured, x]}}\nlaunch: {}\n", "stages.wait: fixed"),
        ("stages: {wait: {fixed_us: 1}}\nlaunch: {}\n", "stages.wait.fixed_us"),
        ("stages: {wait: {fixed_us: [-1, measured, x]}}\nlaunch: {}\n", "stages.wait: fixed_us"),
        ("stages: {wait: {fixed_us: [.nan, measured, x]}}\nlaunch: {}\n", "stages.wait: fixed_us"),
        ("stages: {wait: {fixed_us: [1, seen, x]}}\nlaunch: {}\n", "stages.wait.fixed_us"),
        ("stages: {}\nlaunch: {}\nat_cpu_speed: 0\n", "at_cpu_speed"),
        ("- 1\n", ""),
        ("stages: [\n", ":2:1"),
    ],
)
def test_a_wrong_file_names_the_place(tmp_path: Path, text: str, where: str) -> None:
    path = write(tmp_path / "host.yaml", text)
    with pytest.raises(InputError) as caught:
        load_host(path)
    assert str(path) in caught.value.where
    assert caught.value.where.endswith(where)


def test_a_misspelt_preset_suggests_the_near_one() -> None:
    with pytest.raises(InputError, match=r"did you mean sglang-0\.5"):
        load_host("sglang-05")


def test_from_a_scenario(tmp_path: Path) -> None:
    base = {"model": "llama-3.1-8b", "workload": {"requests": {"trace": "x.csv"}}}
    assert build_host_profile(Scenario.model_validate(base)).name == "testbed"
    constant = Scenario.model_validate({**base, "host": {"constant": {"iteration_ns": 5}}})
    assert build_host_profile(constant).price(Stage.SCHEDULE) == 5
    write(tmp_path / "mine.yaml", "stages: {}\nlaunch: {}\n")
    assert build_host_profile(Scenario.model_validate({**base, "host": "mine.yaml"}), tmp_path).name == "mine"
