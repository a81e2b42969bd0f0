"""Every policy chooses what its definition says, from what the router saw and nothing else (specification F.4, F.7)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from testbed.messages import LoadReport
from testbed.routing.controller import Controller
from testbed.routing.policies import CacheAware, RoutingPolicy, build_policy
from testbed.routing.replica import Replica
from testbed.scenario.errors import InputError
from testbed.scenario.plugins import own_faults
from testbed.scenario.routing import Routing
from tests.routing.naive import Ended, History, Model, Reported, Sent, request

POLICIES = ("round_robin", "random", "shortest_queue", "least_tokens", "power_of_two", "cache_aware")
FEW = settings(max_examples=120, deadline=None, derandomize=True)
THRESHOLDS = (0.5, 2, 1.5)


def policy(name: str, seed: int = 0, **fields: Any) -> RoutingPolicy:
    share, absolute, relative = THRESHOLDS
    thresholds = {"cache_threshold": share, "balance_abs_threshold": absolute, "balance_rel_threshold": relative}
    return build_policy(Routing(policy=name, **{**thresholds, **fields}), seed=seed, vocab_size=100, base_dir=Path())


class Driven:
    """A controller beside the model: both see the same, and must choose the same."""

    def __init__(self, name: str, replicas: int, seed: int, hears_ends: bool) -> None:
        self.controller = Controller(replicas, policy(name, seed), hears_ends=hears_ends)
        self.model = Model(name, seed, THRESHOLDS)
        self.history = History(hears_ends)
        self.replicas = list(range(replicas))
        self.open: list[str] = []
        self.steps = 0

    def submit(self, tokens: tuple[int, ...], extra_key: str) -> None:
        rid = f"r{len(self.history.events)}"
        expected = self.model.choose(self.history, tokens, extra_key, self.replicas)
        assert self.controller.submit(request(rid, tokens, extra_key)) == expected
        self.history.events.append(Sent(expected, rid, tokens, extra_key))
        self.open.append(rid)

    def report(self, replica: int, covered: float, load: tuple[int, int, int, int], late: bool) -> None:
        """A report that covers a share of what no report before covered; ``late``: overtaken by the one before."""
        newest = self.history.last_report(replica)[1]
        uncovered = len(self.history.sent_to(replica)) - newest.received
        received = newest.received + round(covered * uncovered)
        self.steps += 1
        report = LoadReport(*load, self.steps, received)
        if late:
            report = LoadReport(*load, newest.steps - 1, newest.received)
        self.controller.reported(replica, report)
        self.history.events.append(Reported(replica, report))

    def end(self, which: int) -> None:
        if self.open:
            rid = self.open.pop(which % len(self.open))
            self.controller.ended(rid)
            self.history.events.append(Ended(rid))

    def drain(self, which: int) -> None:
        if len(self.replicas) > 1:
            self.controller.drain(self.replicas.pop(which % len(self.replicas)))

    def add(self) -> None:
        self.replicas.append(self.controller.add())


LOADS = st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(50, 90), st.integers(0, 30))
STEPS = st.one_of(
    st.tuples(st.just("submit"), st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), st.sampled_from("ab")),
    st.tuples(st.just("report"), st.integers(0, 4), st.floats(0, 1), LOADS, st.booleans()),
    st.tuples(st.just("end"), st.integers(0, 50)),
)
CHANGES = st.one_of(st.tuples(st.just("drain"), st.integers(0, 4)), st.tuples(st.just("add")))


@pytest.mark.parametrize("name", POLICIES)
@FEW
@given(
    replicas=st.integers(1, 5),
    seed=st.integers(0, 3),
    hears_ends=st.booleans(),
    steps=st.lists(st.one_of(STEPS, STEPS, STEPS, CHANGES), max_size=50),
)
def test_choices_follow_from_what_was_seen(
    name: str, replicas: int, seed: int, hears_ends: bool, steps: list[tuple[Any, ...]]
) -> None:
    driven = Driven(name, replicas, seed, hears_ends)
    for what, *how in steps:
        if what == "report" and how[0] not in driven.replicas:
            continue
        getattr(driven, what)(*how)


@pytest.mark.parametrize("name", POLICIES)
def test_what_was_not_reported_changes_nothing(name: str) -> None:
    """Two worlds in which everything differs but what the router was told: requests end, loads change."""

    def chosen(ends: bool) -> list[int]:
        controller = Controller(3, policy(name))
        found = []
        for number in range(60):
            found.append(controller.submit(request(f"r{number}", [number % 7, 1, number])))
            if ends and number % 2:
                controller.ended(f"r{number}")
            if number % 10 == 9:
                load = LoadReport(number % 4, 1, 10 * (number % 3), 5, number, found.count(number % 3))
                controller.reported(number % 3, load)
        return found

    assert chosen(ends=False) == chosen(ends=True)


def test_a_router_that_peeks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: the end of a request counts although the router cannot hear it."""
    monkeypatch.setattr(Controller, "__init__", _always_hearing(Controller.__init__))
    with pytest.raises(AssertionError):
        test_what_was_not_reported_changes_nothing("shortest_queue")


def _always_hearing(original: Callable[..., None]) -> Callable[..., None]:
    def init(self: Controller, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "hears_ends": True})

    return init


@pytest.mark.parametrize("name", ["random", "power_of_two"])
def test_chance_is_even_and_a_function_of_the_seed(name: str) -> None:
    def chosen(seed: int) -> list[int]:
        replicas = [Replica(index) for index in range(4)]
        router, tokens = policy(name, seed), request("r", [1])
        found = []
        for _ in range(4000):
            found.append(router.choose(tokens, replicas))
            replicas[found[-1]].requests += name == "power_of_two"
        return found

    first = chosen(0)
    assert first == chosen(0) and first != chosen(1)
    counts = np.bincount(first, minlength=4)
    if name == "random":
        assert stats.chisquare(counts).pvalue > 0.01
    else:
        assert counts.max() - counts.min() <= 6, "queues that nobody leaves differ by a handful"


def test_two_choices_of_two_are_the_shortest_queue() -> None:
    both = [Controller(2, policy(name), hears_ends=True) for name in ("power_of_two", "shortest_queue")]
    for number in range(200):
        chosen = {controller.submit(request(f"r{number}", [1])) for controller in both}
        assert len(chosen) == 1
        if number % 3 == 2:
            for controller in both:
                controller.ended(f"r{number - number % 5}")


def test_reports_that_never_come_leave_a_round() -> None:
    """The shortest queue by what was sent alone: one after the other."""
    controller = Controller(4, policy("shortest_queue"))
    assert [controller.submit(request(f"r{number}", [1])) for number in range(12)] == [0, 1, 2, 3] * 3


def test_cache_aware_follows_the_prefix_until_out_of_balance() -> None:
    """The case by hand: one popular prefix, thresholds 2 and 1.5."""
    controller = Controller(3, policy("cache_aware"), hears_ends=True)
    found = [controller.submit(request(f"r{number}", [7] * 8 + [number])) for number in range(12)]
    # Three go to the first; 3 is more than 2, so the shortest queue is chosen until the difference is 2. Then all have
    # the prefix, and the one with the fewest requests is next.
    assert found == [0, 0, 0, 1, 2, 1, 2, 1, 2, 0, 1, 2]
    controller = Controller(3, policy("cache_aware", balance_abs_threshold=1000), hears_ends=True)
    assert [controller.submit(request(f"r{number}", [7] * 8 + [number])) for number in range(8)] == [0] * 8
    unknown = [controller.submit(request(f"u{number}", [50 + number] * 9)) for number in range(4)]
    assert unknown == [1, 2, 1, 2], "an unknown prompt goes to the smallest tree"


def test_cache_aware_forgets_replicas_that_are_gone() -> None:
    router = policy("cache_aware", balance_abs_threshold=1000)
    assert isinstance(router, CacheAware)
    controller = Controller(2, router)
    assert controller.submit(request("r0", [1, 2, 3])) == 0
    controller.drain(0)
    assert controller.submit(request("r1", [1, 2, 3])) == 1
    assert sorted(router.tree.sizes) == [1]
    assert controller.add() == 2
    assert controller.submit(request("r2", [1, 2, 3])) == 1


# -- a user's own, and bad settings ---------------------------------------------------------------------------------

OWN = """
class Last:
    def choose(self, request, replicas):
        return replicas[-1].index

class Nobody:
    def choose(self, request, replicas):
        return 99

class Fails:
    def choose(self, request, replicas):
        return request.no_such_thing

class Speechless:
    pass

class Deaf:
    def choose(self, request):
        return 0

class Clears:
    def choose(self, request, replicas):
        replicas.clear()
        return 0

def not_a_policy(what):
    return what
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], RoutingPolicy]:
    (tmp_path / "router.py").write_text(OWN, encoding="utf-8")

    def build(name: str) -> RoutingPolicy:
        return build_policy(Routing(policy=f"router.py:{name}"), seed=0, vocab_size=100, base_dir=tmp_path)

    return build


def test_own_policy(own: Callable[[str], RoutingPolicy]) -> None:
    controller = Controller(3, own("Last"))
    assert controller.submit(request("r", [1])) == 2


def test_own_policy_that_is_wrong(own: Callable[[str], RoutingPolicy]) -> None:
    for name in ("Speechless", "Deaf", "not_a_policy", "missing"):
        with pytest.raises(InputError) as refused:
            own(name)
        assert refused.value.where == "routing.policy" and refused.value.remedy
    with pytest.raises(InputError, match="99"):
        Controller(2, own("Nobody")).submit(request("r", [1]))
    with pytest.raises(InputError, match="clear"), own_faults():
        Controller(2, own("Clears")).submit(request("r", [1]))
    with pytest.raises(InputError, match="no_such_thing"), own_faults():
        Controller(2, own("Fails")).submit(request("r", [1]))


@pytest.mark.parametrize(
    "fields",
    [
        {"policy": "fastest"},
        {"report_every_steps": 0},
        {"cache_threshold": 1.5},
        {"balance_abs_threshold": -1},
        {"balance_rel_threshold": 0.5},
        {"max_tree_tokens": 0},
        {"no_such_field": 1},
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Routing(**fields)


def test_choices_count_every_replica() -> None:
    """Round robin is even to one request, whatever the number of replicas."""
    for replicas in range(1, 9):
        controller = Controller(replicas, policy("round_robin"))
        counts = Counter(controller.submit(request(f"r{number}", [1])) for number in range(100))
        assert len(counts) == replicas and max(counts.values()) - min(counts.values()) <= 1
