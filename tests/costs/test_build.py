from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from testbed.batch import BatchShape, StepCost
from testbed.costs import (
    ConstantCostModel,
    OperatorCostModel,
    build_cost_model,
    kv_capacity_tokens,
    load_device,
)
from testbed.scenario.errors import InputError
from testbed.scenario.models import load_model
from testbed.scenario.schema import EngineConfig, Scenario


def scenario(**fields: Any) -> Scenario:
    base = {"model": "qwen3-8b", "workload": {"requests": {"trace": "x.csv"}}}
    return Scenario.model_validate({**base, **fields})


def test_a_device_by_name_gives_operators() -> None:
    model = build_cost_model(scenario())
    assert isinstance(model, OperatorCostModel)
    assert model.price(BatchShape((), (), 1, 100, 100)).graph


def test_constants_give_constants() -> None:
    model = build_cost_model(scenario(device={"constant": {"decode_ns": 5}}))
    assert isinstance(model, ConstantCostModel)
    assert model.price_decode(3, 1, 1) == StepCost(5, 0, True)


def test_the_users_own_cost_model_gets_model_device_engine(tmp_path: Path) -> None:
    code = (
        "class Mine:\n    def __init__(self, *parts): self.parts = parts\n"
        "    def price(self, shape): return None\n    def unmeasured(self): return self.parts\n"
    )
    (tmp_path / "mine.py").write_text(code)
    model, device, engine = build_cost_model(scenario(cost_model="mine.py:Mine"), base_dir=tmp_path).unmeasured()
    assert (model.name, device.name, engine.page_size) == ("qwen3-8b", "h100-sxm", 1)


def test_files_are_found_beside_the_scenario(tmp_path: Path) -> None:
    (tmp_path / "card.yaml").write_text(
        "memory_mib: 1000\nbandwidth_gb_s: 100\ntflops: {bfloat16: 10}\nlink_gb_s: 10\ndevices_per_node: 1\n"
        "formula: {compute_efficiency: 0.5, memory_efficiency: 0.5, kernel_ns: 1000, sampling_ns: 0,"
        " link_efficiency: 0.5, all_reduce_ns: 1}\ndecode_skew: 0\n"
    )
    model = build_cost_model(scenario(model="qwen3-0.6b", device="card.yaml"), base_dir=tmp_path)
    weights = 2 * 596e6 / (0.5 * 100)
    assert model.price_decode(1, 1, 1).gpu_ns == pytest.approx(weights, rel=0.05)
    assert len(model.unmeasured()) > 5
    with pytest.raises(InputError):
        build_cost_model(scenario(model="qwen3-0.6b", device="card.yaml"))


def capacity(model: str, device: str = "h100-sxm", **engine: Any) -> int:
    return kv_capacity_tokens(load_model(model), load_device(device), EngineConfig.model_validate(engine))


def test_kv_capacity_of_a_known_server() -> None:
    assert capacity("llama-3.1-8b") == pytest.approx(443_000, rel=0.02)


def test_kv_capacity_follows_pages_parallelism_and_dtype() -> None:
    assert capacity("llama-3.1-8b", page_size=64) % 64 == 0
    assert capacity("llama-3.1-8b", kv_tokens=1000, page_size=64) == 960
    assert capacity("llama-3.1-8b", kv_dtype="fp8") == pytest.approx(2 * capacity("llama-3.1-8b"), rel=1e-3)
    assert capacity("llama-3.1-8b", parallel={"tp": 2}) > 2 * capacity("llama-3.1-8b")
    assert capacity("llama-3.1-8b", parallel={"pp": 2}) > 2 * capacity("llama-3.1-8b")
    assert capacity("llama-3.1-8b", quantization="fp8") > capacity("llama-3.1-8b")


@pytest.mark.parametrize(
    ("model", "device", "engine"),
    [
        ("llama-3.1-70b", "h100-sxm", {}),
        ("llama-3.1-8b", "rtx-4090", {"mem_fraction_static": 0.5}),
        ("qwen3-0.6b", "h100-sxm", {"kv_tokens": 10, "page_size": 16}),
    ],
)
def test_no_room_says_what_to_change(model: str, device: str, engine: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        capacity(model, device, **engine)
    assert caught.value.remedy


def test_too_many_devices_for_a_node() -> None:
    with pytest.raises(InputError, match="no network"):
        build_cost_model(scenario(model="llama-2-7b", device="rtx-4090", engine={"parallel": {"tp": 16}}))
