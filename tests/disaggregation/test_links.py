"""The links: what they cost against closed forms and a naive fluid model, and the faults on them."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.messages import KvChunk, Message, Timer
from testbed.request import NO_PAGES
from testbed.runtime.links import CORRUPTIBLE, DrawnFaults, Fault, Faults, Links, LinkSpec, Port, ScriptedFaults
from testbed.runtime.world import World

KB = 1000
Sent = tuple[int, str, str, int]
"""(when it leaves, source, destination, bytes)"""


class Wire:
    """Links between engines that only note what comes, and when."""

    def __init__(self, spec: LinkSpec, faults: Faults | None = None, engines: str = "abcd") -> None:
        self.world = World()
        self.links = Links(self.world, spec, faults)
        self.came: list[tuple[int, str, Message]] = []
        for engine in engines:
            self.links.connect(engine, lambda message, engine=engine: self._note(engine, message))  # type: ignore[misc]

    def _note(self, engine: str, message: Message) -> None:
        self.came.append((int(self.world.env.now), engine, message))

    def carry(self, sent: list[Sent]) -> dict[int, int]:
        """When each came, by its place in ``sent``."""
        for place, (when, source, destination, size) in enumerate(sent):
            self.links.send(source, destination, Timer(str(place)), size, when)
        self.world.run()
        return {int(message.name): when for when, _, message in self.came if isinstance(message, Timer)}


def test_a_message_takes_the_latency_and_a_transfer_its_bytes_too() -> None:
    wire = Wire(LinkSpec(gb_per_s=2.0, latency_ns=300))
    assert wire.carry([(7, "a", "b", 0), (7, "a", "b", 1000)]) == {0: 307, 1: 807}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equal_transfers_share_and_end_together(count: int) -> None:
    """n transfers through one adapter take n times as long as one, all of them."""
    out = Wire(LinkSpec(gb_per_s=1.0)).carry([(0, "a", "bcd"[i % 3], 42 * KB) for i in range(count)])
    into = Wire(LinkSpec(gb_per_s=1.0)).carry([(0, "bcd"[i % 3], "a", 42 * KB) for i in range(count)])
    for times in (out, into):
        assert all(count * 42 * KB <= when <= count * 42 * KB + 1 for when in times.values())


def test_a_shared_link_is_shared_by_all() -> None:
    alone = LinkSpec(gb_per_s=1.0)
    assert Wire(alone).carry([(0, "a", "b", KB), (0, "c", "d", KB)]) == {0: KB, 1: KB}
    shared = LinkSpec(gb_per_s=1.0, shared_gb_per_s=1.0)
    assert Wire(shared).carry([(0, "a", "b", KB), (0, "c", "d", KB)]) == {0: 2 * KB, 1: 2 * KB}


def test_what_one_cannot_use_another_gets() -> None:
    """Three leave a: two into b, one into c, where another comes from d: a third each from a, the rest for d."""
    sent = [(0, "a", "b", KB), (0, "a", "b", KB), (0, "a", "c", KB), (0, "d", "c", 2 * KB)]
    times = Wire(LinkSpec(gb_per_s=1.0)).carry(sent)
    assert all(3 * KB <= when <= 3 * KB + 1 for when in times.values())


def naive(sent: list[Sent], gb_per_s: Fraction, shared: Fraction | None) -> dict[int, Fraction]:
    """The fluid model, exactly: between two events, raise all rates together until a link is full."""
    left = {place: Fraction(size) for place, (_, _, _, size) in enumerate(sent)}
    ends: dict[int, Fraction] = {}
    now = Fraction(0)
    while len(ends) < len(sent):
        active = [i for i in left if i not in ends and sent[i][0] <= now]
        rates = dict.fromkeys(active, Fraction(0))
        growing = list(active)
        links: dict[Any, list[int]] = {}
        for i in active:
            for link in [("out", sent[i][1]), ("in", sent[i][2]), *([("shared",)] if shared else [])]:
                links.setdefault(link, []).append(i)
        while growing:
            limits = {link: shared if link == ("shared",) else gb_per_s for link in links}
            free = {link: limits[link] - sum(rates[i] for i in users) for link, users in links.items()}
            rising = {link: sum(i in growing for i in users) for link, users in links.items()}
            step = min(free[link] / count for link, count in rising.items() if count)
            for i in growing:
                rates[i] += step
            full = [link for link, count in rising.items() if free[link] == step * count]
            growing = [i for i in growing if not any(i in links[link] for link in full)]
        starts = [Fraction(when) for when, *_ in sent if when > now]
        finishes = [now + left[i] / rates[i] for i in active]
        then = min([*starts, *finishes])
        for i in active:
            left[i] -= rates[i] * (then - now)
            if left[i] == 0:
                ends[i] = then
        now = then
    return ends


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(0, 3000), st.sampled_from("ab"), st.sampled_from("cd"), st.integers(1, 5000)),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([Fraction(1), Fraction(4), Fraction(1, 2)]),
    st.sampled_from([None, Fraction(1), Fraction(3)]),
)
def test_sharing_is_that_of_the_fluid_model(sent: list[Sent], gb_per_s: Fraction, shared: Fraction | None) -> None:
    """To a nanosecond for each start and end on the way (whoever ends, ends at a whole one)."""
    spec = LinkSpec(float(gb_per_s), shared_gb_per_s=None if shared is None else float(shared))
    times = Wire(spec).carry(sent)
    for place, exact in naive(sent, gb_per_s, shared).items():
        assert abs(times[place] - exact) <= 2 * len(sent), (place, times[place], float(exact))


# -- faults -----------------------------------------------------------------------------------------------------------


def test_scripted_faults_happen_to_their_messages() -> None:
    faults = {1: Fault(lost=True), 2: Fault(copies=2, delay_ns=50), 3: Fault(delay_ns=70)}
    wire = Wire(LinkSpec(gb_per_s=1.0, latency_ns=10), ScriptedFaults(faults))
    wire.carry([(0, "a", "b", 0)] * 5)
    came = sorted((when, message.name) for when, _, message in wire.came if isinstance(message, Timer))
    assert came == [(10, "0"), (10, "2"), (10, "4"), (60, "2"), (80, "3")]
    assert wire.links.counts == {"lost": 1, "duplicated": 1, "corrupted": 0, "delayed": 2, "cut": 0, "dead": 0}


def test_drawn_faults_come_as_often_as_said_and_are_the_same_again() -> None:
    def drawn() -> list[Fault]:
        faults = DrawnFaults(3, loss=0.1, duplicate=0.2, corrupt=0.3, jitter_ns=100)
        return [faults.fault(i, "a", "b", Timer("")) for i in range(4000)]

    found = drawn()
    assert found == drawn()
    assert 320 < sum(fault.lost for fault in found) < 480
    assert 700 < sum(fault.copies == 2 for fault in found) < 900
    assert 1080 < sum(bool(fault.corrupt) for fault in found) < 1320
    assert set(Counter(fault.corrupt for fault in found if fault.corrupt)) == set(CORRUPTIBLE)
    assert min(fault.delay_ns for fault in found) == 0 and max(fault.delay_ns for fault in found) == 100


@pytest.mark.parametrize("field", CORRUPTIBLE)
def test_corruption_flips_one_bit_of_one_field(field: str) -> None:
    chunk = KvChunk(8, "a", 1, 1, index=2, start=4, tokens=6, source_pages=NO_PAGES, pages=NO_PAGES, token_id=10)
    wire = Wire(LinkSpec(gb_per_s=1.0), ScriptedFaults({0: Fault(corrupt=field)}))
    wire.links.send("a", "b", chunk, 100, 0)
    wire.world.run()
    came = wire.came[0][2]
    different = [name for name in KvChunk.__struct_fields__ if getattr(came, name) is not getattr(chunk, name)]
    assert different == [field] and getattr(came, field) == getattr(chunk, field) ^ 1


def test_a_partition_has_a_direction_and_an_end() -> None:
    wire = Wire(LinkSpec(gb_per_s=1.0, latency_ns=10))
    wire.links.cut("a", "b")
    wire.world.at(100, lambda: wire.links.heal("a", "b"))
    assert wire.carry([(0, "a", "b", 0), (0, "b", "a", 0), (95, "a", "b", 0)]) == {1: 10, 2: 105}
    assert wire.links.counts["cut"] == 1


def test_the_dead_neither_hear_nor_go_on_sending() -> None:
    """Transfers end where they are, and leave their share to others; what has left arrives; the next life hears."""
    wire = Wire(LinkSpec(gb_per_s=1.0, latency_ns=10))
    wire.world.at(500, lambda: wire.links.kill("a"))
    wire.world.at(2000, lambda: wire.links.connect("a", lambda message: wire._note("a again", message)))
    sent = [
        (0, "a", "c", KB),
        (0, "b", "c", KB),
        (495, "a", "d", 0),
        (495, "d", "a", 0),
        (600, "a", "c", 0),
        (1995, "d", "a", 0),
    ]
    times = wire.carry(sent)
    assert times == {1: 250 + 1000 + 10, 2: 505, 5: 2005}
    assert wire.came[-1][1] == "a again"
    assert wire.links.counts["dead"] == 3


def test_a_port_sends_in_its_loops_own_time() -> None:
    wire = Wire(LinkSpec(gb_per_s=1.0, latency_ns=10))
    port = Port(wire.links, "a", lambda: 77)
    port.send("b", Timer("first"))
    port.transfer("b", Timer("second"), 50)
    wire.world.run()
    assert [(when, message) for when, _, message in wire.came] == [(87, Timer("first")), (137, Timer("second"))]
