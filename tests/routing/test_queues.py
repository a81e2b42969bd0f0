"""Routers in front of single servers, against queueing theory: Poisson arrivals, exponential service, first come first
served. Where a law is exact, the simulated mean lies in its 99 % interval; orders that theory proves are held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from heapq import heappop, heappush
from math import factorial
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.sparse import lil_matrix
from scipy.sparse.linalg import spsolve

from testbed.messages import GenerateRequest, LoadReport
from testbed.routing.controller import Controller
from testbed.routing.policies import RoutingPolicy, ShortestQueue, build_policy
from testbed.routing.replica import Replica
from testbed.scenario.routing import Routing
from testbed.workload.draw import Uniforms, exponential
from tests.laws.queues import pollaczek_khinchine
from tests.laws.statistics import Check, Floats, mean_check
from tests.routing.naive import request

CUSTOMERS = 30_000
RHO = 0.8
SEEDS = (0, 1)


class Servers:
    """``count`` servers of mean service time 1 behind a router."""

    def __init__(self, count: int, policy: RoutingPolicy, hears_ends: bool, report_every: int | None) -> None:
        self.controller = Controller(count, policy, hears_ends=hears_ends)
        self.free_at = [0.0] * count
        self.departures: list[tuple[float, int, str]] = []
        self.open, self.received, self.departed = [0] * count, [0] * count, [0] * count
        self._report_every = report_every

    def serve(self, name: str, arrival: float, service: float) -> tuple[int, float]:
        """Send a customer; returns the server and the wait."""
        chosen = self.controller.submit(request(name, [1]))
        begin = max(arrival, self.free_at[chosen])
        self.free_at[chosen] = begin + service
        self.open[chosen] += 1
        self.received[chosen] += 1
        heappush(self.departures, (begin + service, chosen, name))
        return chosen, begin - arrival

    def depart_until(self, now: float) -> None:
        while self.departures and self.departures[0][0] <= now:
            _, server, name = heappop(self.departures)
            self.open[server] -= 1
            self.departed[server] += 1
            self.controller.ended(name)
            if self._report_every and (self.departed[server] % self._report_every == 0 or self.open[server] == 0):
                done, received = self.departed[server], self.received[server]
                self.controller.reported(server, LoadReport(self.open[server], 0, 0, 0, done, received))


@cache
def simulated(
    name: str, servers: int, rho: float, seed: int, hears_ends: bool = True, report_every: int | None = None
) -> tuple[Floats, tuple[int, ...]]:
    """(waits, choices) of every customer."""
    policy = build_policy(Routing(policy=name), seed=seed, vocab_size=2, base_dir=Path())
    world = Servers(servers, policy, hears_ends, report_every)
    gaps = exponential(1 / (servers * rho), Uniforms(seed, "gaps").take(CUSTOMERS))
    services = exponential(1.0, Uniforms(seed, "services").take(CUSTOMERS)).tolist()
    waits, choices = np.empty(CUSTOMERS), []
    for number, arrival in enumerate(np.cumsum(gaps).tolist()):
        world.depart_until(arrival)
        chosen, waits[number] = world.serve(f"c{number}", arrival, services[number])
        choices.append(chosen)
    return waits, tuple(choices)


def check(law: str, theory: float, name: str, servers: int, rho: float = RHO) -> Check:
    return mean_check(law, "mean wait", theory, [simulated(name, servers, rho, seed)[0] for seed in SEEDS])


def split_evenly(servers: int, rho: float) -> float:
    """Every server gets each ``servers``-th arrival of a Poisson stream: E_k/M/1, whose wait is s / (1 - s) with
    s = A*(1 - s), A* the transform of the gaps (L. Kleinrock, Queueing Systems I, 1975, section 6.4)."""

    def excess(s: float) -> float:
        rate = servers * rho
        return (rate / (rate + 1 - s)) ** servers - s

    root: float = brentq(excess, 0.0, 1 - 1e-9)
    return root / (1 - root)


def one_queue(servers: int, rho: float) -> float:
    """Erlang's wait in M/M/c: nobody who routes at arrival can do better."""
    load = servers * rho
    last = load**servers / factorial(servers) / (1 - rho)
    return last / (sum(load**k / factorial(k) for k in range(servers)) + last) / (servers * (1 - rho))


def shorter_of_two(rho: float, places: int = 60) -> float:
    """Mean wait behind two servers of which each arrival joins the shorter queue: the stationary law of the Markov
    chain of both lengths, cut off where it has no weight, and Little's law."""
    number = {(m, n): i for i, (m, n) in enumerate((m, n) for m in range(places) for n in range(m, places))}
    rates = lil_matrix((len(number), len(number)))

    def move(origin: tuple[int, int], target: tuple[int, int], rate: float) -> None:
        target = (min(target), max(target))
        if target in number:
            rates[number[target], number[origin]] += rate
            rates[number[origin], number[origin]] -= rate

    for m, n in number:
        move((m, n), (m + 1, n), 2 * rho)
        if m:
            move((m, n), (m - 1, n), 1.0)
        if n:
            move((m, n), (m, n - 1), 1.0)
    rates[0, :] = 1
    right = np.zeros(len(number))
    right[0] = 1
    weights = spsolve(rates.tocsc(), right)
    mean_customers = sum(weight * (m + n) for (m, n), weight in zip(number, weights, strict=True))
    return float(mean_customers / (2 * rho) - 1)


LAWS: dict[str, Callable[[], Check]] = {
    "random, 2 servers: M/M/1": lambda: check("M/M/1", pollaczek_khinchine(RHO, 2.0, RHO), "random", 2),
    "random, 6 servers: M/M/1": lambda: check("M/M/1", pollaczek_khinchine(RHO, 2.0, RHO), "random", 6),
    "round robin, 2 servers: E2/M/1": lambda: check("E2/M/1", split_evenly(2, RHO), "round_robin", 2),
    "round robin, 6 servers: E6/M/1": lambda: check("E6/M/1", split_evenly(6, RHO), "round_robin", 6),
    "shortest queue, 2 servers": lambda: check("shorter of two", shorter_of_two(RHO), "shortest_queue", 2),
    "power of two, 2 servers": lambda: check("shorter of two", shorter_of_two(RHO), "power_of_two", 2),
}


@pytest.mark.parametrize("law", LAWS)
def test_mean_wait_is_that_of_theory(law: str) -> None:
    found = LAWS[law]()
    assert found.holds, str(found)


def test_closed_forms_agree_with_each_other() -> None:
    assert split_evenly(1, 0.7) == pytest.approx(pollaczek_khinchine(0.7, 2.0, 0.7))
    assert one_queue(1, 0.7) == pytest.approx(pollaczek_khinchine(0.7, 2.0, 0.7))
    assert one_queue(2, RHO) < shorter_of_two(RHO) < split_evenly(2, RHO)
    assert shorter_of_two(RHO, 50) == pytest.approx(shorter_of_two(RHO, 60), rel=1e-6)


@pytest.mark.parametrize("servers", [2, 6])
def test_who_looks_waits_less(servers: int) -> None:
    """One queue for all < shortest queue < round robin < random, and two choices lie in between (W. Winston, Journal of
    Applied Probability 14(1), 1977; M. Mitzenmacher, 2001), with room to spare on common random numbers."""
    names = ("shortest_queue", "power_of_two", "round_robin", "random")
    mean = {name: float(np.mean([simulated(name, servers, RHO, seed)[0] for seed in SEEDS])) for name in names}
    assert one_queue(servers, RHO) < 1.02 * mean["shortest_queue"]
    assert 1.2 * mean["shortest_queue"] < mean["round_robin"] and 1.2 * mean["round_robin"] < mean["random"]
    assert mean["shortest_queue"] <= mean["power_of_two"] < mean["random"] / 1.2


def test_a_report_at_every_departure_is_hearing_every_end() -> None:
    heard = simulated("shortest_queue", 4, RHO, 0)[1]
    assert simulated("shortest_queue", 4, RHO, 0, False, 1)[1] == heard
    assert simulated("shortest_queue", 4, RHO, 0, True, 1)[1] == heard
    assert simulated("shortest_queue", 4, RHO, 0, True, 50)[1] == heard, "late reports take nothing back"


def test_without_reports_the_shortest_queue_is_round_robin() -> None:
    assert simulated("shortest_queue", 4, RHO, 0, False)[1] == simulated("round_robin", 4, RHO, 0)[1]


def test_late_reports_cost_waiting() -> None:
    """But what was sent since is known, and an idle server says so: even a hundred departures late it beats a round."""
    waits = [simulated("shortest_queue", 4, RHO, 0, False, every)[0].mean() for every in (1, 10, 100)]
    assert 1.1 * waits[0] < waits[1] < waits[2] < simulated("round_robin", 4, RHO, 0)[0].mean() / 1.5


def test_a_router_that_takes_the_longest_queue_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: the sign of the comparison."""

    def longest(self: ShortestQueue, _: GenerateRequest, replicas: Sequence[Replica]) -> int:
        return max(replicas, key=lambda each: (each.requests, -each.index)).index

    monkeypatch.setattr(ShortestQueue, "choose", longest)
    simulated.cache_clear()
    assert not check("shorter of two", shorter_of_two(0.6), "shortest_queue", 2, 0.6).holds
    simulated.cache_clear()
