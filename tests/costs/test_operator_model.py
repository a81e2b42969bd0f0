from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.batch import BatchShape, StepCost, captured_sizes
from testbed.costs import ConstantCostModel, OperatorCostModel, device_presets, load_device
from testbed.costs.tables import GemmTable
from testbed.scenario.errors import InputError
from testbed.scenario.models import load_model
from testbed.scenario.schema import ConstantDevice, EngineConfig

MODELS = ("llama-3.1-8b", "qwen3-0.6b", "qwen3-30b-a3b", "llama-2-7b")
DEVICES = tuple(device_presets())


@cache
def cost(model: str = "llama-3.1-8b", device: str = "h100-sxm", tp: int = 1, **engine: object) -> OperatorCostModel:
    config = EngineConfig.model_validate({"parallel": {"tp": tp}, "cuda_graph_max_bs": 256, **engine})
    return OperatorCostModel(load_model(model), load_device(device), config)


def decode_ns(model: OperatorCostModel, rows: int, context: int) -> int:
    return model.price_decode(rows, rows * context, context).gpu_ns


names = st.sampled_from(MODELS)
devices = st.sampled_from(DEVICES)
lengths = st.lists(st.tuples(st.integers(1, 9000), st.integers(0, 20000)), min_size=1, max_size=6)


def test_all_devices_are_known() -> None:
    assert set(DEVICES) == {"a100-sxm", "b200", "h100-sxm", "h200-sxm", "l40s", "rtx-4090", "rtx-pro-6000"}


@pytest.mark.parametrize(
    ("model", "rows", "milliseconds", "tolerance"),
    [
        ("llama-3.1-8b", 1, 5.8, 0.15),
        ("llama-3.1-8b", 32, 6.9, 0.15),
        ("llama-3.1-8b", 256, 13.5, 0.15),
        ("qwen3-0.6b", 1, 1.3, 0.30),
        ("qwen3-0.6b", 32, 2.1, 0.20),
        ("qwen3-0.6b", 256, 7.2, 0.15),
    ],
)
def test_decode_steps_on_h100_are_where_they_are_known_to_be(
    model: str, rows: int, milliseconds: float, tolerance: float
) -> None:
    assert decode_ns(cost(model), rows, 512) / 1e6 == pytest.approx(milliseconds, rel=tolerance)


def test_a_long_prefill_runs_near_but_below_the_peak() -> None:
    model = cost()
    flops, _ = model.flops_and_bytes(4096, 0, 0, 0, 1)
    share = float(flops) / model.price(BatchShape((4096,), (0,))).gpu_ns / load_device("h100-sxm").peak("bfloat16")
    assert 0.5 < share < 0.85


@settings(deadline=None, max_examples=150)
@given(names, devices, st.integers(1, 512), st.integers(1, 60000), st.integers(0, 4000))
def test_decode_rises_with_rows_and_context(model: str, device: str, rows: int, context: int, more: int) -> None:
    priced = cost(model, device)
    assert decode_ns(priced, rows, context) <= decode_ns(priced, rows, context + more)
    assert decode_ns(priced, rows, context) <= decode_ns(priced, rows + 1 + more % 64, context)
    skewed = priced.price_decode(rows, rows * context, context + more).gpu_ns
    assert decode_ns(priced, rows, context) <= skewed <= decode_ns(priced, rows, context + more)


@settings(deadline=None, max_examples=150)
@given(names, devices, st.integers(1, 20000), st.integers(0, 40000), st.integers(1, 4000), st.integers(0, 4000))
def test_prefill_rises_with_tokens_and_prefix(
    model: str, device: str, new: int, prefix: int, more: int, cached: int
) -> None:
    priced = cost(model, device)
    one = priced.price(BatchShape((new,), (prefix,))).gpu_ns
    assert one <= priced.price(BatchShape((new + more,), (prefix,))).gpu_ns
    assert one <= priced.price(BatchShape((new,), (prefix + cached,))).gpu_ns
    assert one <= priced.price(BatchShape((new, more), (prefix, cached))).gpu_ns


@settings(deadline=None, max_examples=150)
@given(names, devices, lengths, st.integers(1, 300), st.integers(1, 20000))
def test_a_mixed_batch_costs_at_least_its_parts(
    model: str, device: str, prefills: list[tuple[int, int]], rows: int, context: int
) -> None:
    priced = cost(model, device, cuda_graph=False)
    new, prefix = tuple(n for n, _ in prefills), tuple(p for _, p in prefills)
    mixed = priced.price(BatchShape(new, prefix, rows, rows * context, context)).gpu_ns
    prefill = priced.price(BatchShape(new, prefix)).gpu_ns
    decode = priced.price(BatchShape((), (), rows, rows * context, context)).gpu_ns
    assert max(prefill, decode) <= mixed
    if not priced.operators.measures_mixed:
        assert mixed <= prefill + decode


@settings(deadline=None, max_examples=200)
@given(names, devices, lengths, st.integers(0, 300), st.integers(1, 20000))
def test_no_step_beats_the_peaks(
    model: str, device: str, prefills: list[tuple[int, int]], rows: int, context: int
) -> None:
    priced, profile = cost(model, device), load_device(device)
    new, prefix = tuple(n for n, _ in prefills), tuple(p for _, p in prefills)
    parts = priced.breakdown(BatchShape(new, prefix, rows, rows * context, context))
    spec, tokens, sampled = load_model(model), sum(new) + rows, len(new) + rows
    peak, width = profile.peak("bfloat16"), profile.bytes_per_ns
    dense = spec.layers * spec.layer_linear_parameters
    products = sum(parts.get(name, 0) for name in ("qkv", "o", "gate_up", "down", "router"))
    assert products >= max(2 * dense * tokens / peak, 2 * dense / width) - 5
    head = spec.hidden * spec.vocab
    assert parts["lm_head"] >= max(2 * head * sampled / peak, 2 * head / width) - 1
    dims = spec.layers * spec.heads * spec.head_dim
    scores = sum(n * p + n * (n + 1) // 2 for n, p in prefills)
    kv = spec.kv_bytes_per_token("bfloat16")
    assert parts["prefill_attention"] >= max(4 * dims * scores / peak, kv * sum(prefix) / width) - 1
    assert parts.get("decode_attention", 0) >= max(4 * dims * rows * context / peak, kv * rows * context / width) - 1
    if spec.is_moe:
        assert parts["experts"] >= 2 * spec.layers * spec.experts_per_token * spec.expert_parameters * tokens / peak - 1
        assert parts["experts"] >= 2 * spec.layers * spec.experts_per_token * spec.expert_parameters / width - 1


@settings(deadline=None, max_examples=100)
@given(names, devices, st.integers(1, 400), st.integers(1, 30000), st.integers(0, 30000))
def test_price_decode_is_price(model: str, device: str, rows: int, context: int, extra: int) -> None:
    priced, shape = cost(model, device), BatchShape((), (), rows, rows * context, context + extra)
    assert priced.price(shape) == priced.price_decode(rows, rows * context, context + extra)


@settings(deadline=None, max_examples=100)
@given(names, devices, lengths, st.integers(0, 300), st.integers(1, 5000))
def test_breakdown_sums_to_the_price(
    model: str, device: str, prefills: list[tuple[int, int]], rows: int, context: int
) -> None:
    priced = cost(model, device)
    shape = BatchShape(tuple(n for n, _ in prefills), tuple(p for _, p in prefills), rows, rows * context, context)
    for part in (shape, shape._replace(new_tokens=(), prefix_tokens=())):
        operators = priced.breakdown(part)
        assert 0 <= priced.price(part).gpu_ns - sum(operators.values()) <= len(operators)


def test_an_empty_step_costs_nothing() -> None:
    assert cost().price(BatchShape()) == StepCost(0, 0, False)
    assert cost().breakdown(BatchShape()) == {}


def test_graphs_are_captured_as_sglang_captures_them() -> None:
    assert captured_sizes(32) == [1, 2, 4, 8, 16, 24, 32]
    assert len(captured_sizes(160)) == 23
    assert captured_sizes(3) == [1, 2, 3]


def test_a_decode_batch_is_padded_to_its_graph_and_eager_beyond() -> None:
    model = cost(cuda_graph_max_bs=None)
    assert model.price_decode(160, 160, 1).graph
    assert not model.price_decode(161, 161, 1).graph
    linear = [model._padded(rows) for rows in (1, 3, 9, 16, 161)]
    assert linear == [(1, True), (4, True), (16, True), (16, True), (161, False)]
    assert decode_ns(model, 17, 100) - decode_ns(model, 24, 100) < 0
    assert cost(device="h200-sxm", cuda_graph_max_bs=None).price_decode(256, 256, 1).graph
    assert not cost(cuda_graph=False).price_decode(1, 1, 1).graph
    assert not model.price(BatchShape((4,), (0,))).graph


def test_kernels_of_a_fused_dense_model() -> None:
    assert 320 <= cost().price_decode(1, 1, 1).kernels <= 400
    assert 320 <= cost("qwen3-0.6b").price_decode(1, 1, 1).kernels <= 400
    moe, dense = cost("qwen3-30b-a3b").operators, cost("qwen3-0.6b").operators
    assert moe.kernels / moe.layers > dense.kernels / dense.layers


@pytest.mark.parametrize("device", ["h100-sxm", "a100-sxm", "l40s", "rtx-pro-6000"])
def test_tensor_parallelism_helps_less_than_linearly(device: str) -> None:
    times = [cost("llama-3.1-8b", device, tp).price(BatchShape((2048,), (0,))).gpu_ns for tp in (1, 2, 4)]
    decode = [decode_ns(cost("llama-3.1-8b", device, tp), 16, 2000) for tp in (1, 2, 4)]
    for series in (times, decode):
        assert all(after > before / 2 for before, after in pairwise(series))
    assert decode[0] > decode[1]
    if device != "l40s":  # its all-reduce crosses PCIe: a prefill of four is slower than of one
        assert times[0] > times[1]


def test_fp8_is_faster_where_the_device_has_it() -> None:
    plain, quantized = cost("llama-3.1-70b", tp=4), cost("llama-3.1-70b", tp=4, quantization="fp8")
    assert decode_ns(quantized, 32, 1000) < 0.9 * decode_ns(plain, 32, 1000)
    assert quantized.price(BatchShape((4096,), (0,))).gpu_ns < 0.8 * plain.price(BatchShape((4096,), (0,))).gpu_ns
    with pytest.raises(InputError) as caught:
        cost("llama-3.1-8b", "a100-sxm", quantization="fp8")
    assert caught.value.where == "engine.quantization"
    assert decode_ns(cost(kv_dtype="fp8"), 128, 4000) < 0.8 * decode_ns(cost(), 128, 4000)


def test_pipeline_stages_share_the_layers() -> None:
    config = EngineConfig.model_validate({"parallel": {"pp": 3}, "cuda_graph_max_bs": 256})
    model, device = load_model("llama-3.1-8b"), load_device("h100-sxm")
    stages = [OperatorCostModel(model, device, config, stage) for stage in range(3)]
    assert [stage.operators.layers for stage in stages] == [11, 11, 10]
    whole, split = decode_ns(cost(), 8, 500), sum(decode_ns(stage, 8, 500) for stage in stages)
    assert split == pytest.approx(whole, abs=5)
    assert "lm_head" not in stages[0].breakdown(BatchShape((), (), 8, 4000, 500))


def test_what_is_not_measured_is_said() -> None:
    assert any("cached prefix" in line for line in cost().unmeasured())
    assert not any("cached prefix" in line for line in cost(device="rtx-4090").unmeasured())
    assert any("float32" in line for line in cost(dtype="float32").unmeasured())
    assert any("experts" in line for line in cost("qwen3-30b-a3b", "a100-sxm").unmeasured())
    assert not any("experts" in line for line in cost("qwen3-30b-a3b", "h100-sxm").unmeasured())
    assert any("all-reduce" in line for line in cost("llama-3.1-8b", "rtx-pro-6000", 2).unmeasured())


def test_decode_rows_beside_a_prefill_cost_more_where_that_is_measured() -> None:
    prefill, decode = BatchShape((512,), (0,)), BatchShape((), (), 64, 64 * 2048, 2048)
    for device, least, most in (("rtx-4090", 1.5, 3.0), ("h100-sxm", 0.99, 1.01)):
        priced = cost(device=device)
        alone = priced.breakdown(decode)["decode_attention"]
        mixed = priced.breakdown(prefill._replace(decodes=64, context_tokens=64 * 2048, context_max=2048))
        assert least * alone < mixed["decode_attention"] < most * alone


def test_flops_and_bytes_by_hand_and_by_column() -> None:
    model, spec = cost(), load_model("llama-3.1-8b")
    linear = 2 * spec.layers * spec.layer_linear_parameters
    head, weights = 2 * spec.hidden * spec.vocab, 2 * spec.layers * spec.layer_linear_parameters
    attention = 4 * spec.layers * spec.heads * spec.head_dim
    columns = [np.array(column) for column in ([0, 100], [0, 50], [4, 0], [4000, 0], [4, 1])]
    flops, traffic = model.flops_and_bytes(*columns)
    assert flops[0] == pytest.approx(4 * (linear + head) + attention * 4000)
    assert flops[1] == pytest.approx(100 * linear + head + attention * (100 * 50 + 100 * 101 / 2))
    assert traffic[0] == pytest.approx(weights + head + 131072 * 4004)
    assert traffic[1] == pytest.approx(weights + head + 131072 * 150)


def test_constant_costs() -> None:
    model = ConstantCostModel(ConstantDevice(prefill_ns=100, decode_ns=10, prefill_token_ns=0.5, decode_row_ns=2))
    assert model.price(BatchShape((8, 4), (0, 9))) == StepCost(106, 0, True)
    assert model.price_decode(3, 50, 20) == StepCost(16, 0, True) == model.price(BatchShape((), (), 3, 50, 20))
    assert model.price(BatchShape((8, 4), (0, 9), 3, 50, 20)) == StepCost(122, 0, True)
    assert model.price(BatchShape()) == StepCost(0, 0, True)
    assert model.flops_and_bytes(*[np.zeros(3, np.int64)] * 5)[0].tolist() == [0.0, 0.0, 0.0]


def test_a_shape_beside_the_grid_keeps_the_distance_to_its_roofline() -> None:
    """Inside the grid along one axis and outside along the other: the nearest point lies between measured shapes."""
    data = {"m": [1, 2], "shapes": [[n, k] for n in (100, 200) for k in (10, 20)], "ns": [[50, 60]] * 4}
    curve = GemmTable(data).curve(150, 5, lambda m, n, k: m * n * k / 1000)
    assert curve.ys == [25, 30]
