"""The pitfalls of disaggregation (specification N 37-46, menu E), each with the defect switched on and found.

A scene is a small deployment in which a defect would do harm; as the program is, it does none. Of N 40 (health probes)
there is nothing here to go wrong: a loop that waits answers whoever asks it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from testbed.loops import disaggregation
from testbed.messages import KvChunk, KvReceived, RoomClosed
from testbed.request import NEVER
from testbed.routing.pairs import PairRouter
from testbed.runtime.links import NO_FAULT, Fault, LinkSpec, ScriptedFaults
from testbed.scenario.schema import ConstantDevice
from testbed.scheduler.disaggregation import DecodeSide, Ending, Poll, PrefillSide
from testbed.scheduler.disaggregation.rooms import Rooms
from testbed.scheduler.scheduler import Scheduler
from tests.disaggregation.deployment import DESIGNS, TIMEOUT, Deployment, Setup, abort, kill, restart, run
from tests.properties.test_mutants import around
from tests.properties.world import Job, burst

Patch = pytest.MonkeyPatch
FIRST_ROOM = PairRouter(["prefill 0"], ["decode 0"], 0)._next_room
"""Of every deployment here."""
SLOW = LinkSpec(gb_per_s=0.001, latency_ns=500)
"""A token's byte takes a microsecond."""


def statuses(deployment: Deployment) -> dict[str, int]:
    return {answer.rid: answer.status for answer in deployment.answers}


def side_of(deployment: Deployment, name: str) -> Any:
    return deployment.nodes[name].scheduler.side


class FaultOf:
    """The same fault for every message of a kind."""

    def __init__(self, kind: type, fault: Fault, which: Callable[[Any], bool] = lambda message: True) -> None:
        self.kind, self.of_kind, self.which = kind, fault, which
        self.met = 0

    def fault(self, number: int, source: str, destination: str, message: object) -> Fault:
        if isinstance(message, self.kind) and self.which(message):
            self.met += 1
            return self.of_kind
        return NO_FAULT


# -- scenes -----------------------------------------------------------------------------------------------------------


def pressed(design: str, **fields: Any) -> Setup:
    """The decode side has room for two of the requests."""
    terms = {"reserved_decode_tokens": 4, **fields.pop("terms", {})}
    return Setup(prefill_loop=design, decode_loop=design, decode_tokens=64, terms=terms, **fields)


def aborts_while_arrived(design: str) -> None:
    """One seat: the second request has its KV and waits for the first one's end."""
    setup = pressed(design, engine={"max_running_requests": 1})
    deployment = Deployment(setup, burst(2, 12, 30), at=[(45_000, abort("r1"))])
    arrived: list[int] = []
    deployment.script["decode 0", 12] = [lambda now: arrived.append(len(side_of(now, "decode 0").arrived))]
    assert statuses(deployment.run().prove()) == {"r0": 200, "r1": 499}
    assert arrived == [1]


def aborts_in_every_queue(design: str) -> None:
    for when in range(1_000, 60_000, 3_000):
        run(pressed(design, link=SLOW), burst(4, 20, 9), at=[(when, abort("r0")), (when, abort("r2"))])


def aborts_without_memory(design: str) -> None:
    """Who waits for memory on the decode side ends when it is told to, not when it gets some."""
    deployment = Deployment(pressed(design), burst(3, 40, 20))
    queued: list[int] = []

    def look(now: Deployment) -> None:
        queued.append(len(side_of(now, "decode 0").prealloc))
        now.abort("r2")

    deployment.world.at(30_000, lambda: look(deployment))
    deployment.run().prove()
    assert queued[0] > 0, "nobody waits for memory"
    assert statuses(deployment) == {"r0": 200, "r1": 200, "r2": 499}, "the abort was stuck"


def fails_and_goes_on(design: str) -> None:
    """A room has failed; the next between the same engines does not."""
    jobs = [Job("r0", (("p", 9),)), Job("r1", (("q", 9),), arrival_ns=3 * TIMEOUT)]
    setup = Setup(prefill_loop=design, decode_loop=design)
    deployment = run(setup, jobs, faults=FaultOf(KvChunk, Fault(lost=True), lambda chunk: chunk.room == FIRST_ROOM))
    assert statuses(deployment) == {"r0": 504, "r1": 200}, "the engines speak no more"


def retracts_beside_arrived(design: str) -> None:
    """KV has arrived while somebody is retracted: memory comes free by those who arrived."""
    setup = pressed(design, terms={"reserved_decode_tokens": 2}, decode_engine={"max_running_requests": 2})
    jobs = [Job("r0", (("a", 8),), 50), *(Job(f"r{i}", ((f"b{i}", 20),), 12, arrival_ns=i) for i in (1, 2, 3))]
    deployment = run(setup, jobs)
    assert deployment.counter("retractions") > 0
    assert set(statuses(deployment).values()) == {200}


def unequal_pages(design: str) -> None:
    """Engines whose KV does not look the same: an answer at once, not after a lease."""
    setup = Setup(prefill_loop=design, decode_loop=design, engine={"page_size": 4}, decode_engine={"page_size": 2})
    deployment = run(setup, burst(2, 9, 3))
    assert statuses(deployment) == {"r0": 400, "r1": 400}
    assert "page size: 4 at prefill 0, 2 at decode 0" in deployment.answers[0].message


def bursts(design: str) -> None:
    """Ten times what the leases can wait for: some are refused early, everybody else is served, nobody times out."""
    terms = {"bootstrap_timeout_ns": 400_000, "transfer_timeout_ns": 400_000}
    setup = pressed(design, engine={"max_queued_requests": 4}, terms=terms)
    late = [job._replace(rid=f"late {job.rid}", arrival_ns=4_000_000) for job in burst(3, 20, 20)]
    deployment = run(setup, [*burst(40, 20, 20), *late])
    found = list(statuses(deployment).values())
    assert set(found) == {200, 503}, "a storm of time-outs"
    assert found.count(503) >= 20
    assert all(statuses(deployment)[job.rid] == 200 for job in late)


def corrupts(design: str) -> None:
    """Whatever bit of a chunk is flipped, nobody decodes it."""
    setup = Setup(prefill_loop=design, decode_loop=design, engine={"page_size": 4, "chunked_prefill_size": 8})
    fields = ("room", "index", "start", "tokens", "token_id", "cached_tokens", "stopped", "last", "checksum")
    for field in fields:
        faults = FaultOf(KvChunk, Fault(corrupt=field), lambda chunk: chunk.room % 2 == 0)
        deployment = run(setup, burst(4, 19, 5), faults=faults)
        assert deployment.counter("refused_corrupt") == faults.met > 0, "a corrupt chunk was taken"
        assert sorted(statuses(deployment).values()) == [200, 200, 504, 504]


def stops_at_the_first_token(design: str) -> None:
    jobs = [
        Job("eos", (("p", 9),), 1, max_new_tokens=7),
        Job("limit", (("q", 9),), 1),
        Job("none", (("s", 9),), 5, max_new_tokens=0),
        Job("goes on", (("r", 9),), 5, max_new_tokens=7),
    ]
    deployment = Deployment(Setup(prefill_loop=design, decode_loop=design), jobs).run()
    reasons = {answer.rid: (answer.finish_reason, len(answer.output_ids)) for answer in deployment.answers}
    expected = {"eos": ("stop", 1), "limit": ("length", 1), "none": ("length", 0), "goes on": ("stop", 5)}
    assert reasons == expected


def aborts_amid_transfers(design: str) -> None:
    """At each fraction of a transfer that is slow; the next owner of the pages reads its own KV (menu E1)."""
    setup = pressed(design, engine={"chunked_prefill_size": 8})
    for when in range(8_000, 40_000, 2_000):
        faults = FaultOf(KvChunk, Fault(delay_ns=60_000), lambda chunk: chunk.room == FIRST_ROOM)
        deployment = run(setup, burst(5, 24, 8), at=[(when, abort("r0"))], faults=faults)
        assert faults.met and sorted(statuses(deployment).values()) == [200, 200, 200, 200, 499]


def aborts_a_sender_alone(design: str) -> None:
    """The abort reaches the prefill engine only, and its word to the other is lost: what is on its way is whole."""
    jobs = [Job("r0", (("a", 40),), 6), *(Job(f"r{i}", ((f"b{i}", 40),), 6, arrival_ns=60_000 * i) for i in (1, 2))]
    setup = Setup(prefill_loop=design, decode_loop=design, prefill_tokens=96, link=LinkSpec(0.0002, 500))
    faults = FaultOf(RoomClosed, Fault(lost=True))
    halves = {("r0", "decode 0")}

    def only_the_first_half(deployment: Deployment) -> None:
        deployment.loses = lambda rid, name: (rid, name) in halves
        deployment.abort("r0")

    patient = replace(setup, terms={"transfer_timeout_ns": 10**9})
    deployment = run(patient, jobs, faults=faults, at=[(30_000, only_the_first_half)])
    assert statuses(deployment) == {"r0": 200, "r1": 200, "r2": 200}


def grows_beside_what_is_aside(design: str) -> None:
    """Pages of an aborted transfer are kept until its lease ends: the last one that decodes waits for them."""
    setup = pressed(design, link=LinkSpec(0.0005, 500))
    jobs = [Job("r0", (("a", 10),), 40), Job("r1", (("b", 30),))]
    deployment = run(setup, jobs, at=[(70_000, abort("r1"))], faults=FaultOf(RoomClosed, Fault(lost=True)))
    assert statuses(deployment) == {"r0": 200, "r1": 499}
    assert deployment.counter("retractions") == 1


def reserves_behind_a_step(design: str) -> None:
    """Pages of a request that has ended are given to a transfer which is faster than the step in flight."""
    slow = ConstantDevice(decode_ns=400_000)
    setup = pressed(design, decode_device=slow, link=LinkSpec(gb_per_s=100.0))
    deployment = run(setup, [job._replace(arrival_ns=100 * i) for i, job in enumerate(burst(8, 20, 6))])
    assert set(statuses(deployment).values()) == {200}


def comes_in_any_order(design: str) -> None:
    """The first chunk comes long after the last."""
    setup = Setup(prefill_loop=design, decode_loop=design, engine={"chunked_prefill_size": 8})
    faults = FaultOf(KvChunk, Fault(delay_ns=200_000), lambda chunk: chunk.index == 0)
    assert set(statuses(run(setup, burst(3, 20, 5), faults=faults)).values()) == {200}


def two_stages(design: str) -> None:
    """The second stage's part is always late."""
    setup = Setup(stages=2, decode_loop=design)
    faults = FaultOf(KvChunk, Fault(delay_ns=60_000), lambda chunk: chunk.stage == 1)
    assert set(statuses(run(setup, burst(3, 20, 5), faults=faults)).values()) == {200}


def chunks_under_way(design: str) -> None:
    fast = LinkSpec(gb_per_s=100.0)
    run(Setup(prefill_loop=design, decode_loop=design, engine={"chunked_prefill_size": 8}, link=fast), burst(3, 40, 5))


def retracts(design: str) -> None:
    deployment = run(pressed(design), burst(4, 12, 30))
    assert deployment.counter("retractions") > 0
    assert set(statuses(deployment).values()) == {200}


def loses_each_message(design: str) -> None:
    setup = pressed(design, engine={"chunked_prefill_size": 8})
    sent = run(setup, burst(2, 20, 5)).links.sent
    for number in range(sent):
        run(setup, burst(2, 20, 5), faults=ScriptedFaults({number: Fault(lost=True)}))


def loses_acknowledgements(design: str) -> None:
    """The decode side has everything; the prefill side never hears so."""
    setup = Setup(prefill_loop=design, decode_loop=design)
    deployment = run(setup, burst(3, 20, 30), faults=FaultOf(KvReceived, Fault(lost=True)))
    assert set(statuses(deployment).values()) == {200}
    assert deployment.counter("rooms_failed") == 3


def dies_and_returns(design: str) -> None:
    """A prefill engine's next life is heard of: what its last one had promised fails then, not at the lease's end."""
    setup = Setup(prefill_loop=design, decode_loop=design, link=SLOW)
    later = Job("later", (("l", 9),), arrival_ns=60_000)
    at = [(20_000, kill("prefill 0")), (50_000, restart("prefill 0"))]
    deployment = run(setup, [*burst(3, 30, 5), later], at=at)
    assert statuses(deployment)["later"] == 200
    assert 502 in statuses(deployment).values(), "nobody heard that it has restarted"


# -- defects ----------------------------------------------------------------------------------------------------------


def keeps_the_kv_of_aborted_arrivals(patch: Patch) -> None:
    def give_up(original: Any, self: DecodeSide, request: Any, ending: Ending, *sent: Any) -> None:
        if any(arrived.request is request for arrived in self.arrived):
            self._scheduler._release = lambda request: None  # type: ignore[method-assign]
        original(self, request, ending, *sent)
        self._scheduler.__dict__.pop("_release", None)

    around(patch, DecodeSide, "give_up", give_up)


def keeps_metadata_slots_of_the_aborted(patch: Patch) -> None:
    def end(original: Any, self: PrefillSide, sender: Any, ending: Ending) -> None:
        free = list(self.metadata_slots)
        original(self, sender, ending)
        if ending.status == 499:
            self.metadata_slots[:] = free

    around(patch, PrefillSide, "_end", end)


def aborts_wait_for_memory(patch: Patch) -> None:
    def give_up(original: Any, self: DecodeSide, request: Any, ending: Ending, *sent: Any) -> None:
        if request.room not in self.prealloc:
            original(self, request, ending, *sent)

    around(patch, DecodeSide, "give_up", give_up)
    around(patch, PrefillSide, "give_up", lambda original, self, request, ending: None)


def a_failed_peer_stays_failed(patch: Patch) -> None:
    def hand_over(original: Any, self: Rooms, message: Any, *rest: Any) -> None:
        if not self._scheduler.recorder.counters.get("rooms_failed"):
            original(self, message, *rest)

    around(patch, Rooms, "hand_over", hand_over)


def the_retracted_stop_the_arrived(patch: Patch) -> None:
    def prebuilt(original: Any, self: DecodeSide) -> Any:
        back = [arrived for arrived in self.arrived if arrived.request.sampled]
        if not self.retracted:
            return original(self)
        others = [arrived for arrived in self.arrived if not arrived.request.sampled]
        self.arrived = back
        taken = original(self)
        self.arrived += others
        return taken

    around(patch, DecodeSide, "get_new_prebuilt_batch", prebuilt)


def shakes_any_hand(patch: Patch) -> None:
    def shake(original: Any, self: DecodeSide, receiver: Any, ask: Any) -> None:
        receiver.peer_epoch, receiver.state = ask.epoch, Poll.WAITING_FOR_INPUT

    around(patch, DecodeSide, "_shake_hands", shake)


def the_queues_have_no_end(patch: Patch) -> None:
    patch.setattr(PrefillSide, "queued", property(lambda self: 0))
    patch.setattr(DecodeSide, "queued", property(lambda self: 0))


def takes_what_is_corrupt(patch: Patch) -> None:
    patch.setattr("testbed.scheduler.disaggregation.decode.chunk_checksum", lambda chunk: chunk.checksum)


def forgets_the_first_end(patch: Patch) -> None:
    def prebuilt(original: Any, self: DecodeSide, taken: Any) -> Any:
        return original(self, [arrived._replace(stopped=False) for arrived in taken])

    around(patch, DecodeSide, "process_prebuilt", prebuilt)


def frees_the_destination_at_once(patch: Patch) -> None:
    def set_aside(original: Any, self: DecodeSide, receiver: Any, sent: Any) -> None:
        original(self, receiver, sent)
        if receiver.room in self.aside:
            self._scheduler.memory.allocator.take_back(receiver.room)
            self._scheduler.memory.allocator._aside[receiver.room] = np.empty(0, np.int32)

    around(patch, DecodeSide, "_set_aside", set_aside)


def forgets_what_is_aside(patch: Patch) -> None:
    patch.setattr(DecodeSide, "holds_memory", property(lambda self: bool(self.transfer or self.arrived)))


def frees_the_source_at_once(patch: Patch) -> None:
    def give_up(original: Any, self: PrefillSide, request: Any, ending: Ending) -> None:
        original(self, request, ending)
        sender = self.senders.get(request.room)
        if sender is not None:
            self._end(sender, ending)

    around(patch, PrefillSide, "give_up", give_up)


def offers_pages_of_a_step_in_flight(patch: Patch) -> None:
    def tell(original: Any, self: Rooms, *args: Any, fence: int = NEVER, **fields: Any) -> None:
        original(self, *args, **fields)

    around(patch, Rooms, "tell", tell)


def decodes_when_the_last_has_come(patch: Patch) -> None:
    def look(original: Any, self: DecodeSide, receiver: Any) -> None:
        for count in receiver.chunks_in_all.values():
            receiver.chunks = {(0, index): 0 for index in range(count)}
            receiver.chunks[0, 0] = receiver.request.prompt_tokens
        original(self, receiver)

    around(patch, DecodeSide, "_look_whether_whole", look)


def one_stage_is_enough(patch: Patch) -> None:
    def shake(original: Any, self: DecodeSide, receiver: Any, ask: Any) -> None:
        original(self, receiver, ask)
        receiver.stages = 1

    around(patch, DecodeSide, "_shake_hands", shake)


def sends_what_is_not_computed(patch: Patch) -> None:
    """The end of what is allocated, not of the chunk whose result has come (SGLang's ``tmp_end_idx``)."""

    def send(original: Any, self: PrefillSide, sender: Any, end: int, last: bool, *rest: Any) -> None:
        allocated = min(sender.request.kv_tokens, sender.request.prompt_tokens - 1)
        original(self, sender, end if last else allocated, last, *rest)

    around(patch, PrefillSide, "_send", send)


def forgets_the_last_token(patch: Patch) -> None:
    def save(original: Any, self: DecodeSide, request: Any, outputs: Any) -> None:
        original(self, request, outputs)
        self.retracted = [(other, 1 if other is request else token) for other, token in self.retracted]

    around(patch, DecodeSide, "save", save)


def the_retracted_come_back_without_their_kv(patch: Patch) -> None:
    def save(original: Any, self: DecodeSide, request: Any, outputs: Any) -> None:
        original(self, request, outputs)
        request.sampled = False

    around(patch, DecodeSide, "save", save)


def leases_never_end(patch: Patch) -> None:
    patch.setattr(Rooms, "expired", lambda self: [])


def a_new_life_is_not_noticed(patch: Patch) -> None:
    patch.setattr(DecodeSide, "_restarted", lambda self, engine, epoch: None)


def the_timer_is_forgotten(patch: Patch) -> None:
    def lease(original: Any, self: Rooms, room: int, duration_ns: int) -> None:
        original(self, room, duration_ns)
        self._scheduler.wakes.clear()

    around(patch, Rooms, "lease", lease)


def keeps_what_is_sent(patch: Patch) -> None:
    """The source of a prompt is never given back."""

    def end(original: Any, self: Scheduler, request: Any, ending: Ending) -> None:
        if self.prefill_side is not None and ending.status == 200:
            self._release = lambda request: None  # type: ignore[method-assign]
        original(self, request, ending)
        self.__dict__.pop("_release", None)

    around(patch, Scheduler, "end", end)


def nothing_is_told(patch: Patch) -> None:
    """Held messages are forgotten instead of sent when their fence has passed."""

    def tell(loop: Any) -> None:
        told(loop)
        loop.scheduler.side.rooms.outgoing.clear()

    told = disaggregation.tell_peers
    for place in ("testbed.loops.prefill", "testbed.loops.decode", "testbed.loops.disaggregation"):
        patch.setattr(f"{place}.tell_peers", tell)


class Pitfall(NamedTuple):
    name: str
    scene: Callable[[str], None]
    defect: Callable[[Patch], None]
    found_as: str
    designs: tuple[str, ...] = DESIGNS
    """Of the loop: where the defect does harm."""


PITFALLS = [
    Pitfall("N 37", aborts_while_arrived, keeps_the_kv_of_aborted_arrivals, "not partitioned"),
    Pitfall("N 38", aborts_in_every_queue, keeps_metadata_slots_of_the_aborted, "a metadata slot is lost"),
    Pitfall("N 39", aborts_without_memory, aborts_wait_for_memory, "the abort was stuck"),
    Pitfall("N 41", fails_and_goes_on, a_failed_peer_stays_failed, "the engines speak no more"),
    Pitfall("N 42", retracts_beside_arrived, the_retracted_stop_the_arrived, "a loop goes on for ever"),
    Pitfall("N 43", unequal_pages, shakes_any_hand, "504"),
    Pitfall("N 44", bursts, the_queues_have_no_end, "a storm of time-outs"),
    Pitfall("N 45", corrupts, takes_what_is_corrupt, "a corrupt chunk was taken"),
    Pitfall("N 46", stops_at_the_first_token, forgets_the_first_end, "('length', 7)"),
    Pitfall("E 1", aborts_amid_transfers, frees_the_destination_at_once, "is not its own"),
    Pitfall("E 1, pressure", grows_beside_what_is_aside, forgets_what_is_aside, "500"),
    Pitfall("E 1, source", aborts_a_sender_alone, frees_the_source_at_once, "is not its own"),
    Pitfall("E 2", loses_acknowledgements, leases_never_end, "not drained"),
    Pitfall("E 5", loses_each_message, leases_never_end, "Deadlock"),
    Pitfall("E 5, asleep", loses_each_message, the_timer_is_forgotten, "Deadlock"),
    Pitfall("E 9", dies_and_returns, a_new_life_is_not_noticed, "nobody heard"),
    Pitfall("fence", reserves_behind_a_step, offers_pages_of_a_step_in_flight, "is not its own", ("overlap",)),
    Pitfall("fence, forgotten", reserves_behind_a_step, nothing_is_told, "504", ("overlap",)),
    Pitfall("X 5", comes_in_any_order, decodes_when_the_last_has_come, "is not its own"),
    Pitfall("A 6", two_stages, one_stage_is_enough, "is not its own"),
    Pitfall("end index", chunks_under_way, sends_what_is_not_computed, "is not its own", ("overlap",)),
    Pitfall("host, token", retracts, forgets_the_last_token, "foreign tokens"),
    Pitfall("host, KV", retracts, the_retracted_come_back_without_their_kv, "is not its own"),
    Pitfall("source kept", chunks_under_way, keeps_what_is_sent, "a slot is free and held"),
]
CASES = [pytest.param(p, design, id=f"{p.name}, {design}") for p in PITFALLS for design in p.designs]


@pytest.mark.parametrize(("pitfall", "design"), CASES)
def test_the_defect_is_found(pitfall: Pitfall, design: str, monkeypatch: Patch) -> None:
    pitfall.defect(monkeypatch)
    with pytest.raises(Exception) as caught:
        pitfall.scene(design)
    assert pitfall.found_as in f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("scene", {p.scene: None for p in PITFALLS}, ids=lambda scene: scene.__name__)
@pytest.mark.parametrize("design", DESIGNS)
def test_there_is_no_defect(scene: Callable[[str], None], design: str) -> None:
    scene(design)
