"""What judges a simulation: scenarios from idle to saturation, none of which was used to calibrate.

Lengths are multiples of a target's unit, rates shares of its capacity, so that the same cases judge a GPU, the CPU and
a modelled device in real time. A case's capacity is that of a simulation of its own requests, all sent at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from testbed import load_scenario, simulate
from testbed.scenario.schema import Scenario

Fields = dict[str, Any]
LOOPS: dict[str, Fields] = {"normal": {"loop": "normal"}, "overlap": {"loop": "overlap"}}
STRATEGIES: dict[str, Fields] = {
    name: {"batching": name} for name in ("prefill_first", "mixed_chunk", "stall_free", "static")
}
SHORT_OF_MEMORY = {name: {**fields, "schedule_conservativeness": 0.1} for name, fields in LOOPS.items()}
"""Admits more than the pool holds in the end, so that requests are retracted."""
CAPACITY_REQUESTS = 200
LEAST_REQUESTS, MOST_REQUESTS = 24, 4_000


@dataclass(frozen=True)
class Target:
    """What the cases are run on."""

    name: str
    model: str
    unit: int
    """Tokens: lengths are multiples of it."""
    engine: Fields
    """The same in every case, so that a device is opened once."""
    seconds: float
    """How long requests are sent in one run."""
    device: str = "h100-sxm"
    """Profile that simulations are priced with, as ``host``."""
    host: str = "testbed"
    host_inject: str | None = None
    seed: int = 20_261_121
    cases: tuple[str, ...] = ()
    """Names; empty: all."""


@dataclass(frozen=True)
class Case:
    """One scenario, in variants."""

    name: str
    what: str
    prompt: tuple[float, float]
    """Lowest and highest, in units; drawn evenly, or log-normally where ``skewed``."""
    output: tuple[float, float]
    arrivals: Callable[[float, Target], Fields]
    """From the capacity in requests/s."""
    skewed: bool = False
    more: Callable[[Target], Fields] = lambda target: {}
    """Other fields of the workload."""
    variants: dict[str, Fields] = field(default_factory=lambda: LOOPS)

    def lengths(self, target: Target) -> Fields:
        """``workload.lengths``."""
        return {
            "prompt_tokens": _law(self.prompt, target.unit, self.skewed),
            "output_tokens": _law(self.output, target.unit, self.skewed),
        }

    def scenarios(self, target: Target) -> dict[str, Scenario]:
        """By variant."""
        capacity = self.capacity(target)
        workload = {
            "lengths": self.lengths(target),
            "arrivals": self.arrivals(capacity, target),
            "duration_s": target.seconds,
            "count": MOST_REQUESTS,
            **self.more(target),
        }
        return {name: self._scenario(target, variant, workload) for name, variant in self.variants.items()}

    def capacity(self, target: Target) -> float:
        """Requests/s of the first variant when there is always another request."""
        workload = {
            "lengths": self.lengths(target),
            "arrivals": {"kind": "all_at_once"},
            "count": CAPACITY_REQUESTS,
            **{key: value for key, value in self.more(target).items() if key == "prefix"},
        }
        first = next(iter(self.variants.values()))
        return float(simulate(self._scenario(target, first, workload)).aggregates()["request_throughput"])

    def _scenario(self, target: Target, variant: Fields, workload: Fields) -> Scenario:
        content = {
            "name": f"{target.name} {self.name}",
            "model": target.model,
            "device": target.device,
            "host": target.host,
            "host_inject": target.host_inject,
            "engine": {**target.engine, **variant},
            "workload": workload,
            "tokens": "oracle",
            "seed": target.seed,
        }
        return load_scenario(content).scenario


def _law(ends: tuple[float, float], unit: int, skewed: bool) -> Fields:
    low, high = (max(round(end * unit), 1) for end in ends)
    if low == high:
        return {"kind": "fixed", "value": low}
    if skewed:
        return {"kind": "lognormal", "median": (low * high) ** 0.5, "sigma": 1.0, "min": low - 1, "max": high + 1}
    return {"kind": "uniform", "low": low, "high": high}


def poisson(load: float) -> Callable[[float, Target], Fields]:
    """Arrivals at this share of the capacity, and at least a few."""
    return lambda capacity, target: {
        "kind": "poisson",
        "rate_per_s": max(load * capacity, LEAST_REQUESTS / target.seconds),
    }


def constant(load: float) -> Callable[[float, Target], Fields]:
    """Evenly spaced."""
    return lambda capacity, target: {"kind": "constant", "rate_per_s": max(load * capacity, 4 / target.seconds)}


def bursts(load: float) -> Callable[[float, Target], Fields]:
    """On for a quarter of the time."""
    return lambda capacity, target: {
        "kind": "bursts",
        "on_rate_per_s": 4 * load * capacity,
        "on_s": target.seconds / 16,
        "off_s": 3 * target.seconds / 16,
        "durations": "fixed",
    }


def closed(users: int, think_s: float) -> Callable[[float, Target], Fields]:
    """Users who wait for their answer."""
    return lambda capacity, target: {
        "kind": "closed_loop",
        "users": users,
        "think_s": {"kind": "exponential", "mean": think_s, "max": 8 * think_s} if think_s else 0,
    }


def _prefixes(target: Target) -> Fields:
    return {"prefix": {"groups": 8, "prefix_tokens": 12 * target.unit, "zipf": 1.0, "share": 0.9}}


def _turns(target: Target) -> Fields:
    return {
        "sessions": {
            "turns": {"kind": "uniform", "low": 2, "high": 5},
            "think_s": {"kind": "uniform", "low": 0.05, "high": 0.3},
            "user_tokens": {"kind": "uniform", "low": target.unit // 2, "high": 2 * target.unit},
            "system_tokens": 2 * target.unit,
        }
    }


CASES = (
    Case("idle", "one request at a time", (2, 16), (1, 2), constant(0.02)),
    Case("light", "mixed lengths at 30 % of capacity", (1, 16), (0.5, 4), poisson(0.3), skewed=True),
    Case("busy", "mixed lengths at 70 %", (1, 16), (0.5, 4), poisson(0.7), skewed=True),
    Case("saturated", "mixed lengths, twice what it can do", (1, 16), (0.5, 4), poisson(2.0), skewed=True),
    Case("uniform", "equal requests, evenly spaced, 60 %", (8, 8), (2, 2), constant(0.6)),
    Case("long", "long prompts in many chunks, 60 %", (16, 48), (0.5, 2), poisson(0.6)),
    Case("prefixes", "90 % begin with one of 8 long prefixes, 70 %", (0.5, 4), (0.5, 2), poisson(0.7), more=_prefixes),
    Case("bursts", "a quarter of the time at twice the capacity", (1, 8), (0.5, 2), bursts(0.5)),
    Case("closed", "32 users who think", (1, 8), (1, 4), closed(32, 0.05)),
    Case(
        "crowd",
        "256 users who do not think: full batches, a pool that is too small, retractions",
        (0.5, 4),
        (2, 6),
        closed(256, 0.0),
        variants=SHORT_OF_MEMORY,
    ),
    Case("sessions", "conversations, each turn behind the last", (1, 4), (0.5, 2), poisson(0.2), more=_turns),
    Case("strategies", "the batching strategies, 60 %", (1, 16), (0.5, 4), poisson(0.6), variants=STRATEGIES),
)


def cases_of(target: Target) -> list[Case]:
    """Those that the target names."""
    return [case for case in CASES if not target.cases or case.name in target.cases]
