"""A device calibration from end to end, on the CPU with a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from testbed.costs import OperatorCostModel, load_device
from testbed.engine.models.create import Sizes, create_model
from testbed.scenario.errors import InputError
from testbed.scenario.models import load_model
from testbed.scenario.schema import Scenario
from testbed.study.calibration.device import DeviceCalibration, measure_device

LIMITS = {"kv_tokens": 256, "context_length": 256, "max_running_requests": 4, "chunked_prefill_size": 256}
"""So little KV that it is written in one step, however busy the machine is."""


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    model = create_model("qwen3-0.6b", tmp_path_factory.mktemp("model") / "tiny", Sizes(layers=1, hidden=32))
    lengths = {"prompt_tokens": 8, "output_tokens": 8}
    return Scenario.model_validate(
        {
            "model": str(model),
            "engine": {"dtype": "float32", **LIMITS},
            "workload": {"arrivals": {"kind": "all_at_once"}, "lengths": lengths, "count": 1},
        }
    )


@pytest.fixture(scope="module")
def calibration(scenario: Scenario) -> DeviceCalibration:
    return measure_device(scenario, minutes=0.1)


def test_a_device_is_measured_and_its_steps_are_of_the_predicted_size(
    calibration: DeviceCalibration, scenario: Scenario, tmp_path: Path
) -> None:
    points, errors = calibration.points, calibration.errors()
    steps = points[points["operator"].str.endswith("step") | points["operator"].str.endswith("prefix")]
    assert {"decode step", "prefill step", "prefill step behind prefix", "mixed step"} <= set(steps["operator"])
    assert (points["measured_ns"][points["floor_ns"] > 0] > 0).all()
    ratio = steps["predicted_ns"] / steps["measured_ns"]
    assert 1 / 5 < np.median(ratio) < 5  # that the pieces fit together; how well is for a quiet machine to say
    assert set(errors.index) == set(points["operator"]) and (errors["points"] >= 0).all()
    profile = load_device(calibration.save(tmp_path))
    assert profile.launches_per_step == 1 and profile.fit["held_out"].keys() == set(errors.index)
    priced = OperatorCostModel(load_model(scenario.model), profile, scenario.engine)
    flat = "decode rows of unequal context"  # says nothing where noise leaves attention flat over the context
    assert [what for what in priced.unmeasured() if "sum of its parts" not in what and flat not in what] == []


def test_no_operator_in_the_profile_beats_a_ceiling(calibration: DeviceCalibration) -> None:
    operators = calibration.points[calibration.points["floor_ns"] > 0]
    assert len(operators) > 50
    assert (operators["predicted_ns"] >= 0.999 * operators["floor_ns"]).all()


def test_the_notes_say_what_a_reader_must_know(calibration: DeviceCalibration) -> None:
    notes = "\n".join(calibration.notes)
    for words in ("attention backend: torch", "cores of this machine", "all-reduce", "greedy", "measured up to"):
        assert words in notes


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan")])
def test_no_time_is_refused(scenario: Scenario, minutes: float) -> None:
    with pytest.raises(InputError, match="no time"):
        measure_device(scenario, minutes)


def test_what_the_engine_does_not_do_is_refused(scenario: Scenario) -> None:
    two = scenario.model_copy(update={"engine": scenario.engine.model_copy(update={"quantization": "fp8"})})
    with pytest.raises(InputError, match="one dtype"):
        measure_device(two)
