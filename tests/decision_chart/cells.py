"""What the chart compares, and how one cell of it is found: the highest rate that keeps the limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

from testbed import load_scenario, simulate

SEEDS = (0, 1, 2, 3, 4)
AZURE = "lengths: azure-conv-2023"


class Layout(NamedTuple):
    """A loop, and how many devices it has."""

    devices: int
    settings: tuple[str, ...]
    speed: float = 1.0
    """Rate over that of one device: where the search begins."""


LAYOUTS = {
    "normal": Layout(1, ("engine.loop=normal",)),
    "overlap": Layout(1, ("engine.loop=overlap",)),
    "overlap_thread": Layout(1, ("engine.loop=overlap_thread",)),
    "pipeline": Layout(2, ("engine.loop=pipeline", "engine.parallel={pp: 2}"), 1.3),
    "pipeline_async": Layout(2, ("engine.loop=pipeline_async", "engine.parallel={pp: 2}"), 1.3),
    "dp 2": Layout(2, ("engine.loop=overlap", "engine.parallel={dp: 2}", "routing.policy=shortest_queue"), 2.2),
    "tp 2": Layout(2, ("engine.loop=overlap", "engine.parallel={tp: 2}"), 2.5),
    "disaggregated 1:1": Layout(
        2, ("disaggregation={prefill: 1, decode: 1, link: {gb_per_s: 50, latency_us: 10}}",), 2.2
    ),
}
"""By name. Tensor parallelism is no loop, but what one would do with two devices otherwise."""


class Workload(NamedTuple):
    """Requests but for their rate."""

    settings: str
    """With ``{rate}`` in it."""
    count: int
    """Requests a device: they arrive for about three times as long as one is served."""
    rate_per_s: float
    """What one H100 may do with an 8B model: where the search begins."""
    ttft_factor: float = 1.0
    """How much later than in a chat the first token may come."""
    tpot_factor: float = 1.0


WORKLOADS = {
    "chat": Workload(f"{{{{arrivals: {{{{kind: poisson, rate_per_s: {{rate}}}}}}, {AZURE}}}}}", 120, 14),
    "long prompts": Workload(
        "{{arrivals: {{kind: poisson, rate_per_s: {rate}}}, lengths: {{prompt_tokens: {{kind: uniform, low: 4000,"
        " high: 12000}}, output_tokens: {{kind: uniform, low: 50, high: 150}}}}}}",
        60,
        2.0,
        ttft_factor=2.0,
    ),
    "long outputs": Workload(
        "{{arrivals: {{kind: poisson, rate_per_s: {rate}}}, lengths: {{prompt_tokens: {{kind: uniform, low: 100,"
        " high: 300}}, output_tokens: {{kind: uniform, low: 300, high: 900}}}}}}",
        120,
        9,
        tpot_factor=0.5,
    ),
    "bursty": Workload(f"{{{{arrivals: {{{{kind: gamma, cv: 4, rate_per_s: {{rate}}}}}}, {AZURE}}}}}", 120, 8),
    "shared prefixes": Workload(
        "{{arrivals: {{kind: poisson, rate_per_s: {rate}}}, prefix: {{groups: 40, prefix_tokens: 2000, zipf: 0.8}},"
        " lengths: {{prompt_tokens: {{kind: uniform, low: 50, high: 500}}, output_tokens: {{kind: uniform, low: 50,"
        " high: 300}}}}}}",
        120,
        20,
    ),
}


MORE_REQUESTS = {("long outputs", "tp 2"): 2}
"""Times as many, where all of the usual ones in one batch would break no limit."""


class Machine(NamedTuple):
    """A model on a device, and what its users expect."""

    model: str
    device: str
    hosts: tuple[str, ...]
    ttft_ms: float
    tpot_ms: float
    """Three times what a lone request has, or a little more."""
    speed: float
    """Rate over that of the 8B model on an H100: where the search begins."""


MACHINES = {
    "Llama-3.1-8B, H100": Machine("llama-3.1-8b", "h100-sxm", ("sglang-0.5",), 1000, 20, 1.0),
    "Qwen3-0.6B, H100": Machine("qwen3-0.6b", "h100-sxm", ("sglang-0.5", "testbed"), 500, 8, 3.0),
    "Llama-3.1-8B, L40S": Machine("llama-3.1-8b", "l40s", ("sglang-0.5",), 2000, 60, 0.3),
}
STATISTIC = "p90"
"""Of TTFT and of TPOT, held against the limits."""


class Cell(NamedTuple):
    """One place of the chart."""

    machine: str
    host: str
    workload: str
    layout: str

    def settings(self, rate_per_s: float, count: int | None = None) -> tuple[str, ...]:
        """Of the scenario; ``count``: requests a device, None: the workload's."""
        workload, layout = WORKLOADS[self.workload], LAYOUTS[self.layout]
        more = MORE_REQUESTS.get((self.workload, self.layout), 1)
        return (
            f"workload={workload.settings.format(rate=rate_per_s)}",
            f"workload.count={(count or workload.count) * layout.devices * more}",
            *layout.settings,
        )


class Capacity(NamedTuple):
    """What one seed gives for a cell."""

    rate_per_s: float
    """The highest at which both statistics keep their limits."""
    mean_ttft_ms: float
    mean_tpot_ms: float
    """Both at the simulated rate next to it."""
    runs: int


class Strained(NamedTuple):
    """A run at one rate."""

    rate_per_s: float
    strain: float
    """The larger of TTFT and TPOT, each over its limit: 1 is the rate looked for."""
    mean_ttft_ms: float
    mean_tpot_ms: float


def cells() -> Iterator[Cell]:
    """Every cell, machine by machine."""
    for name, machine in MACHINES.items():
        for host, workload, layout in product(machine.hosts, WORKLOADS, LAYOUTS):
            yield Cell(name, host, workload, layout)


def measure(cell: Cell, seed: int, rate_per_s: float, count: int | None = None) -> Strained:
    """Simulate ``cell`` once."""
    machine, workload = MACHINES[cell.machine], WORKLOADS[cell.workload]
    base = {
        "model": machine.model,
        "device": machine.device,
        "host": cell.host,
        "seed": seed,
        "workload": {"arrivals": {"kind": "all_at_once"}, "lengths": "azure-conv-2023", "count": 1},
    }
    found = simulate(load_scenario(base, cell.settings(rate_per_s, count)).scenario).aggregates()
    ttft = found[f"{STATISTIC}_ttft_ms"] / (machine.ttft_ms * workload.ttft_factor)
    tpot = found[f"{STATISTIC}_tpot_ms"] / (machine.tpot_ms * workload.tpot_factor)
    return Strained(rate_per_s, max(ttft, tpot), found["mean_ttft_ms"], found["mean_tpot_ms"])


def capacity(cell: Cell, seed: int, count: int | None = None) -> Capacity:
    """Find the highest rate of ``cell`` that keeps the limits."""
    first = WORKLOADS[cell.workload].rate_per_s * MACHINES[cell.machine].speed * LAYOUTS[cell.layout].speed
    return highest_rate(lambda rate: measure(cell, seed, rate, count), first)


CLOSE = 0.05
"""Strain within this of 1 ends the search, and so does a bracket of rates this narrow."""
MOST_RUNS = 9
USUAL_SLOPE = 1.5
"""Strain grows with about this power of the rate."""
STRIDE = 2.0
"""The search leaves what it knows by this factor at most."""


def highest_rate(measured: Callable[[float], Strained], first_rate: float) -> Capacity:
    """Where strain reaches 1, searched from ``first_rate`` on along straight lines in logarithms.

    0 when ``MOST_RUNS`` have seen no rate at which the limits are kept, or none at which they are not.
    """
    runs: list[Strained] = []
    rate, below, above = first_rate, None, None
    while len(runs) < MOST_RUNS:
        runs.append(measured(rate))
        if abs(runs[-1].strain - 1) < CLOSE:
            return _found(rate * runs[-1].strain ** (-1 / USUAL_SLOPE), runs)
        below = max((run for run in runs if run.strain <= 1), key=lambda run: run.rate_per_s, default=None)
        above = min((run for run in runs if run.strain > 1), key=lambda run: run.rate_per_s, default=None)
        rate = _between(below, above) if below and above else _beyond(runs)
        if below and above and above.rate_per_s < below.rate_per_s * (1 + CLOSE):
            return _found(rate, runs)
    return _found(rate if below and above else 0.0, runs)


def _found(rate_per_s: float, runs: list[Strained]) -> Capacity:
    nearest = min(runs, key=lambda run: abs(math.log(run.strain)))
    return Capacity(rate_per_s, nearest.mean_ttft_ms, nearest.mean_tpot_ms, len(runs))


def _between(below: Strained, above: Strained) -> float:
    low, high = math.log(below.strain), math.log(above.strain)
    share = min(max(-low / (high - low), 0.1), 0.9)
    return math.exp(math.log(below.rate_per_s) * (1 - share) + math.log(above.rate_per_s) * share)


def _beyond(runs: list[Strained]) -> float:
    """Along the line of the last two runs, at most a stride away."""
    last, slope = runs[-1], USUAL_SLOPE
    if len(runs) > 1 and runs[-2].rate_per_s != last.rate_per_s:
        slope = math.log(last.strain / runs[-2].strain) / math.log(last.rate_per_s / runs[-2].rate_per_s)
    step = -math.log(last.strain) / max(slope, 0.3)
    limit = math.log(STRIDE)
    return last.rate_per_s * math.exp(min(max(step, -limit), limit))
