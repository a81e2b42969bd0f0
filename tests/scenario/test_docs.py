from __future__ import annotations

from pathlib import Path

import pytest

from testbed.scenario.disaggregation import Disaggregation, Link
from testbed.scenario.errors import InputError
from testbed.scenario.experts import Experts
from testbed.scenario.load import load_scenario
from testbed.scenario.routing import Routing
from testbed.scenario.schema import ConstantDevice, EngineConfig, Measure, Parallel, Rules, Scenario, Slo
from testbed.scenario.yaml_reader import parse_yaml

PAGE = (Path(__file__).parents[2] / "docs" / "scenario.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "model",
    [Scenario, EngineConfig, Rules, Parallel, Measure, Slo, ConstantDevice, Experts, Routing, Disaggregation, Link],
)
def test_every_field_is_documented(model: type[Scenario]) -> None:
    assert [name for name in model.model_fields if name not in PAGE] == []


def test_the_first_example_loads() -> None:
    example = PAGE.split("```yaml\n")[1].split("```")[0]
    scenario = load_scenario(parse_yaml(example, "docs/scenario.md").data).scenario
    assert scenario.workload.count == 2500


def test_the_example_of_an_error_is_one() -> None:
    with pytest.raises(InputError) as refused:
        load_scenario({"model": "llama-3.1-8b", "workload": {}, "engine": {"loop": "overlp"}})
    (error,) = [error for error in refused.value.errors if "engine.loop" in str(error)]
    assert error.message in PAGE and error.remedy in PAGE
