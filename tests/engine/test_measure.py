"""What the bench times is what a step does: the same operations on the same shapes; and its steps are whole ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.engine.build import build_runner
from testbed.engine.inputs import SamplingNeeds, StepInputs, StepOutputs
from testbed.engine.measure import ceilings
from testbed.engine.measure.clock import HostClock
from testbed.engine.measure.operators import OperatorBench, scattered
from testbed.engine.measure.steps import IN_FLIGHT, StepBench, StepShape
from testbed.engine.options import DeviceInfo, EngineOptions
from testbed.engine.runner import ModelRunner
from testbed.sampling import SamplingParams
from tests.engine.machine import write_config

CPU = torch.device("cpu")
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
DENSE_OPERATORS = ("qkv", "o", "gate_up", "down", "norms", "rope_kv_write", "activation", "embedding")
MOE_OPERATORS = ("qkv", "o", "router", "experts", "norms", "rope_kv_write", "embedding")


class Recording:
    """A backend that counts its calls by operation and the shapes of what it is given."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.calls: Counter[tuple[Any, ...]] = Counter()

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._backend, name)

        def call(*arguments: Any) -> Any:
            if name != "prepare":
                shapes = tuple(tuple(a.shape) for a in arguments if isinstance(a, torch.Tensor))
                self.calls[name, shapes] += 1
            return operation(*arguments)

        return call


@pytest.fixture(params=["dense", "moe"])
def measured(request: pytest.FixtureRequest) -> Iterator[tuple[ModelRunner, Recording, tuple[str, ...]]]:
    is_moe = request.param == "moe"
    with TemporaryDirectory() as folder:
        config = write_config(Path(folder), num_hidden_layers=3, **(MOE if is_moe else {}))
        options = EngineOptions(
            str(config), dtype="float32", page_size=4, max_running_requests=8, kv_tokens=512, context_length=128
        )
        runner = build_runner(options, CPU)
    recording = Recording(runner.backend)
    runner.backend = runner.decoder._ops = recording
    yield runner, recording, MOE_OPERATORS if is_moe else DENSE_OPERATORS


def calls_of(recording: Recording, work: Any) -> Counter[tuple[Any, ...]]:
    recording.calls.clear()
    HostClock().bind(work)()
    return Counter(recording.calls)


@pytest.mark.parametrize("rows", [1, 5])
def test_the_operators_are_all_that_a_decode_step_does(
    measured: tuple[ModelRunner, Recording, tuple[str, ...]], rows: int
) -> None:
    runner, recording, operators = measured
    steps = Steps(runner)
    bench = OperatorBench(runner, CPU, 64)
    alone = sum((calls_of(recording, bench.work(name, rows)) for name in (*operators, "lm_head")), Counter())
    alone += calls_of(recording, bench.decode_attention([20] * rows))
    recording.calls.clear()
    steps.bench.period_ns(StepShape((), (), (20,) * rows))
    # The priming step, a prefill of as many tokens, calls the same operations on the same shapes.
    assert recording.calls == Counter({key: count * (IN_FLIGHT + 1) for key, count in alone.items()})


def test_the_operators_are_all_that_a_prefill_does(measured: tuple[ModelRunner, Recording, tuple[str, ...]]) -> None:
    runner, recording, operators = measured
    new, prefix = (7, 3), (0, 9)
    bench, steps = OperatorBench(runner, CPU, 64), Steps(runner)
    alone = sum((calls_of(recording, bench.work(name, sum(new))) for name in operators), Counter())
    alone += calls_of(recording, bench.work("lm_head", len(new)))
    alone += calls_of(recording, bench.prefill_attention(new, prefix))
    recording.calls.clear()
    steps.bench.period_ns(StepShape(new, prefix))
    assert recording.calls == Counter({key: count * IN_FLIGHT for key, count in alone.items()})


def test_sampling_draws_for_every_row(measured: tuple[ModelRunner, Recording, tuple[str, ...]]) -> None:
    bench = OperatorBench(measured[0], CPU, 64)
    for params in (SamplingParams(), SamplingParams(temperature=0.7, top_p=0.9)):
        work = bench.sampling(5, params)
        sampled: Any = work()
        assert sampled.token_ids.shape == (5,) and (sampled.token_ids >= 0).all()


class Steps:
    """A bench of steps on a runner, in this process."""

    def __init__(self, runner: ModelRunner) -> None:
        options = EngineOptions("", dtype="float32", page_size=runner.page_size, max_running_requests=8)
        self.bench = StepBench(runner, options, SamplingParams(), SamplingNeeds(), lambda: None)  # type: ignore[arg-type]


class Notebook:
    """A device that computes nothing, but knows whether it could: every token of KV that a row reads is in a page of
    its own, and every decoding row's token was drawn before."""

    def __init__(self, page_size: int) -> None:
        self.info = DeviceInfo("", "cpu", "torch", 1 << 16, 4096, 1 + 4096 // page_size, 100, ())
        self.page_size = page_size
        self.table: dict[int, int] = {}
        self.drawn: set[tuple[int, int]] = set()
        self.steps: list[StepInputs] = []

    def launch(self, inputs: StepInputs) -> Any:
        self.table.update(zip(inputs.places.tolist(), inputs.pages.tolist(), strict=True))
        assert all(array.dtype == np.int32 for array in inputs.arrays())
        ends = inputs.prefix_lens + np.diff(inputs.starts) if len(inputs.prefill_slots) else []
        rows = [*zip(inputs.prefill_slots.tolist(), map(int, ends), strict=True)]
        for slot, position in zip(inputs.decode_slots.tolist(), inputs.positions.tolist(), strict=True):
            assert (slot, position) in self.drawn, "no step left this token"
            self.drawn.discard((slot, position))
            rows.append((slot, position + 1))
        pages = [
            self.table[slot * self.info.table_width + i] for slot, n in rows for i in range(-(-n // self.page_size))
        ]
        assert 0 not in pages and len(set(pages)) == len(pages)
        assert max(pages) <= self.info.kv_tokens // self.page_size
        for row in range(len(inputs.prefill_slots)):
            tokens = slice(inputs.starts[row], inputs.starts[row + 1])
            begin = int(inputs.prefix_lens[row])
            assert inputs.token_positions[tokens].tolist() == list(range(begin, rows[row][1]))
            assert set(inputs.token_slots[tokens].tolist()) == {rows[row][0]}
        self.drawn.update(rows)
        self.steps.append(inputs)
        return self

    def wait(self) -> StepOutputs:
        return StepOutputs(0, np.zeros(0, np.int32), 0, 1000 * len(self.steps))


shapes = st.builds(
    lambda prefills, contexts: StepShape(tuple(n for n, _ in prefills), tuple(p for _, p in prefills), tuple(contexts)),
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), max_size=4),
    st.lists(st.integers(4, 300), max_size=9),
).filter(lambda shape: shape.lengths)


@given(shapes, st.sampled_from([1, 4, 16]))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_steps_have_the_wanted_shape_and_read_what_was_written(shape: StepShape, page_size: int) -> None:
    device = Notebook(page_size)
    options = EngineOptions("", dtype="float32", page_size=page_size, max_running_requests=16)
    bench = StepBench(device, options, SamplingParams(), SamplingNeeds(), lambda: None)  # type: ignore[arg-type]
    bench.period_ns(shape)
    steps = device.steps[-IN_FLIGHT:]
    assert len(device.steps) == IN_FLIGHT + bool(shape.contexts)
    for step in steps:
        assert tuple(np.diff(step.starts)) == shape.new_tokens
        assert tuple(step.prefix_lens) == shape.prefix_tokens
    contexts = np.array([step.positions + 1 for step in steps])
    assert (np.diff(contexts, axis=0) == 1).all()
    assert (np.abs(contexts.mean(axis=0) - shape.contexts) <= 0.5).all()


def test_filling_writes_all_pages_once() -> None:
    device = Notebook(16)
    options = EngineOptions("", dtype="float32", page_size=16, max_running_requests=16)
    bench = StepBench(device, options, SamplingParams(), SamplingNeeds(), lambda: None)  # type: ignore[arg-type]
    assert bench.fill(1000, 100, seconds=1e9) == 896
    written = np.concatenate([step.pages for step in device.steps]).tolist()
    assert (
        sorted(frozenset(written)) == sorted(written)
        and written == scattered(device.info.kv_tokens // 16)[1:57].tolist()
    )
    assert bench.fill(1000, 100, seconds=-1.0) == 112


def test_the_period_is_from_end_to_end() -> None:
    device = Notebook(16)
    options = EngineOptions("", dtype="float32", page_size=16, max_running_requests=16)
    bench = StepBench(device, options, SamplingParams(), SamplingNeeds(), lambda: None)  # type: ignore[arg-type]
    ends = iter([50, 1000, 1700, 2100, 9000])  # the priming step, then four of which three periods are seen
    device.wait = lambda: StepOutputs(0, np.zeros(0, np.int32), 0, next(ends))  # type: ignore[method-assign]
    assert bench.period_ns(StepShape((), (), (20,))) == 700


def test_ceilings_are_rates_of_real_work() -> None:
    rate = ceilings.copy_rate(CPU)
    assert np.isfinite(rate) and rate > 0
    assert ceilings.memory_bytes(CPU) > 1 << 28
    assert 0 < ceilings.matrix_rate(CPU, "float32") < np.inf
