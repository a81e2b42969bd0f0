from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.batch import BatchShape, StepCost
from testbed.costs import (
    ConstantCostModel,
    OperatorCostModel,
    build_cost_model,
    kv_capacity_tokens,
    kv_page_bytes,
    load_device,
    stage_layers,
    stage_weight_bytes,
)
from testbed.costs.links import leaves_node, move_ns, nodes_of_stage
from testbed.scenario.errors import InputError
from testbed.scenario.models import load_model
from testbed.scenario.schema import ConstantDevice, EngineConfig, Parallel, Scenario

DECODE = BatchShape((), (), 8, 4000, 500)


def engine(**fields: Any) -> EngineConfig:
    return EngineConfig.model_validate({"cuda_graph_max_bs": 256, **fields})


def stage(number: int, model: str = "llama-3.1-8b", device: str = "h100-sxm", **parallel: Any) -> OperatorCostModel:
    return OperatorCostModel(load_model(model), load_device(device), engine(parallel=parallel), number)


@cache
def stages(*layers: int) -> list[OperatorCostModel]:
    return [stage(i, pp=len(layers), stage_layers=layers) for i in range(len(layers))]


# ---- links -----------------------------------------------------------------------------------------------------------


def test_moving_takes_bytes_over_bandwidth_and_one_latency() -> None:
    device = load_device("h100-sxm")  # 450 and 50 GB/s at 0.6, 10 us
    assert move_ns(device, 270e6) == pytest.approx(1e6 + 10_000)
    assert move_ns(device, 0, 30e6) == pytest.approx(1e6 + 10_000)
    assert move_ns(device, 270e6, 30e6) == pytest.approx(2e6 + 10_000)
    assert move_ns(device, 0) == 10_000


@pytest.mark.parametrize(
    ("tp", "stage_number", "leaves"),
    [
        (1, 0, False),
        (1, 6, False),
        (1, 7, True),
        (4, 0, False),
        (4, 1, True),
        (4, 2, False),
        (8, 0, True),
        (16, 0, True),
    ],
)
def test_stages_fill_nodes_in_turn(tp: int, stage_number: int, leaves: bool) -> None:
    assert leaves_node(load_device("h100-sxm"), tp, stage_number) is leaves


def test_a_stage_is_in_a_node_or_fills_nodes() -> None:
    device = load_device("h100-sxm")
    assert [nodes_of_stage(device, tp) for tp in (1, 5, 8, 16, 32)] == [1, 1, 1, 2, 4]
    with pytest.raises(InputError, match="whole nodes") as caught:
        nodes_of_stage(device, 12)
    assert caught.value.where == "engine.parallel.tp"


@pytest.mark.parametrize("parallel", [{"tp": 16}, {"tp": 8, "pp": 2}])
def test_a_card_without_a_known_network_stays_in_its_node(parallel: dict[str, int]) -> None:
    name = "tp" if parallel["tp"] > 8 else "pp"
    with pytest.raises(InputError, match="no network of rtx-4090") as caught:
        stage(0, "llama-2-7b", "rtx-4090", **parallel)
    assert (caught.value.where, "network_gb_s" in caught.value.remedy) == (f"engine.parallel.{name}", True)
    assert stage(0, "llama-2-7b", "h100-sxm", **parallel).price(DECODE).gpu_ns > 0


def test_networks_are_slower_than_the_links_of_a_node() -> None:
    known = [load_device(name) for name in ("a100-sxm", "h100-sxm", "h200-sxm", "b200", "l40s")]
    assert [device.network_bytes_per_ns for device in known] == [25, 50, 50, 100, 32]
    assert all(device.network("x") <= device.link_bytes_per_ns for device in known)


def test_two_nodes_reduce_within_and_then_between() -> None:
    one, two = (stage(0, "llama-2-7b", tp=tp).operators for tp in (8, 16))
    for tokens in (1, 500, 20_000):
        here, there = (ops.linear_ns(tokens, True)["all_reduce"] for ops in (one, two))
        part_bytes = 2 * 0.5 / 8 * 2 * tokens * one.model.hidden
        between = 64 * (part_bytes / (0.6 * 50) + 10_000)
        assert there == pytest.approx(here + between, rel=0.01)
    assert "between 2 nodes" in " ".join(two.unmeasured)
    assert two.head_ns(8)["gather_logits"] > one.head_ns(8)["gather_logits"]


def test_tokens_cross_the_network_once_to_each_node() -> None:
    def sent(device: str) -> dict[str, float]:
        fields = {"parallel": {"tp": 16, "ep": 16}, "experts": {"dispatch": "all_to_all"}}
        operators = OperatorCostModel(SIXTEEN, load_device(device), engine(**fields)).operators
        return operators.linear_ns(30_000, True)

    per_device = 30_000 * 0.5 * 0.5 / 8 * SIXTEEN.hidden * 2  # half of the tokens that nearly all nodes get
    assert sent("h100-sxm")["combine"] > SIXTEEN.layers * 0.9 * per_device / (0.6 * 50)
    assert sent("a100-sxm")["combine"] > 1.3 * sent("h100-sxm")["combine"]


SIXTEEN = load_model("qwen3-30b-a3b")


# ---- stages ----------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 32))
def test_even_stages_differ_by_one_layer_and_are_all_of_them(pp: int) -> None:
    model = load_model("llama-3.1-8b")
    layers = stage_layers(model, Parallel(pp=pp))
    assert sum(layers) == model.layers and max(layers) - min(layers) <= 1 and list(layers) == sorted(layers)[::-1]


@pytest.mark.parametrize("layers", [(32, 1), (16, 15), (32,), (10, 11, 11, 0)])
def test_layers_that_are_not_the_models_are_refused(layers: tuple[int, ...]) -> None:
    parallel = Parallel.model_construct(tp=1, pp=2, dp=1, ep=1, stage_layers=layers)
    with pytest.raises(InputError) as caught:
        stage_layers(load_model("llama-3.1-8b"), parallel)
    assert caught.value.where == "engine.parallel.stage_layers"


def test_stages_that_are_written_out_evenly_cost_the_same() -> None:
    for i, written in enumerate(stages(11, 11, 10)):
        assert written.breakdown(DECODE) == stage(i, pp=3).breakdown(DECODE)


def test_uneven_stages_have_their_layers_and_together_the_whole() -> None:
    few, many = stages(8, 24)
    whole = stage(0)
    for shape in (DECODE, BatchShape((700, 90), (0, 40))):
        parts = [cost.breakdown(shape) for cost in (few, many, whole)]
        assert parts[1]["qkv"] == pytest.approx(3 * parts[0]["qkv"], abs=3)
        assert sum(cost.price(shape).gpu_ns for cost in (few, many)) == pytest.approx(whole.price(shape).gpu_ns, abs=3)
        assert "embedding" in parts[0] and "embedding" not in parts[1]
        assert "lm_head" in parts[1] and "lm_head" not in parts[0]
    assert few.operators.kernels + many.operators.kernels == whole.operators.kernels


def test_activations_are_a_hidden_state_over_the_link_between() -> None:
    hidden_bytes = 4096 * 2
    near, far = stage(0, pp=2), stage(0, tp=8, pp=2)
    assert near.activation_ns(1000) == int(1000 * hidden_bytes / (0.6 * 450) + 10_000)
    assert far.activation_ns(1000) == int(1000 * hidden_bytes / (0.6 * 50) + 10_000)
    assert stage(1, pp=2).activation_ns(1000) == stage(0).activation_ns(1000) == 0
    assert "activations" in " ".join(near.unmeasured()) and "activations" not in " ".join(stage(0).unmeasured())


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-0.6b", "qwen3-30b-a3b"])
@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_weights_of_all_stages_are_the_models(name: str, quantization: str) -> None:
    model = load_model(name)
    alone = stage_weight_bytes(model, engine(quantization=quantization))
    assert alone == model.weight_bytes("bfloat16", quantization)
    split = engine(quantization=quantization, parallel={"pp": 3})
    again = 2 * model.vocab * model.hidden if model.tie_embeddings else 0  # the head is no longer on the first stage
    assert sum(stage_weight_bytes(model, split, i) for i in range(3)) == alone + again


def test_redundant_experts_take_memory() -> None:
    model = load_model("qwen3-30b-a3b")
    plain, copied = (
        engine(parallel={"tp": 8, "ep": 8}, experts={"placement": "balanced", "redundant": redundant})
        for redundant in (0, 16)
    )
    more = stage_weight_bytes(model, copied) - stage_weight_bytes(model, plain)
    assert more == 2 * model.layers * 16 * model.expert_parameters
    device = load_device("h100-sxm")
    fewer_tokens = kv_capacity_tokens(model, device, plain) - kv_capacity_tokens(model, device, copied)
    assert fewer_tokens * model.kv_bytes_per_token("bfloat16", 8) == pytest.approx(more / 8, rel=1e-3)


def test_the_pool_is_that_of_the_stage_with_least_room() -> None:
    model, device = load_model("llama-3.1-8b"), load_device("h100-sxm")

    def room(*layers: int) -> int:
        return kv_capacity_tokens(model, device, engine(parallel={"pp": len(layers), "stage_layers": layers}))

    def tokens(layers: int, ends: int) -> float:
        weights = 2 * layers * (model.layer_linear_parameters + model.layer_vector_parameters) + 2 * ends
        free = device.memory_bytes * 0.88 - weights - (1 << 30)
        return free / model.kv_bytes_per_token("bfloat16", 1, layers)

    table = model.vocab * model.hidden
    assert room(12, 20) == pytest.approx(tokens(20, table), abs=2)
    assert room(20, 12) == pytest.approx(tokens(20, table), abs=2)
    assert room(10, 12, 10) == pytest.approx(tokens(12, 0), abs=2)
    assert room(12, 20) < room(16, 16)


def test_a_page_between_engines_has_all_layers_and_every_head_once() -> None:
    model = load_model("llama-3.1-8b")
    assert kv_page_bytes(model, engine()) == 131072
    assert kv_page_bytes(model, engine(page_size=16, kv_dtype="fp8", parallel={"tp": 16, "pp": 2})) == 16 * 65536


def test_constants_are_shared_by_layers() -> None:
    device = ConstantDevice(prefill_ns=3200, decode_ns=320, decode_row_ns=1.5, activation_ns=7)
    half, quarter = ConstantCostModel(device, 16, 32), ConstantCostModel(device, 8, 32)
    assert half.price(BatchShape((5,), (0,))) == StepCost(1600, 0, True)
    assert quarter.price_decode(2, 9, 9) == StepCost(80, 0, True) == quarter.price(BatchShape((), (), 2, 9, 9))
    assert ConstantCostModel(device).price_decode(2, 9, 9).gpu_ns == 323
    assert half.activation_ns(100) == 7


def test_a_scenario_builds_its_stages(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"model": "llama-3.1-8b", "workload": {"requests": {"trace": "x.csv"}}}
    fields["engine"] = {"parallel": {"pp": 2, "stage_layers": [8, 24]}}
    few, many = (build_cost_model(Scenario.model_validate(fields), stage=i) for i in (0, 1))
    assert many.price(DECODE).gpu_ns > 2 * few.price(DECODE).gpu_ns
    constants = Scenario.model_validate({**fields, "device": {"constant": {"decode_ns": 3200, "activation_ns": 5}}})
    assert [build_cost_model(constants, stage=i).price(DECODE).gpu_ns for i in (0, 1)] == [800, 2400]
    (tmp_path / "mine.py").write_text(
        "class Mine:\n    def __init__(self, model, device, engine, stage): self.stage = stage\n"
        "    def price(self, shape): return self.stage\n"
    )
    own = Scenario.model_validate({**fields, "cost_model": "mine.py:Mine"})
    cost_models = [build_cost_model(own, stage=i, base_dir=tmp_path) for i in (0, 1)]
    assert [cost.price(DECODE) for cost in cost_models] == [0, 1]
    assert cost_models[0].activation_ns(100) == 0
