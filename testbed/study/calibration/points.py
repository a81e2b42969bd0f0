"""What is measured of a device: operators over their shapes, whole steps, and which of them are held out.

Axes are geometric. Points between their knots are held out: no table is made from them. So are whole steps of random
batches. What takes too long on a slow device is left away from the large end; see ``device``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np

from testbed.engine.measure.steps import StepShape
from testbed.scenario.models import ModelSpec

LEAST_CONTEXT = 16
BATCHES = (1, 2, 4, 8)
"""Prefills of one step."""
STEP_CONTEXT = 64
"""Context of the decode steps from which is read what a step takes beyond its operators."""
RANDOM_STEPS = 6
"""Of each kind."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine holds."""

    tokens: int
    """Of one step."""
    rows: int
    context: int
    """Tokens of one request."""
    kv_tokens: int
    page_size: int

    def holds(self, lengths: Sequence[int]) -> bool:
        """Whether rows of so many tokens of KV have their pages at once."""
        return sum(-(-length // self.page_size) for length in lengths) * self.page_size <= self.kv_tokens


@dataclass(frozen=True, slots=True)
class Point:
    """One operator at one shape, in all layers."""

    operator: str
    tokens: int = 0
    """Of the step; of attention, new ones of each row."""
    rows: int = 1
    prefix_tokens: int = 0
    """Of each prefilling row."""
    context: int = 0
    """Of each decoding row; with ``longest``, of the shortest."""
    longest: int = 0
    """Contexts rise evenly to this one; 0: all are equal."""
    held_out: bool = False

    @property
    def contexts(self) -> list[int]:
        """Of the decoding rows."""
        ends = self.context, self.longest or self.context
        return [int(context) for context in np.linspace(*ends, self.rows).round()]

    @property
    def work(self) -> int:
        """Grows with the time that it takes; to be compared within an operator."""
        if self.operator.startswith("decode"):
            return sum(self.contexts)
        return self.rows * self.tokens * (self.tokens + 2 * self.prefix_tokens if "prefill" in self.operator else 1)


@dataclass(frozen=True, slots=True)
class StepPoint:
    """A whole step. ``kind``: which part of the table ``step`` it belongs to."""

    what: str
    kind: str
    shape: StepShape
    held_out: bool

    plain: bool = False
    """One prompt, or rows of one context: such steps show what is beyond the operators."""

    @property
    def tokens(self) -> int:
        """That the step computes."""
        return sum(self.shape.new_tokens) + len(self.shape.contexts)


def axis(low: int, high: int, per_octave: float) -> list[int]:
    """Whole numbers from ``low`` to ``high``, about ``per_octave`` for each doubling."""
    if high <= low:
        return [high]
    count = max(1, round(math.log2(high / low) * per_octave))
    return sorted({round(low * (high / low) ** (i / count)) for i in range(count + 1)})


def amid(knots: Sequence[int], every: int = 2) -> list[int]:
    """Points amid every second, third, ... pair of knots: those that are held out. Never an end."""
    pairs = [(a, b) for a, b in pairwise(knots) if b - a > 1][every - 2 :: every]
    return [round(math.sqrt(a * b)) for a, b in pairs]


def token_operators(spec: ModelSpec) -> list[str]:
    """Operators whose time is that of the step's tokens."""
    mlp = ["router", "experts"] if spec.is_moe else ["gate_up", "down", "activation"]
    return ["qkv", "o", *mlp, "norms", "rope_kv_write", "embedding"]


def operator_points(spec: ModelSpec, limits: Limits, per_octave: float) -> list[Point]:
    """All operators, the small shapes of each first."""
    points = list(_by_tokens(spec, limits, per_octave))
    points += _decode(limits, per_octave)
    points += _prefill(limits, per_octave)
    return sorted(points, key=lambda point: (point.operator, point.work))


def _by_tokens(spec: ModelSpec, limits: Limits, per_octave: float) -> Iterator[Point]:
    knots = axis(1, limits.tokens, 2 * per_octave)  # libraries change their kernels from size to size
    rows = [m for m in knots if m < limits.rows]
    rows.append(next(m for m in [*knots, limits.rows] if m >= limits.rows or m == knots[-1]))
    for operator in token_operators(spec):
        yield from _line(operator, knots)
    yield from _line("lm_head", rows)
    yield from _line("sampling", axis(1, limits.rows, per_octave))


def _line(operator: str, knots: Sequence[int]) -> Iterator[Point]:
    yield from (Point(operator, tokens) for tokens in knots)
    yield from (Point(operator, tokens, held_out=True) for tokens in amid(knots))


def _decode(limits: Limits, per_octave: float) -> Iterator[Point]:
    rows, contexts = axis(1, limits.rows, per_octave), axis(LEAST_CONTEXT, limits.context, per_octave)
    base = Point("decode_attention")
    for row, context in product(rows, contexts):
        yield replace(base, rows=row, context=context)
    for row, context in product(amid(rows), amid(contexts)):
        yield replace(base, rows=row, context=context, held_out=True)
    for i, (row, longest) in enumerate(product(rows[1:], contexts[1::2])):
        yield Point("decode_skew", rows=row, context=LEAST_CONTEXT, longest=longest, held_out=i % 3 == 2)


def _prefill(limits: Limits, per_octave: float) -> Iterator[Point]:
    longest = min(limits.tokens, limits.context)
    lengths, batches = axis(1, longest, per_octave), [b for b in BATCHES if b <= limits.rows]
    base = Point("prefill_attention")
    for batch, length in product(batches, lengths):
        yield replace(base, rows=batch, tokens=length)
    for batch, length in product((1, 3), amid(lengths)):
        if batch <= limits.rows:
            yield replace(base, rows=batch, tokens=length, held_out=True)
    half = limits.context // 2  # so that all chunks fit behind all prefixes
    prefixes, chunks = axis(LEAST_CONTEXT, half, per_octave / 2), axis(1, min(limits.tokens, half), per_octave / 2)
    for prefix, chunk in product(prefixes, chunks):
        yield Point("prefill_behind_prefix", chunk, prefix_tokens=prefix)
    for prefix, chunk in product(amid(prefixes), amid(chunks)):
        yield Point("prefill_behind_prefix", chunk, prefix_tokens=prefix, held_out=True)


def fits(point: Point, limits: Limits) -> bool:
    """Whether the engine holds so much at once."""
    if point.context:
        return limits.holds(point.contexts)
    if not point.operator.startswith("prefill"):
        return True
    of_row = point.tokens + point.prefix_tokens
    held = limits.holds([of_row] * point.rows) and of_row <= limits.context
    return held and point.rows * point.tokens <= limits.tokens


def step_points(limits: Limits, graph_rows: Sequence[int], per_octave: float, seed: int) -> list[StepPoint]:
    """Steps that show what a step takes beyond its operators, with some amid them held out; then random batches, all
    held out. ``graph_rows``: sizes of the CUDA graphs."""
    rows, context = axis(1, limits.rows, per_octave), min(STEP_CONTEXT, limits.context)
    lengths = axis(1, min(limits.tokens, limits.context), per_octave)
    points: list[StepPoint] = []
    for held_out, pick in ((False, list[int]), (True, amid)):
        for kind, sizes in (("graph", [row for row in rows if row in graph_rows]), ("eager", rows)):
            points += (
                replace(_decode_step(kind, (context,) * row), held_out=held_out, plain=True) for row in pick(sizes)
            )
        points += (
            replace(_prefill_step((length,), (0,), ()), held_out=held_out, plain=True) for length in pick(lengths)
        )
    return points + list(_random_steps(limits, graph_rows, np.random.Generator(np.random.Philox(key=seed))))


def _decode_step(kind: str, contexts: tuple[int, ...]) -> StepPoint:
    return StepPoint("decode step", kind, StepShape((), (), contexts), held_out=True)


def _prefill_step(new: tuple[int, ...], prefix: tuple[int, ...], contexts: tuple[int, ...]) -> StepPoint:
    what = "mixed step" if contexts else "prefill step behind prefix" if any(prefix) else "prefill step"
    return StepPoint(what, "prefill", StepShape(new, prefix, contexts), held_out=True)


def _random_steps(limits: Limits, graph_rows: Sequence[int], draw: np.random.Generator) -> Iterator[StepPoint]:
    """Decode, prefill, prefill behind prefixes, and both kinds of rows together, in turn."""
    for _ in range(RANDOM_STEPS):
        contexts = _contexts(limits, limits.rows, limits.kv_tokens, draw)
        yield _decode_step("graph" if len(contexts) <= max(graph_rows, default=0) else "eager", contexts)
        for prefixed, beside in ((False, False), (True, False), (True, True)):
            batch = _log_uniform(draw, 1, min(max(BATCHES), max(1, limits.rows // 2)), 1)[0]
            of_row = min(limits.tokens // batch, limits.context // 2, limits.kv_tokens // (4 * batch))
            new = _log_uniform(draw, min(8, of_row), of_row, batch)
            prefix = _log_uniform(draw, 1, of_row, batch) if prefixed else (0,) * batch
            rows = min(limits.rows - batch, limits.tokens - sum(new))
            decodes = _contexts(limits, rows, limits.kv_tokens // 4, draw) if beside and rows > 0 else ()
            yield _prefill_step(new, prefix, decodes)


def _contexts(limits: Limits, most_rows: int, kv_tokens: int, draw: np.random.Generator) -> tuple[int, ...]:
    rows = _log_uniform(draw, 1, max(1, min(most_rows, kv_tokens // LEAST_CONTEXT)), 1)[0]
    longest = max(LEAST_CONTEXT, min(limits.context, kv_tokens // rows))
    return _log_uniform(draw, min(LEAST_CONTEXT, longest), longest, rows)


def _log_uniform(draw: np.random.Generator, low: int, high: int, count: int) -> tuple[int, ...]:
    drawn = np.exp(draw.uniform(math.log(low), math.log(max(low, high) + 1), count))
    return tuple(int(number) for number in np.clip(drawn, low, max(low, high)))
