"""Cost models: the price of a step from the shape of its batch.

``OperatorCostModel`` sums operators (``testbed.costs.operators``); ``ConstantCostModel`` is linear in tokens and rows,
for cases that queueing theory can check. A user's own cost model needs ``price`` alone.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from testbed.batch import BatchShape, StepCost, captured_sizes, largest_captured
from testbed.costs.devices import DeviceProfile
from testbed.costs.operators import Operators
from testbed.costs.tables import Curve
from testbed.scenario.errors import InputError
from testbed.scenario.models import DTYPE_BYTES, ModelSpec
from testbed.scenario.schema import ConstantDevice, EngineConfig

Counts = NDArray[np.int64] | int
"""A column of step counts, or one step's."""


class CostModel(Protocol):
    """What a runtime asks of a cost model."""

    def price(self, shape: BatchShape) -> StepCost:
        """The cost of a step of this shape."""
        ...

    def price_decode(self, rows: int, context_tokens: int, context_max: int) -> StepCost:
        """The cost of a decode step; equals ``price`` of that shape."""
        ...

    def flops_and_bytes(
        self, new_tokens: Counts, prefix_tokens: Counts, decode_rows: Counts, context_tokens: Counts, rows: Counts
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Model FLOPs and memory traffic of steps on one device, from the columns of the step records."""
        ...

    def breakdown(self, shape: BatchShape) -> dict[str, int]:
        """Device time (ns) by operator."""
        ...

    def activation_ns(self, tokens: int) -> int:
        """Time from this pipeline stage to the next for what it made of ``tokens``."""
        ...

    def unmeasured(self) -> list[str]:
        """Which operators are priced without a measurement of theirs, and how; for reports."""
        ...


class OperatorCostModel:
    """Prices a step operator by operator, for one rank of one pipeline stage.

    Products and element-wise operators see the sum of the batch's tokens, attention each part: a mixed batch costs its
    linear work once and the sum of its attentions (decode rows beside a prefill at their own price, where measured).
    A pure decode batch that a captured CUDA graph holds is padded to that graph's rows; its attention is not, padding
    rows having no context. Raises InputError like ``Operators``.
    """

    def __init__(
        self, model: ModelSpec, device: DeviceProfile, engine: EngineConfig, stage: int = 0, seed: int = 0
    ) -> None:
        self.operators = Operators(model, device, engine, stage, seed)
        largest = engine.cuda_graph_max_bs or largest_captured(device.memory_bytes)
        self._captured = captured_sizes(largest) if engine.cuda_graph and device.launches_per_step is None else []
        self._kernels = device.launches_per_step or self.operators.kernels
        self._linear: dict[tuple[int, bool], float] = {}
        self._head: dict[int, float] = {}
        self._activations: dict[int, int] = {}
        self._mixed: dict[int, Curve] = {}
        self._decode: dict[int, tuple[float, list[float], list[float], list[float], bool]] = {}

    def price(self, shape: BatchShape) -> StepCost:
        """The cost of a step; ``StepCost(0, 0, False)`` for an empty one."""
        new_tokens, _, decodes, context_tokens, context_max = shape
        if not new_tokens:
            return self.price_decode(decodes, context_tokens, context_max) if decodes else StepCost(0, 0, False)
        tokens = sum(new_tokens) + decodes
        total = self._linear_ns(tokens, False) + self._head_ns(len(new_tokens) + decodes)
        total += sum(self._attention_ns(shape)) + self.operators.step_ns("prefill", tokens)
        return StepCost(int(total), self._kernels, False)

    def price_decode(self, rows: int, context_tokens: int, context_max: int) -> StepCost:
        """The cost of a decode step. All that depends on ``rows`` alone is kept."""
        base, xs, ys, slopes, graph = self._decode.get(rows) or self._decode_rows(rows)
        mean = context_tokens / rows
        if context_max > mean:
            mean += self.operators.decode_skew(rows, context_max) * (context_max - mean)
        i = bisect_right(xs, mean) - 1
        return StepCost(int(base + ys[i] + (mean - xs[i]) * slopes[i]), self._kernels, graph)

    def _decode_rows(self, rows: int) -> tuple[float, list[float], list[float], list[float], bool]:
        tokens, graph = self._padded(rows)
        curve = self.operators.decode_curve(rows)
        base = self._linear_ns(tokens, graph) + self._head_ns(tokens)
        base += self.operators.step_ns("graph" if graph else "eager", tokens)
        self._decode[rows] = kept = (base, curve.xs, curve.ys, curve.slopes, graph)
        return kept

    def _padded(self, rows: int) -> tuple[int, bool]:
        """Rows that a decode step computes, and whether a graph holds them."""
        i = bisect_left(self._captured, rows)
        return (self._captured[i], True) if i < len(self._captured) else (rows, False)

    def _attention_ns(self, shape: BatchShape) -> tuple[float, float]:
        """Attention of the prefills, and what the decode rows add to it."""
        new_tokens, prefix_tokens, rows, context_tokens, context_max = shape
        prefill = self.operators.prefill_ns(new_tokens, prefix_tokens) if new_tokens else 0.0
        if not rows:
            return prefill, 0.0
        _, xs, ys, slopes, _ = self._decode.get(rows) or self._decode_rows(rows)
        mean = context_tokens / rows
        mean += self.operators.decode_skew(rows, context_max) * max(0.0, context_max - mean)
        i = bisect_right(xs, mean) - 1
        alone = ys[i] + (mean - xs[i]) * slopes[i]
        if not new_tokens or not self.operators.measures_mixed:
            return prefill, alone
        added = max(self._mixed_curve(rows).at(mean), self._mixed_curve(1).at(context_max))
        return prefill, max(added, alone - prefill)

    def _mixed_curve(self, rows: int) -> Curve:
        curve = self._mixed.get(rows)
        if curve is None:
            self._mixed[rows] = curve = self.operators.decode_curve(rows, beside_prefill=True)
        return curve

    def _linear_ns(self, tokens: int, graph: bool) -> float:
        key = tokens, graph
        total = self._linear.get(key)
        if total is None:
            self._linear[key] = total = sum(self.operators.linear_ns(tokens, graph).values())
        return total

    def _head_ns(self, rows: int) -> float:
        total = self._head.get(rows)
        if total is None:
            self._head[rows] = total = sum(self.operators.head_ns(rows).values())
        return total

    def breakdown(self, shape: BatchShape) -> dict[str, int]:
        """Device time (ns, rounded down) by operator; sums to the price but for rounding."""
        tokens, rows, graph = sum(shape.new_tokens) + shape.decodes, len(shape.new_tokens) + shape.decodes, False
        if not rows:
            return {}
        kind = "prefill"
        if not shape.new_tokens:
            tokens, graph = self._padded(rows)
            rows, kind = tokens, "graph" if graph else "eager"
        parts = self.operators.linear_ns(tokens, graph) | self.operators.head_ns(rows)
        prefill, decode = self._attention_ns(shape)
        parts |= {
            "prefill_attention": prefill,
            "decode_attention": decode,
            "step": self.operators.step_ns(kind, tokens),
        }
        return {name: int(ns) for name, ns in parts.items() if ns}

    def activation_ns(self, tokens: int) -> int:
        """Time from this pipeline stage to the next; 0 behind the last."""
        known = self._activations.get(tokens)
        if known is None:
            self._activations[tokens] = known = int(self.operators.activation_ns(tokens))
        return known

    def unmeasured(self) -> list[str]:
        """Which operators are priced without a measurement of theirs, and how."""
        return list(self.operators.unmeasured)

    def flops_and_bytes(
        self, new_tokens: Counts, prefix_tokens: Counts, decode_rows: Counts, context_tokens: Counts, rows: Counts
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Model FLOPs and memory traffic of steps on one device, float64, from columns of the step records.

        FLOPs: two a weight and token, and four a head, dimension and score. Bytes: the weights that the step meets
        once, KV read and written. A step's prefills are taken as equal: columns hold their sums (exact for one).
        """
        new, prefix, decodes, context, total = (
            np.asarray(column, dtype=np.float64)
            for column in (new_tokens, prefix_tokens, decode_rows, context_tokens, rows)
        )
        operators, model = self.operators, self.operators.model
        tp, layers = operators.tp, operators.layers
        tokens, prefills = new + decodes, np.maximum(total - decodes, 1.0)
        experts = model.experts_per_token * model.expert_parameters
        flops = 2.0 * layers / tp * (model.layer_linear_parameters + experts) * tokens
        scores = context + new * prefix / prefills + new * (new / prefills + 1.0) / 2.0
        flops += 4.0 * layers * operators.heads * model.head_dim * scores
        size = DTYPE_BYTES[operators.weight_dtype]
        active = operators.expected_experts(tokens) if model.is_moe else 0.0
        weights = layers / tp * size * (model.layer_linear_parameters + active * model.expert_parameters)
        traffic = weights + layers * operators.kv_token_bytes * (context + prefix + tokens)
        if operators.is_last:
            flops += 2.0 * model.hidden * model.vocab / tp * total
            traffic = traffic + model.hidden * model.vocab / tp * operators.size
        return flops, np.where(tokens > 0, traffic, 0.0)


class ConstantCostModel:
    """Step times that are linear in tokens and rows: no model, no kernels to launch, one graph.

    A pipeline stage of ``layers`` takes its share of ``model_layers``, rounded down.
    """

    def __init__(self, device: ConstantDevice, layers: int = 1, model_layers: int = 1) -> None:
        self._device, self._layers, self._model_layers = device, layers, model_layers

    def price(self, shape: BatchShape) -> StepCost:
        """``prefill_ns + prefill_token_ns * tokens``, ``decode_ns + decode_row_ns * rows``, or the sum of the two."""
        return StepCost(sum(self.breakdown(shape).values()), 0, True)

    def price_decode(self, rows: int, context_tokens: int, context_max: int) -> StepCost:
        """``decode_ns + decode_row_ns * rows``; contexts cost nothing."""
        device = self._device
        return StepCost(self._share(device.decode_ns + device.decode_row_ns * rows) if rows else 0, 0, True)

    def breakdown(self, shape: BatchShape) -> dict[str, int]:
        """The prefill part and the decode part, ns."""
        device, parts = self._device, {}
        if shape.new_tokens:
            parts["prefill"] = self._share(device.prefill_ns + device.prefill_token_ns * sum(shape.new_tokens))
        if shape.decodes:
            parts["decode"] = self._share(device.decode_ns + device.decode_row_ns * shape.decodes)
        return parts

    def unmeasured(self) -> list[str]:
        """That nothing here is measured."""
        return ["every step: constants of the scenario"]

    def activation_ns(self, tokens: int) -> int:
        """A constant."""
        return self._device.activation_ns

    def _share(self, whole_ns: float) -> int:
        return int(whole_ns) * self._layers // self._model_layers

    def flops_and_bytes(
        self, new_tokens: Counts, prefix_tokens: Counts, decode_rows: Counts, context_tokens: Counts, rows: Counts
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Zeros: constants know neither."""
        zeros = np.zeros(np.shape(rows), dtype=np.float64)
        return zeros, zeros.copy()


class _Completed:
    """A user's own cost model that has no more than ``price``."""

    def __init__(self, own: Any, name: str) -> None:
        self._name = name
        self.price: Callable[[BatchShape], StepCost] = own.price

    def price_decode(self, rows: int, context_tokens: int, context_max: int) -> StepCost:
        """``price`` of the decode step."""
        return self.price(BatchShape((), (), rows, context_tokens, context_max))

    def breakdown(self, shape: BatchShape) -> dict[str, int]:
        """One operator: the step."""
        return {"step": self.price(shape).gpu_ns}

    def unmeasured(self) -> list[str]:
        """Everything is the user's word."""
        return [f"every step: priced by {self._name}"]

    def activation_ns(self, tokens: int) -> int:
        """Nothing, where the user says nothing of it."""
        return 0

    def flops_and_bytes(
        self, new_tokens: Counts, prefix_tokens: Counts, decode_rows: Counts, context_tokens: Counts, rows: Counts
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Not known: zeros."""
        return np.zeros(np.shape(rows)), np.zeros(np.shape(rows))


def complete(own: Any, name: str) -> CostModel:
    """``own`` with what it lacks of a CostModel. Raises InputError when it cannot price a step."""
    if not callable(getattr(own, "price", None)):
        remedy = "give it a method price(shape: BatchShape) -> StepCost"
        raise InputError(f"{name} made an object without a method 'price'", where="cost_model", remedy=remedy)
    completed = _Completed(own, name)
    for method in ("price_decode", "breakdown", "activation_ns", "unmeasured", "flops_and_bytes"):
        if hasattr(own, method):
            setattr(completed, method, getattr(own, method))
    return cast("CostModel", completed)
