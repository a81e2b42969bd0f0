"""Whom each message concerns, joined answers, and replicas that come and go (pitfalls 47, 53; menu X31)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.messages import (
    AbortRequest,
    BatchGenerateRequest,
    ControlOutput,
    FlushCache,
    GenerateRequest,
    GetInternalState,
    Message,
    SetInternalState,
)
from testbed.routing.controller import Controller
from testbed.routing.policies import RoundRobin, ShortestQueue
from testbed.scenario.errors import InputError
from tests.routing.naive import request


def router(replicas: int = 3) -> Controller:
    return Controller(replicas, RoundRobin())


def served_once(replicas: int, sizes: list[int]) -> None:
    """Every request of every batch reaches one replica, once, in the batch's order."""
    controller, number = router(replicas), 0
    for size in sizes:
        batch = [request(f"r{number + place}", [1, place]) for place in range(size)]
        number += size
        parts = controller.route(BatchGenerateRequest(tuple(batch)))
        received: list[GenerateRequest] = []
        for _, part in parts:
            assert isinstance(part, BatchGenerateRequest)
            places = [batch.index(each) for each in part.requests]
            assert places == sorted(places)
            received += part.requests
        assert Counter(each.rid for each in received) == Counter(each.rid for each in batch)
        assert len(dict(parts)) == len(parts) == min(size, replicas), "one message for each replica that has a part"
        for index, part in parts:
            assert isinstance(part, BatchGenerateRequest)
            assert set(part.requests) <= set(controller.open_at(index))


def test_a_batch_is_split() -> None:
    served_once(1, [4])
    served_once(3, [1, 7, 2])
    served_once(8, [3, 3, 20])


def test_a_batch_that_is_broadcast_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant, pitfall 53: the controller knows single requests only, and sends everything else to everybody."""
    route = Controller.route

    def broadcast(self: Controller, message: Message) -> list[tuple[int, Message]]:
        if isinstance(message, BatchGenerateRequest):
            return [(index, message) for index in self._replicas]
        return route(self, message)

    monkeypatch.setattr(Controller, "route", broadcast)
    with pytest.raises(AssertionError):
        served_once(3, [4])


def test_an_abort_goes_to_who_has_the_request() -> None:
    controller = router()
    for name in ("a", "ab", "b"):
        controller.route(request(name, [1]))
    assert controller.route(AbortRequest("ab")) == [(1, AbortRequest("ab"))]
    assert controller.route(AbortRequest("abc")) == [], "nobody has it"
    assert controller.route(AbortRequest("")) == [], "an empty id is no prefix of others (pitfall 47)"
    controller.ended("ab")
    assert controller.route(AbortRequest("ab")) == [], "it has ended"
    everybody = AbortRequest(abort_all=True)
    assert controller.route(everybody) == [(0, everybody), (1, everybody), (2, everybody)]


def test_an_id_that_is_open_goes_to_its_replica() -> None:
    """There it is refused; elsewhere it would be served beside the first, and an abort could not tell them apart."""
    controller = router()
    assert [controller.submit(request(name, [1])) for name in ("a", "b", "b", "b", "c")] == [0, 1, 1, 1, 2]
    controller.ended("b")
    controller.ended("b")
    assert controller.route(AbortRequest("b")) == [(1, AbortRequest("b"))], "two refusals do not end the first"
    controller.ended("b")
    assert controller.route(AbortRequest("b")) == []
    controller.ended("b")


def test_a_request_may_name_its_replica() -> None:
    """Round robin goes on where it was (specification F.4); a replica that takes nothing more cannot be named."""
    controller = router()
    ranks = [None, 2, 2, None, 7, None]
    assert [controller.submit(request(f"r{n}", [1], rank=rank)) for n, rank in enumerate(ranks)] == [0, 2, 2, 1, 2, 0]
    controller.drain(2)
    assert controller.submit(request("later", [1], rank=2)) == 1


def test_questions_go_to_all_and_their_answers_are_joined() -> None:
    controller = router(2)
    first, second = FlushCache(), GetInternalState()
    assert controller.route(first) == [(0, first), (1, first)]
    assert controller.route(second) == [(0, second), (1, second)]
    assert controller.answered(1, ControlOutput(first, True)) is None
    assert controller.answered(1, ControlOutput(second, True, state={"running": 3})) is None
    assert controller.answered(0, ControlOutput(first, False, "busy")) == ControlOutput(first, False, "replica 0: busy")
    joined = controller.answered(0, ControlOutput(second, True, state={"running": 5}))
    assert joined == ControlOutput(second, True, state={"0.running": 5, "1.running": 3})
    assert controller.answered(0, ControlOutput(first, True)) is None, "nobody asked"


def test_a_removed_replica_owes_no_answer() -> None:
    controller, question = router(3), SetInternalState({"new_token_ratio": 0.5})
    controller.route(question)
    controller.answered(0, ControlOutput(question, True))
    assert controller.remove(2).answers == []
    assert controller.answered(2, ControlOutput(question, True)) is None
    assert controller.remove(1).answers == [ControlOutput(question, True)]


def test_the_last_replica_stays() -> None:
    controller = router(2)
    controller.drain(0)
    for replica in (1, 5):
        with pytest.raises(InputError) as refused:
            controller.drain(replica)
        assert refused.value.remedy
    with pytest.raises(InputError):
        controller.remove(1)
    assert controller.add() == 2
    controller.drain(1)
    assert controller.submit(request("r", [1])) == 2


class World:
    """Replicas that serve in any order; the caller's duties towards a controller, and an account of every request."""

    def __init__(self, replicas: int) -> None:
        self.controller = Controller(replicas, ShortestQueue(), hears_ends=True)
        self.queues: dict[int, list[str]] = {index: [] for index in range(replicas)}
        self.taking = list(self.queues)
        self.sent: list[str] = []
        self.ended: list[str] = []

    def send(self, message: Message) -> None:
        for replica, part in self.controller.route(message):
            requests = part.requests if isinstance(part, BatchGenerateRequest) else [part]
            for each in requests:
                if isinstance(each, GenerateRequest):
                    assert replica in self.taking, "sent to a replica that drains or is gone"
                    self.queues[replica].append(each.rid)
                elif isinstance(each, AbortRequest) and each.rid in self.queues[replica]:
                    self.end(replica, each.rid)

    def submit(self, count: int) -> None:
        rids = [f"r{len(self.sent) + place}" for place in range(count)]
        self.sent += rids
        requests = tuple(request(rid, [1]) for rid in rids)
        self.send(requests[0] if count == 1 else BatchGenerateRequest(requests))

    def serve(self, which: int) -> None:
        busy = [(replica, rid) for replica, queue in self.queues.items() for rid in queue]
        if busy:
            self.end(*busy[which % len(busy)])

    def abort(self, which: int) -> None:
        if self.sent:
            self.send(AbortRequest(self.sent[which % len(self.sent)]))

    def end(self, replica: int, rid: str) -> None:
        self.queues[replica].remove(rid)
        self.ended.append(rid)
        self.controller.ended(rid)

    def add(self) -> None:
        replica = self.controller.add()
        assert replica not in self.queues
        self.queues[replica] = []
        self.taking.append(replica)

    def drain(self, which: int) -> None:
        if len(self.taking) > 1:
            replica = self.taking.pop(which % len(self.taking))
            self.controller.drain(replica)

    def remove(self, which: int) -> None:
        """A crash, if it is not drained yet."""
        replica = list(self.queues)[which % len(self.queues)]
        if self.taking == [replica]:
            return
        self.taking = [other for other in self.taking if other != replica]
        lost = self.queues.pop(replica)
        again = self.controller.remove(replica).requests
        assert [each.rid for each in again] == lost
        for each in again:
            self.send(each)


STEPS = st.one_of(
    *[st.tuples(st.just(name), st.integers(0, 99)) for name in ("serve", "serve", "abort", "drain", "remove")],
    *[st.tuples(st.just("submit"), st.integers(1, 5)) for _ in range(4)],
    st.tuples(st.just("add")),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(replicas=st.integers(1, 4), steps=st.lists(STEPS, max_size=60))
def test_nothing_is_lost_while_replicas_come_and_go(replicas: int, steps: list[tuple[Any, ...]]) -> None:
    world = World(replicas)
    for name, *arguments in steps:
        getattr(world, name)(*arguments)
        for replica, queue in world.queues.items():
            assert [each.rid for each in world.controller.open_at(replica)] == queue
    while any(world.queues.values()):
        world.serve(0)
    assert sorted(world.ended) == sorted(world.sent), "each ends, once"
    assert all(replica.requests == 0 for replica in world.controller._taking)


def test_a_removal_that_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: what a removed replica had is not sent again."""
    remove = Controller.remove
    monkeypatch.setattr(Controller, "remove", lambda self, replica: remove(self, replica)._replace(requests=[]))
    with pytest.raises(AssertionError):
        test_nothing_is_lost_while_replicas_come_and_go()
