"""Measured operator tables, and how to read between their points.

Every table holds nanoseconds of one operator call on one device. Between points a time is linear along each physical
axis (along the length of a prefill its square root is, attention being quadratic there); beyond the last point the
utilisation of the last point is held, so the time grows with the work. Nothing here is faster than the *roofline* that
the caller passes in: a time is at least the compulsory work at 100 % of the profile's peaks. Times are clamped at the
knots; a roofline being convex, what lies between knots is clamped with them (the experts that tokens activate are not
convex in the tokens: between knots their bound is the chord).

A profile's tables, by operator; DTYPE is a key such as ``bfloat16``. ``gemm``: {DTYPE: {m, shapes [[n, k]], ns}};
``prefill``: {DTYPE: [{heads, kv_heads, head_dim, batch, length, ns, and perhaps prefix or behind: {prefix, chunk,
ns}}]}; ``decode``, by the dtype of the KV, and ``mixed_decode`` likewise, with batch and context; ``moe``: {DTYPE:
{tokens, shapes, ns}}; ``all_reduce``: {elements, graph, eager: {devices: ns}}. Only a calibration has ``elementwise``:
{DTYPE: {norms | rope_kv_write | activation | embedding: {token_bytes, tokens, ns}}}; ``sampling``: {vocab, rows, ns};
``decode_skew``, as the field of a profile, over rows times longest context: {tokens, share}; and ``step``, what a step
takes beyond its operators: {layers, graph | eager | prefill: {tokens, ns}}. A row of ``ns`` may end before its axis.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import log, sqrt
from typing import Any

Roofline = Callable[[float], float]
"""The least time (ns) at a point of an axis."""


class Curve:
    """A piecewise-linear time over one axis: constant before the first knot, held utilisation after the last."""

    __slots__ = ("slopes", "xs", "ys")

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self.xs = [float(x) for x in xs]
        self.ys = [float(y) for y in ys]
        pairs = zip(self.xs, self.xs[1:], self.ys, self.ys[1:], strict=False)
        self.slopes = [(y1 - y0) / (x1 - x0) for x0, x1, y0, y1 in pairs]
        self.slopes.append(self.ys[-1] / self.xs[-1])

    def at(self, x: float) -> float:
        """The time (ns) at ``x``."""
        i = bisect_right(self.xs, x) - 1
        return self.ys[i] + (x - self.xs[i]) * self.slopes[i] if i >= 0 else self.ys[0]

    def inverse(self, y: float) -> float:
        """The ``x`` from which on the time is at least ``y``, where falls are noise; the first knot for less."""
        highest = list(accumulate(self.ys, max))
        i = bisect_left(highest, y)
        if i == 0:
            return self.xs[0]
        if i == len(highest):
            return self.xs[-1] * y / highest[-1]
        low, high = highest[i - 1], highest[i]
        return self.xs[i - 1] + (self.xs[i] - self.xs[i - 1]) * (y - low) / (high - low)

    def raised(self, floor: Roofline) -> Curve:
        """The curve with every knot at least ``floor``."""
        return Curve(self.xs, [max(y, floor(x)) for x, y in zip(self.xs, self.ys, strict=True)])


def between(axis: Sequence[float], x: float) -> tuple[int, int, float]:
    """Indices of the knots around ``x`` and the weight of the upper one; the outermost knot beyond the ends."""
    i = bisect_right(axis, x) - 1
    if i < 0:
        return 0, 0, 0.0
    if i >= len(axis) - 1:
        return len(axis) - 1, len(axis) - 1, 0.0
    return i, i + 1, (x - axis[i]) / (axis[i + 1] - axis[i])


class GemmTable:
    """Times of ``[m, k] x [k, n]`` products: rows by shape (n, k), columns by m.

    When the shapes fill a grid, a time is bilinear in n and k. Else, and outside the grid, it is the roofline of the
    wanted shape times the distance to the roofline that the nearest measured shape keeps at the same m.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        self.m: list[int] = data["m"]
        self._rows = {(n, k): row for (n, k), row in zip(data["shapes"], data["ns"], strict=True)}
        self._n = sorted({n for n, _ in self._rows})
        self._k = sorted({k for _, k in self._rows})
        self._is_grid = len(self._rows) == len(self._n) * len(self._k)

    def holds(self, n: int, k: int) -> bool:
        """Whether (n, k) is measured or between measured shapes."""
        inside = self._n[0] <= n <= self._n[-1] and self._k[0] <= k <= self._k[-1]
        return (n, k) in self._rows or (self._is_grid and inside)

    def curve(self, n: int, k: int, roofline: Callable[[float, int, int], float]) -> Curve:
        """Time over m of the shape (n, k); ``roofline(m, n, k)`` is the least time of a product."""
        near = (n, k) if self.holds(n, k) else self._nearest(n, k)
        row = self._rows.get(near) or self._bilinear(*near)
        if near != (n, k):
            row = [t * roofline(m, n, k) / roofline(m, *near) for m, t in zip(self.m, row, strict=False)]
        return Curve(self.m[: len(row)], row).raised(lambda m: roofline(m, n, k))

    def _bilinear(self, n: int, k: int) -> list[float]:
        n0, n1, a = between(self._n, n)
        k0, k1, b = between(self._k, k)
        corners = ((n0, k0, (1 - a) * (1 - b)), (n0, k1, (1 - a) * b), (n1, k0, a * (1 - b)), (n1, k1, a * b))
        rows = [(weight, self._rows[self._n[i], self._k[j]]) for i, j, weight in corners]
        return [sum(weight * row[column] for weight, row in rows) for column in range(len(self.m))]

    def _nearest(self, n: int, k: int) -> tuple[int, int]:
        """The nearest measured shape; the nearest point of a grid may lie between measured ones."""
        if self._is_grid:
            return min(max(n, self._n[0]), self._n[-1]), min(max(k, self._k[0]), self._k[-1])
        return min(self._rows, key=lambda shape: (abs(log(shape[0] / n)) + abs(log(shape[1] / k)), shape))


@dataclass(frozen=True)
class _Heads:
    """Which measured attention stands for the wanted one: its table, and how many of its batches make one of ours."""

    table: dict[str, Any]
    batch_scale: float
    exact: bool


def _pick_heads(tables: list[dict[str, Any]], heads: int, kv_heads: int, head_dim: int) -> _Heads:
    """The measured head counts nearest to (heads, kv_heads, head_dim).

    Sequences and KV heads are the same axis to an attention kernel: b sequences of h KV heads cost as 2b of h/2, so the
    group size (heads a KV head) must be near and the batch makes up for the rest, as it does for the head size.
    """
    group = heads / kv_heads

    def distance(table: dict[str, Any]) -> tuple[float, float, float]:
        other = table["heads"] / table["kv_heads"]
        size = abs(log(table["head_dim"] / head_dim))
        return size, abs(log(other / group)), abs(log(table["kv_heads"] / kv_heads))

    table = min(tables, key=distance)
    exact = distance(table) == (0.0, 0.0, 0.0)
    return _Heads(table, heads * head_dim / (table["heads"] * table["head_dim"]), exact)


class DecodeAttention:
    """Times of decode attention by batch and context, for one layer."""

    def __init__(self, tables: list[dict[str, Any]], heads: int, kv_heads: int, head_dim: int) -> None:
        picked = _pick_heads(tables, heads, kv_heads, head_dim)
        self.exact = picked.exact
        self._scale = picked.batch_scale
        self._batch: list[int] = picked.table["batch"]
        self._context: list[int] = picked.table["context"]
        self._rows = [Curve(self._context[: len(row)], row) for row in picked.table["ns"]]

    def curve(self, rows: int, roofline: Roofline) -> Curve:
        """Time over the mean context of ``rows`` sequences; ``roofline(context)`` is their least time."""
        batch = rows * self._scale
        low, high, weight = between(self._batch, batch)
        beyond = max(1.0, batch / self._batch[-1])
        knots = [self._rows[low].at(c) * (1 - weight) + self._rows[high].at(c) * weight for c in self._context]
        return Curve(self._context, [beyond * t for t in knots]).raised(roofline)


class PrefillAttention:
    """Times of causal prefill attention by batch and length, for one layer.

    A batch of unequal lengths, or one behind cached prefixes, costs as the batch of *equal work*: ``n`` new tokens
    behind ``p`` cached ones compute as many scores as a whole prompt of ``sqrt(n * (n + 2p))``; requests together as
    the batch, of a fractional size, of prompts as long as the longest of them. Where chunks behind a prefix are
    measured, no request is faster than its own measurement (a short chunk reads a long prefix in sequence).

    A calibration measures chunks *behind* prefixes on the engine's own kernels, closely enough to do without that rule:
    a request then costs as the whole prompt that takes as long as it, and a batch as so many equal prompts of the same
    work (each has its own fixed cost), but not less than its longest alone.
    """

    def __init__(self, tables: list[dict[str, Any]], heads: int, kv_heads: int, head_dim: int) -> None:
        picked = _pick_heads(tables, heads, kv_heads, head_dim)
        self.exact = picked.exact
        self._scale = picked.batch_scale
        self._batch: list[int] = picked.table["batch"]
        self._rows = [Curve(picked.table["length"][: len(row)], [sqrt(t) for t in row]) for row in picked.table["ns"]]
        prefix = picked.table.get("prefix")
        self._prefix: list[int] = prefix["prefix"] if prefix else []
        self._chunks = [Curve(prefix["chunk"], row) for row in prefix["ns"]] if prefix else []
        behind = picked.table.get("behind")
        self._behind: list[int] = behind["prefix"] if behind else []
        self._roots = (
            [Curve(behind["chunk"][: len(row)], [sqrt(t) for t in row]) for row in behind["ns"]] if behind else []
        )

    @property
    def measures_prefix(self) -> bool:
        """Whether chunks behind a cached prefix are measured."""
        return bool(self._chunks or self._roots)

    def at(self, new_tokens: Sequence[int], prefix_tokens: Sequence[int]) -> float:
        """Time (ns) of one batch; the roofline is the caller's."""
        if self._roots:
            return self._by_equals([self._length(n, p) for n, p in zip(new_tokens, prefix_tokens, strict=True)])
        work = [n * (n + 2 * p) for n, p in zip(new_tokens, prefix_tokens, strict=True)]
        longest = max(work)
        time = self.equal(sum(work) / longest, sqrt(longest))
        if self._chunks:
            for n, p in zip(new_tokens, prefix_tokens, strict=True):
                if p:
                    time = max(time, self.behind_prefix(n, p))
        return time

    def _by_equals(self, lengths: list[float]) -> float:
        mean = sqrt(sum(length * length for length in lengths) / len(lengths))
        return max(self.equal(len(lengths), mean), self.equal(1, max(lengths)))

    def _length(self, new_tokens: int, prefix_tokens: int) -> float:
        """Of the whole prompt that takes as long as this chunk behind this prefix."""
        if not prefix_tokens:
            return new_tokens
        low, high, weight = between(self._behind, prefix_tokens)
        lower, upper = self._roots[low].at(new_tokens), self._roots[high].at(new_tokens)
        beyond = max(1.0, prefix_tokens / self._behind[-1])
        return self._rows[0].inverse(sqrt(beyond * (lower * lower * (1 - weight) + upper * upper * weight)))

    def equal(self, batch: float, length: float) -> float:
        """Time (ns) of ``batch`` whole prompts of ``length`` tokens."""
        batch *= self._scale
        if len(self._batch) == 1 or batch < self._batch[0]:
            length *= sqrt(batch / self._batch[0])
            batch = self._batch[0]
        low, high, weight = between(self._batch, batch)
        beyond = max(1.0, batch / self._batch[-1])
        lower, upper = self._rows[low].at(length), self._rows[high].at(length)
        return beyond * (lower * lower * (1 - weight) + upper * upper * weight)

    def behind_prefix(self, new_tokens: int, prefix_tokens: int) -> float:
        """Time (ns) of one chunk, from the measurements behind a prefix; 0 without them."""
        if not self._chunks:
            return 0.0
        low, high, weight = between(self._prefix, prefix_tokens)
        lower, upper = self._chunks[low].at(new_tokens), self._chunks[high].at(new_tokens)
        return max(1.0, prefix_tokens / self._prefix[-1]) * (lower * (1 - weight) + upper * weight)


class MoeTable:
    """Times of a layer's routed experts by tokens, for shapes (hidden, expert width on this device, top-k, experts)."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._tokens: list[int] = data["tokens"]
        shapes = (tuple(shape) for shape in data["shapes"])
        self._rows: dict[tuple[int, ...], list[float]] = dict(zip(shapes, data["ns"], strict=True))

    def holds(self, *shape: int) -> bool:
        """Whether this shape is measured."""
        return shape in self._rows

    def curve(self, roofline: Callable[..., float], *shape: int) -> Curve:
        """Time over tokens; a shape without measurement keeps the utilisation of the nearest measured one."""
        near = shape if shape in self._rows else min(self._rows, key=lambda other: (_distance(other, shape), other))
        row = [
            t * roofline(tokens, *shape) / roofline(tokens, *near)
            for tokens, t in zip(self._tokens, self._rows[near], strict=True)
        ]
        return Curve(self._tokens, row).raised(lambda tokens: roofline(tokens, *shape))


def _distance(left: tuple[int, ...], right: tuple[int, ...]) -> float:
    return sum(abs(log(a / b)) for a, b in zip(left, right, strict=True))
