"""Rows X5 to X11 of the fault menu, in every pair of loops: no page is lost or reused early (watched at every step),
every request ends once, survivors have the tokens of the run without faults, and everything is back within the leases.

Each cell counts that its fault has happened, and in which states of the requests: one that met nothing fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest

from testbed.messages import KvChunk
from testbed.runtime.links import NO_FAULT, DrawnFaults, Fault, LinkSpec, ScriptedFaults
from testbed.scheduler.disaggregation import DecodeSide, Poll, PrefillSide
from tests.disaggregation.deployment import DESIGNS, TIMEOUT, Action, Deployment, Setup, kill, restart, run
from tests.properties.world import Job

JOBS = [
    Job("r0", (("a", 20), ("x", 9)), 12),
    Job("r1", (("a", 20), ("y", 4)), 9, max_new_tokens=20),
    Job("r2", (("z", 33),), 1, arrival_ns=5_000),
    Job("r3", (("a", 20), ("w", 7)), 14, arrival_ns=20_000),
    Job("r4", (("q", 5),), 10, arrival_ns=30_000),
]
LATER = [job._replace(rid=f"{job.rid} later", arrival_ns=job.arrival_ns + 6 * TIMEOUT) for job in JOBS[:3]]
"""When all leases are over and everybody is back: these must be served."""
END_NS = 150_000
"""Beyond which a run without faults has nothing left to do."""
PAIRS = [(prefill, decode) for prefill in (*DESIGNS, "pipeline") for decode in DESIGNS]
"""Of loops; the pipeline has two stages."""
cell = pytest.mark.parametrize(("prefill", "decode"), PAIRS)


def setup_of(prefill: str, decode: str) -> Setup:
    return Setup(
        stages=2 if prefill == "pipeline" else 1,
        prefill_loop=prefill,
        decode_loop=decode,
        prefill_tokens=128,
        decode_tokens=96,
        engine={"page_size": 4, "chunked_prefill_size": 16, "max_running_requests": 4},
        link=LinkSpec(gb_per_s=0.005, latency_ns=500),
    )


@cache
def twin(prefill: str, decode: str) -> Deployment:
    """The run without faults."""
    deployment = run(setup_of(prefill, decode), [*JOBS, *LATER])
    assert all(answer.status == 200 for answer in deployment.answers)
    return deployment


class Listening:
    """No faults; notes what is sent."""

    def __init__(self) -> None:
        self.kinds: list[type] = []

    def fault(self, number: int, source: str, destination: str, message: object) -> Fault:
        self.kinds.append(type(message))
        return NO_FAULT


@cache
def kinds(prefill: str, decode: str) -> list[type]:
    """Of the messages about the first requests, without faults."""
    listening = Listening()
    run(setup_of(prefill, decode), JOBS, faults=listening)
    return listening.kinds


def faulted(prefill: str, decode: str, jobs: Sequence[Job] = (*JOBS, *LATER), **how: Any) -> Deployment:
    deployment = run(setup_of(prefill, decode), jobs, **how)
    without = twin(prefill, decode).streams()
    assert all(stream == without[rid] for rid, stream in deployment.streams().items())
    later = [answer for answer in deployment.answers if answer.rid.endswith("later")]
    assert all(answer.status == 200 for answer in later), "the fault is over, and somebody is still not served"
    assert deployment.world.env.now < END_NS + 12 * TIMEOUT, "it takes longer than the leases"
    return deployment


def failed(deployment: Deployment) -> int:
    return sum(answer.status != 200 for answer in deployment.answers)


@cell
def test_x5_slow_and_reordered_messages(prefill: str, decode: str) -> None:
    """Decoding starts when all is there, whatever comes first."""
    delayed = 0
    for number in range(len(kinds(prefill, decode))):
        faults = ScriptedFaults({number: Fault(delay_ns=40_000)})
        deployment = faulted(prefill, decode, JOBS, faults=faults)
        assert failed(deployment) == 0
        delayed += deployment.links.counts["delayed"]
    for seed in range(5):
        deployment = faulted(prefill, decode, faults=DrawnFaults(seed, jitter_ns=50_000))
        assert failed(deployment) == 0
        delayed += deployment.links.counts["delayed"]
    assert delayed > 100


@cell
def test_x6_lost_and_doubled_messages(prefill: str, decode: str) -> None:
    """Each message once: a lost one costs its own request at most, a second one nothing."""
    met: Counter[str] = Counter()
    for number in range(len(kinds(prefill, decode))):
        deployment = faulted(prefill, decode, faults=ScriptedFaults({number: Fault(lost=True)}))
        assert failed(deployment) <= 1
        met["lost"] += deployment.links.counts["lost"]
        met["failed"] += failed(deployment)
        for late_ns in (0, TIMEOUT // 2):  # of the first copy, so that the second comes before it
            doubled = ScriptedFaults({number: Fault(copies=2, delay_ns=late_ns)})
            deployment = faulted(prefill, decode, JOBS, faults=doubled)
            assert failed(deployment) == 0
            met["doubled"] += deployment.links.counts["duplicated"]
            met["refused"] += deployment.counter("refused_duplicate") + deployment.counter("refused_late")
    for seed in range(8):
        deployment = faulted(prefill, decode, JOBS, faults=DrawnFaults(seed, loss=0.1, duplicate=0.3, jitter_ns=5_000))
        met["lost"] += deployment.links.counts["lost"]
    assert met["lost"] > 20 and met["doubled"] > 40 and met["refused"] > 20 and met["failed"] > 10


@cell
def test_x7_corrupt_transfers(prefill: str, decode: str) -> None:
    """Whatever is flipped: it is found, and nobody decodes it."""
    met = 0
    for field in ("room", "index", "stage", "tokens", "token_id", "checksum"):
        for number, kind in enumerate(kinds(prefill, decode)):
            if kind is KvChunk:
                deployment = faulted(prefill, decode, JOBS, faults=ScriptedFaults({number: Fault(corrupt=field)}))
                assert deployment.links.counts["corrupted"] == 1
                assert deployment.counter("refused_corrupt") == failed(deployment) == 1
                met += 1
    assert met >= 6 * len(JOBS)


MOMENTS = range(500, END_NS, 12_000)


def states(deployment: Deployment) -> Iterator[str]:
    """Where the requests are, on either side."""
    for node in deployment.nodes.values():
        side = node.scheduler.side
        if isinstance(side, PrefillSide):
            for sender in side.senders.values():
                yield f"prefill {sender.state.name}" + (" computed" if sender.computed_ns >= 0 else "")
        elif isinstance(side, DecodeSide):
            yield from ("decode prealloc" for _ in side.prealloc)
            yield from (f"decode {receiver.state.name}" for receiver in side.transfer.values())
            yield from ("decode arrived" for _ in side.arrived)
            yield from ("decode running" for _ in node.scheduler.running.requests)


def at_every_moment(prefill: str, decode: str, begin: Action, end: Action | None, end_after_ns: int) -> Counter[str]:
    """Runs in which something begins at one moment each; in which states it met the requests."""
    met: Counter[str] = Counter()
    for moment in MOMENTS:

        def beginning(deployment: Deployment) -> None:
            met.update(states(deployment))
            begin(deployment)

        at = [(moment, beginning)] + ([(moment + end_after_ns, end)] if end else [])
        deployment = faulted(prefill, decode, at=at)
        met["dead"] += deployment.links.counts["dead"]
        met["cut"] += deployment.links.counts["cut"]
        met["failed"] += failed(deployment)
        met["old epoch"] += deployment.counter("refused_old_epoch")
    return met


IN_ALL_STATES = [
    *("prefill BOOTSTRAPPING", "prefill WAITING_FOR_INPUT", "prefill TRANSFERRING", "prefill TRANSFERRING computed"),
    *("decode prealloc", "decode WAITING_FOR_INPUT", "decode TRANSFERRING", "decode running"),
]


@cell
@pytest.mark.parametrize("return_after_ns", [1, 4 * TIMEOUT])
def test_x8_a_prefill_engine_dies(prefill: str, decode: str, return_after_ns: int) -> None:
    """Before, during and after transfers, and before acknowledgements; it returns with a higher epoch."""
    met = at_every_moment(prefill, decode, kill("prefill 0"), restart("prefill 0"), return_after_ns)
    assert all(met[state] for state in IN_ALL_STATES), met
    assert met["dead"] and met["failed"]


@cell
@pytest.mark.parametrize("return_after_ns", [1, 4 * TIMEOUT])
def test_x9_a_decode_engine_dies(prefill: str, decode: str, return_after_ns: int) -> None:
    """At the same points; clients hear of it at once."""
    met = at_every_moment(prefill, decode, kill("decode 0"), restart("decode 0"), return_after_ns)
    assert all(met[state] for state in IN_ALL_STATES), met
    assert met["dead"] and met["failed"]
    if return_after_ns < TIMEOUT:
        assert met["old epoch"], "nothing of the engine's last life was refused"


@cell
def test_x10_the_router_loses_a_half(prefill: str, decode: str) -> None:
    """Of each request, either half."""
    for job in JOBS:
        for name in ("prefill 0", "decode 0"):
            deployment = faulted(prefill, decode, loses=lambda rid, engine, lost=(job.rid, name): (rid, engine) == lost)
            assert [answer.rid for answer in deployment.answers if answer.status == 504] == [job.rid]
            assert failed(deployment) == 1


def cutting(ways: Sequence[tuple[str, str]]) -> tuple[Action, Action]:
    def cut(deployment: Deployment) -> None:
        for way in ways:
            deployment.links.cut(*way)

    def heal(deployment: Deployment) -> None:
        for way in ways:
            deployment.links.heal(*way)

    return cut, heal


THERE, BACK = ("prefill 0", "decode 0"), ("decode 0", "prefill 0")


@cell
@pytest.mark.parametrize("ways", [[THERE], [BACK], [THERE, BACK]], ids=["there", "back", "both"])
@pytest.mark.parametrize("heal_after_ns", [10_000, 4 * TIMEOUT])
def test_x11_a_partition_and_its_end(
    prefill: str, decode: str, ways: Sequence[tuple[str, str]], heal_after_ns: int
) -> None:
    """One way or both; for a moment, and beyond the leases."""
    met = at_every_moment(prefill, decode, *cutting(ways), heal_after_ns)
    assert met["cut"], "nothing was on its way"
    assert all(met[state] for state in IN_ALL_STATES), met


@cell
def test_all_at_once(prefill: str, decode: str) -> None:
    """Loss, doubles, corruption, jitter, aborts, deaths and partitions, a little of each."""
    met: Counter[str] = Counter()

    def aborting(rid: str) -> Callable[[Deployment], None]:
        return lambda deployment: deployment.abort(rid)

    for seed in range(30):
        faults = DrawnFaults(seed, loss=0.03, duplicate=0.1, corrupt=0.05, jitter_ns=20_000)
        cut, heal = cutting([THERE] if seed % 2 else [BACK])
        moment = 3_000 * seed % END_NS
        name = "prefill 0" if seed % 3 else "decode 0"
        at = [(moment, kill(name)), (moment + 20_000, restart(name)), (moment // 2, aborting(f"r{seed % 5}"))]
        at += [(moment + 30_000, cut), (moment + 60_000, heal)]
        deployment = run(setup_of(prefill, decode), JOBS, faults=faults, at=at)
        without = twin(prefill, decode).streams()
        assert all(stream == without[rid] for rid, stream in deployment.streams().items())
        met.update(deployment.links.counts)
        met["served"] += len(deployment.streams())
    assert all(met[name] for name in ("lost", "duplicated", "corrupted", "delayed", "cut", "dead", "served")), met


def test_states_are_those_of_the_specification() -> None:
    """SGLang's KVPoll: of several ranks the lowest counts, and failure is the lowest."""
    names = ["FAILED", "BOOTSTRAPPING", "WAITING_FOR_INPUT", "TRANSFERRING", "SUCCESS"]
    assert [(poll.name, poll.value) for poll in Poll] == list(zip(names, range(5), strict=True))
    assert min(Poll.SUCCESS, Poll.TRANSFERRING, Poll.FAILED) is Poll.FAILED
