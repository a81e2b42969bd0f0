"""Prices of the presets stay what they were, to the nanosecond: a change of the tables' form must not show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from testbed.batch import BatchShape
from testbed.costs import OperatorCostModel, device_presets, load_device
from testbed.scenario.models import load_model
from testbed.scenario.schema import EngineConfig

GOLDEN: dict[str, list[int]] = json.loads((Path(__file__).parent / "golden_prices.json").read_text())
"""ns by "device model dtype", one for each of ``SHAPES``."""
PARALLEL: dict[str, list[int]] = json.loads((Path(__file__).parent / "golden_parallel.json").read_text())
"""Likewise, by "device model tp pp stage"."""
SHAPES = (
    BatchShape((), (), 1, 512, 512),
    BatchShape((), (), 37, 37 * 900, 4000),
    BatchShape((), (), 200, 200 * 1500, 1500),
    BatchShape((700,), (0,)),
    BatchShape((64, 512, 9), (3000, 0, 17)),
    BatchShape((1800, 300), (0, 5000), 23, 23 * 700, 2100),
)


def test_every_preset_is_held() -> None:
    assert {key.split()[0] for key in GOLDEN} == set(device_presets())


@pytest.mark.parametrize("key", GOLDEN)
def test_presets_cost_what_they_did(key: str) -> None:
    device, model, dtype = key.split()
    engine = EngineConfig.model_validate({"dtype": dtype, "cuda_graph_max_bs": 256})
    priced = OperatorCostModel(load_model(model), load_device(device), engine)
    assert [priced.price(shape).gpu_ns for shape in SHAPES] == GOLDEN[key]


@pytest.mark.parametrize("key", PARALLEL)
def test_parallel_layouts_cost_what_they_did(key: str) -> None:
    device, model, tp, pp, stage = key.split()
    engine = EngineConfig.model_validate({"cuda_graph_max_bs": 256, "parallel": {"tp": int(tp), "pp": int(pp)}})
    priced = OperatorCostModel(load_model(model), load_device(device), engine, int(stage))
    assert [priced.price(shape).gpu_ns for shape in SHAPES] == PARALLEL[key]
