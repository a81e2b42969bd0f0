"""From measured times to a device profile: its tables, what they predict, and how far off that is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from testbed.costs.derive import kept
from testbed.costs.devices import DeviceProfile
from testbed.costs.model import OperatorCostModel
from testbed.costs.operators import Operators
from testbed.scenario.models import DTYPE_BYTES, ModelSpec
from testbed.scenario.schema import EngineConfig
from testbed.study.calibration.points import Point, StepPoint

Times = Mapping[Point, float]
"""Measured ns of all layers."""


class Fit:
    """The profile of a device for one model and engine, made step by step: operators, then whole steps."""

    def __init__(self, profile: DeviceProfile, model: ModelSpec, engine: EngineConfig) -> None:
        """``profile``: the measured ceilings, without tables."""
        self.profile = profile
        self.raised: dict[str, int] = {}
        """Measured points by operator that beat a ceiling, as a cache or the clock's noise can make them."""
        self.model = model
        self._engine = engine
        self._bare = OperatorCostModel(model, profile, engine).operators

    def cost_model(self, *, graph: bool = True) -> OperatorCostModel:
        """What the profile, as it is now, makes of the model; ``graph``: with CUDA graphs where the engine has them."""
        engine = self._engine if graph else self._engine.model_copy(update={"cuda_graph": False})
        return OperatorCostModel(self.model, self.profile, engine)

    def step_prices(self, points: Iterable[StepPoint]) -> dict[StepPoint, float]:
        """Device time (ns) of whole steps as they are priced now."""
        models = {graph: self.cost_model(graph=graph) for graph in (True, False)}
        return {p: float(sum(models[p.kind == "graph"].breakdown(p.shape.batch).values())) for p in points}

    def add_operators(self, times: Times) -> None:
        """Tables from all points that are not held out, none below the ceilings."""
        floors = {point: least_time(self._bare, point) for point in times}
        for point in times:
            if times[point] < floors[point]:
                self.raised[point.operator] = self.raised.get(point.operator, 0) + 1
        used = {p: max(times[p], floors[p]) / self._calls(p) for p in times if not p.held_out}
        self.profile = replace(self.profile, tables=self._tables(used))
        skewed = {p: t for p, t in times.items() if p.operator == "decode_skew" and not p.held_out}
        skew = decode_skew(self.cost_model().operators, skewed)
        if skew is not None:
            self.profile = replace(self.profile, tables=self.profile.tables | {"decode_skew": skew})

    def add_steps(self, times: Mapping[StepPoint, float]) -> None:
        """What the steps that are not held out take beyond the operators as they are priced; never less than 0."""
        kinds: dict[str, dict[int, list[float]]] = {}
        prices = self.step_prices(times)
        for point, time in times.items():
            if not point.held_out:
                beyond = max(0.0, time - prices[point])
                kinds.setdefault(point.kind, {}).setdefault(point.tokens, []).append(beyond)
        table: dict[str, Any] = {"layers": self._bare.layers}
        for kind, by_tokens in kinds.items():
            tokens = sorted(by_tokens)
            table[kind] = {"tokens": tokens, "ns": kept(float(np.mean(by_tokens[t])) for t in tokens)}
        self.profile = replace(self.profile, tables=self.profile.tables | {"step": table})

    def _calls(self, point: Point) -> int:
        """Calls of the operator in one step."""
        return 1 if point.operator in ("embedding", "lm_head", "sampling") else self._bare.layers

    def _tables(self, times: Times) -> dict[str, Any]:
        dtype, spec = self._bare.dtype, self.model
        by_operator: dict[str, dict[Point, float]] = {}
        for point, time in times.items():
            by_operator.setdefault(point.operator, {})[point] = time
        lines = {
            name: dict(sorted((point.tokens, time) for point, time in part.items()))
            for name, part in by_operator.items()
            if "decode" not in name and "prefill" not in name
        }
        heads = {"heads": spec.heads, "kv_heads": spec.kv_heads, "head_dim": spec.head_dim}
        tables: dict[str, Any] = {
            "gemm": {dtype: _gemm(self._bare, lines)},
            "prefill": {dtype: [heads | _prefill(by_operator)]},
            "decode": {dtype: [heads | _grid(by_operator["decode_attention"], "rows", "context", "batch", "context")]},
            "elementwise": {dtype: _elementwise(self._bare, lines)},
            "sampling": {"vocab": spec.vocab, "rows": list(lines["sampling"]), "ns": kept(lines["sampling"].values())},
        }
        if spec.is_moe:
            shape = [spec.hidden, self._bare.expert_width, spec.experts_per_token, spec.experts]
            experts = lines["experts"]
            tables["moe"] = {dtype: {"tokens": list(experts), "shapes": [shape], "ns": [kept(experts.values())]}}
        return tables


def _gemm(operators: Operators, lines: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """Products by shape; the mean where two have one shape."""
    spec = operators.model
    shapes = operators.shapes() | {"lm_head": (spec.vocab, spec.hidden)}
    if spec.is_moe:
        shapes["router"] = (spec.experts, spec.hidden)
    rows: dict[tuple[int, int], list[list[float]]] = {}
    for name, shape in shapes.items():
        rows.setdefault(shape, []).append(list(lines[name].values()))
    longest = max((lines[name] for name in shapes), key=len)
    means = [kept(np.mean([row[: min(map(len, same))] for row in same], axis=0)) for same in rows.values()]
    return {"m": list(longest), "shapes": [list(shape) for shape in rows], "ns": means}


def _elementwise(operators: Operators, lines: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    return {
        name: {"token_bytes": token_bytes, "tokens": list(lines[name]), "ns": kept(lines[name].values())}
        for name, token_bytes in operators.elementwise_bytes().items()
    }


def _prefill(by_operator: Mapping[str, Times]) -> dict[str, Any]:
    whole = _grid(by_operator["prefill_attention"], "rows", "tokens", "batch", "length", power=2)
    behind = by_operator.get("prefill_behind_prefix")
    if not behind:
        return whole
    return whole | {"behind": _grid(behind, "prefix_tokens", "tokens", "prefix", "chunk", power=2)}


def _grid(times: Times, row: str, column: str, row_name: str, column_name: str, power: float = 1.0) -> dict[str, Any]:
    """A table of two axes. Large shapes may be missing: from its first hole on, a row goes on along the line through
    its last two points, in the ``1 / power``-th power of the time. A row of one point says too little, but for the
    first."""
    known = {(getattr(point, row), getattr(point, column)): time for point, time in times.items()}
    columns = sorted({c for _, c in known})
    rows = sorted({r for r, _ in known})
    lines: dict[int, list[float]] = {}
    for r in rows:
        held = next((i for i, c in enumerate(columns) if (r, c) not in known), len(columns))
        line = [known[r, c] ** (1 / power) for c in columns[:held]]
        if held == 1 and len(columns) > 1 and not lines:
            line += [line[0]]
        if len(line) == len(columns) or len(line) > 1:
            lines[r] = [y**power for y in _continued(columns, line)]
    return {row_name: list(lines), column_name: columns, "ns": [kept(line) for line in lines.values()]}


def _continued(xs: Sequence[int], ys: Sequence[float]) -> list[float]:
    """``ys`` for all of ``xs``, by the line through its last two points; it does not fall."""
    end = len(ys)
    if end == len(xs):
        return list(ys)
    slope = max(0.0, (ys[-1] - ys[-2]) / (xs[end - 1] - xs[end - 2]))
    return [*ys, *(ys[-1] + slope * (x - xs[end - 1]) for x in xs[end:])]


def decode_skew(operators: Operators, times: Times) -> dict[str, Any] | None:
    """The table ``decode_skew``. Each point says at which equal context its unequal rows take as long; the shares of
    points with as many tokens (rows times longest) are averaged, weighed by what the share makes of the time. None
    where it makes nothing."""
    shares: dict[int, list[tuple[float, float]]] = {}
    for point, time in times.items():
        mean, curve = float(np.mean(point.contexts)), operators.decode_curve(point.rows)
        share = (curve.inverse(time) - mean) / (point.longest - mean)
        weight = max(0.0, curve.at(point.longest) / curve.at(mean) - 1)
        shares.setdefault(point.rows * point.longest, []).append((min(1.0, max(0.0, share)), weight))
    known = {tokens: part for tokens, part in sorted(shares.items()) if any(weight > 0 for _, weight in part)}
    if not known:
        return None
    means = [float(np.average([s for s, _ in part], weights=[w for _, w in part])) for part in known.values()]
    return {"tokens": list(known), "share": [round(mean, 3) for mean in means]}


def least_time(operators: Operators, point: Point) -> float:
    """The least time of a point in all layers: its compulsory work at the profile's ceilings. Weights and KV are read,
    activations may be in a cache; elementwise operators move theirs."""
    device, spec, layers, name = operators.device, operators.model, operators.layers, point.operator
    shapes = operators.shapes() | {"router": (spec.experts, spec.hidden)}
    if "decode" in name or "prefill" in name:
        return layers * device.roofline_ns(*_attention_work(operators, point), operators.dtype)
    if name == "experts":
        width, tokens = operators.expert_width, float(point.tokens)
        read = 3.0 * operators.expected_experts(tokens) * spec.hidden * width * operators.size
        flops = 6.0 * tokens * spec.experts_per_token * spec.hidden * width
        return layers * device.roofline_ns(flops, read, operators.dtype)
    if name in shapes or name == "lm_head":
        n, k = shapes.get(name, (spec.vocab, spec.hidden))
        flops, size = 2.0 * point.tokens * n * k, float(n * k * DTYPE_BYTES[operators.dtype])
        return (1 if name == "lm_head" else layers) * device.roofline_ns(flops, size, operators.dtype)
    if name == "sampling":
        return 4.0 * point.tokens * spec.vocab / device.bytes_per_ns
    moved = point.tokens * operators.elementwise_bytes()[name] / device.bytes_per_ns
    return moved if name == "embedding" else layers * moved


def _attention_work(operators: Operators, point: Point) -> tuple[float, float]:
    """FLOP, and bytes of KV, of a layer's attention."""
    if point.context:
        scores = kv_tokens = sum(point.contexts)
    else:
        n, p = point.tokens, point.prefix_tokens
        scores, kv_tokens = point.rows * (n * p + n * (n + 1) // 2), point.rows * p
    return 4.0 * operators.heads * operators.model.head_dim * scores, float(operators.kv_token_bytes * kv_tokens)


def predicted_time(operators: Operators, point: Point) -> float:
    """What the cost model makes of a point, in all layers."""
    if point.context:
        mean, longest = float(np.mean(point.contexts)), max(point.contexts)
        mean += operators.decode_skew(point.rows, longest) * (longest - mean)
        return operators.decode_curve(point.rows).at(mean)
    if "prefill" in point.operator:
        return operators.prefill_ns([point.tokens] * point.rows, [point.prefix_tokens] * point.rows)
    if point.operator in ("lm_head", "sampling"):
        return operators.head_ns(point.tokens)[point.operator]
    return operators.linear_ns(point.tokens, False)[point.operator]
