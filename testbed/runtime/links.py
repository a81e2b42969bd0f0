"""The links between engines: what they cost, how transfers share them, and what may go wrong on them.

A transfer leaves through its source's adapter, may pass a link that all share, and enters through its destination's
adapter; then one latency passes. Transfers that meet share a link fairly (max-min): nobody gets more while somebody
who gets less could have it. A message without KV waits for nobody and takes the latency alone.

Work is counted in 2**-32 bytes and rates in such units a nanosecond, all integers, rates rounded down; whoever ends,
ends at a whole nanosecond. So a transfer differs from the exact fluid model by about a nanosecond for each start and
end of others on its way, if it lasts no longer than a second at a byte a nanosecond or more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from msgspec.structs import replace

from testbed.messages import KvChunk, Message
from testbed.runtime.users import Timeline
from testbed.workload.draw import Uniforms

UNITS = 1 << 32
"""Units of work in a byte."""


@dataclass(slots=True, frozen=True)
class LinkSpec:
    """What every link of a deployment is like."""

    gb_per_s: float
    """Of each engine's adapter, each way (1 GB/s is one byte a nanosecond)."""
    latency_ns: int = 0
    shared_gb_per_s: float | None = None
    """Of a link that every transfer passes; None: there is none."""


class Fault(NamedTuple):
    """What happens to one message on its way."""

    lost: bool = False
    copies: int = 1
    """2: it is delivered twice."""
    corrupt: str = ""
    """The field of a KvChunk whose lowest bit is flipped; other messages are guarded by their transport."""
    delay_ns: int = 0
    """Behind its latency: late, and behind what was sent after it."""


NO_FAULT = Fault()


class Faults(Protocol):
    """Says what happens to each message."""

    def fault(self, number: int, source: str, destination: str, message: Message) -> Fault:
        """``number``: the message's place in the order in which engines send, over all links."""
        ...


@dataclass(slots=True, frozen=True)
class ScriptedFaults:
    """Chosen messages, by number."""

    faults: Mapping[int, Fault] = field(default_factory=dict)

    def fault(self, number: int, source: str, destination: str, message: Message) -> Fault:
        """See Faults."""
        return self.faults.get(number, NO_FAULT)


CORRUPTIBLE = ("room", "index", "start", "tokens", "token_id", "checksum")
"""Fields of a KvChunk that drawn faults corrupt."""


class DrawnFaults:
    """Each with its probability, from a generator of its own; every message takes five numbers."""

    def __init__(
        self, seed: int, *, loss: float = 0.0, duplicate: float = 0.0, corrupt: float = 0.0, jitter_ns: int = 0
    ) -> None:
        """``jitter_ns``: delays are uniform from 0 to this."""
        self._uniforms = Uniforms(seed, "link faults")
        self._loss, self._duplicate, self._corrupt, self._jitter_ns = loss, duplicate, corrupt, jitter_ns

    def fault(self, number: int, source: str, destination: str, message: Message) -> Fault:
        """See Faults."""
        lost, twice, flips, which, late = self._uniforms.take(5).tolist()
        return Fault(
            lost=lost < self._loss,
            copies=1 + (twice < self._duplicate),
            corrupt=CORRUPTIBLE[int(which * len(CORRUPTIBLE))] if flips < self._corrupt else "",
            delay_ns=int(late * (self._jitter_ns + 1)),
        )


class _Transfer:
    """KV on its way."""

    __slots__ = ("arrive", "left", "links", "rate")

    def __init__(self, links: tuple[str, ...], size_bytes: int, arrive: Callable[[], None]) -> None:
        self.links = links
        self.left = size_bytes * UNITS
        self.rate = 0
        self.arrive = arrive


class Links:
    """All links of a deployment."""

    def __init__(
        self,
        world: Timeline,
        spec: LinkSpec,
        faults: Faults | None = None,
        note_transfer: Callable[[str, int, int], None] = lambda destination, begin_ns, end_ns: None,
    ) -> None:
        """``note_transfer``: is told of all KV that has left: where to, when it began to, and when it comes (ns)."""
        self._world = world
        self._note_transfer = note_transfer
        self._spec = spec
        self._faults = faults or ScriptedFaults()
        self._inboxes: dict[str, Callable[[Message], None]] = {}
        self._cut: dict[tuple[str, str], bool] = {}
        self._transfers: list[_Transfer] = []
        self._since_ns = 0
        """When the transfers' work was last brought up to date."""
        self._plan = 0
        """Number of the last plan for the next end: an event of an older one is void."""
        self.sent = 0
        """Messages so far."""
        self.counts = {"lost": 0, "duplicated": 0, "corrupted": 0, "delayed": 0, "cut": 0, "dead": 0}
        """Faults that happened."""

    # -- who is there -----------------------------------------------------------------------------------------------

    def connect(self, engine: str, deliver: Callable[[Message], None]) -> None:
        """``engine`` is there, perhaps again: what is for it goes to ``deliver``."""
        self._inboxes[engine] = deliver

    def kill(self, engine: str) -> None:
        """``engine`` is gone: nothing reaches it, and its transfers end where they are. Messages that it has sent are
        on their way."""
        self._inboxes.pop(engine, None)
        self._work_done()
        ends = (f"from {engine}", f"to {engine}")
        left = [transfer for transfer in self._transfers if not any(end in transfer.links for end in ends)]
        self.counts["dead"] += len(self._transfers) - len(left)
        self._transfers = left
        self._share()

    def cut(self, source: str, destination: str) -> None:
        """Nothing from ``source`` reaches ``destination`` any more (the other way is another link)."""
        self._cut[source, destination] = True

    def heal(self, source: str, destination: str) -> None:
        """What ``cut`` did is over."""
        self._cut.pop((source, destination), None)

    # -- messages ---------------------------------------------------------------------------------------------------

    def send(self, source: str, destination: str, message: Message, size_bytes: int, now_ns: int) -> None:
        """``message`` leaves at ``now_ns`` (no earlier than the world's time), behind ``size_bytes`` of KV."""
        fault = self._faults.fault(self.sent, source, destination, message)
        self.sent += 1
        self._world.at(now_ns, lambda: self._leave(source, destination, message, size_bytes, fault))

    def _leave(self, source: str, destination: str, message: Message, size_bytes: int, fault: Fault) -> None:
        if source not in self._inboxes:
            self.counts["dead"] += 1
            return
        self._note(fault, message)
        for copy in range(fault.copies):
            self._carry(source, destination, message, size_bytes, fault, copy)

    def _carry(self, source: str, destination: str, message: Message, size_bytes: int, fault: Fault, copy: int) -> None:
        """One copy; only the first is late, so that the second may come before it."""
        if fault.corrupt and isinstance(message, KvChunk):
            message = replace(message, **{fault.corrupt: int(getattr(message, fault.corrupt)) ^ 1})
        delay_ns = self._spec.latency_ns + (0 if copy else fault.delay_ns)
        begin_ns = self._now_ns

        def arrive() -> None:
            end_ns = self._now_ns + delay_ns
            self._world.at(end_ns, lambda: self._deliver(source, destination, message, fault))
            if size_bytes:
                self._note_transfer(destination, begin_ns, end_ns)

        if not size_bytes:
            arrive()
            return
        shared = () if self._spec.shared_gb_per_s is None else ("shared",)
        self._work_done()
        self._transfers.append(_Transfer((f"from {source}", *shared, f"to {destination}"), size_bytes, arrive))
        self._share()

    def _deliver(self, source: str, destination: str, message: Message, fault: Fault) -> None:
        if fault.lost:
            return
        inbox = self._inboxes.get(destination)
        if self._cut.get((source, destination)):
            self.counts["cut"] += 1
        elif inbox is None:
            self.counts["dead"] += 1
        else:
            inbox(message)

    def _note(self, fault: Fault, message: Message) -> None:
        counts = self.counts
        counts["lost"] += fault.lost
        counts["duplicated"] += fault.copies > 1
        counts["corrupted"] += bool(fault.corrupt) and isinstance(message, KvChunk)
        counts["delayed"] += fault.delay_ns > 0

    # -- sharing ----------------------------------------------------------------------------------------------------

    @property
    def _now_ns(self) -> int:
        return self._world.now_ns()

    def _capacity(self, link: str) -> int:
        shared = self._spec.shared_gb_per_s
        return int((shared if link == "shared" and shared is not None else self._spec.gb_per_s) * UNITS)

    def _work_done(self) -> None:
        """Bring every transfer up to now."""
        elapsed_ns = self._now_ns - self._since_ns
        self._since_ns += elapsed_ns
        for transfer in self._transfers:
            transfer.left -= transfer.rate * elapsed_ns

    def _share(self) -> None:
        """Give every transfer its max-min fair rate: fill all alike until a link is full, fix those on it, go on with
        what is left (progressive filling: Bertsekas and Gallager, Data Networks, 6.5.2). Then wait for the next end."""
        free = {link: self._capacity(link) for transfer in self._transfers for link in transfer.links}
        unfixed = list(self._transfers)
        while unfixed:
            users: dict[str, int] = {}
            for transfer in unfixed:
                for link in transfer.links:
                    users[link] = users.get(link, 0) + 1
            tightest = min(users, key=lambda link: free[link] // users[link])
            rate = free[tightest] // users[tightest]
            for transfer in unfixed:
                if tightest in transfer.links:
                    transfer.rate = rate
                    for link in transfer.links:
                        free[link] -= rate
            unfixed = [transfer for transfer in unfixed if tightest not in transfer.links]
        self._plan += 1
        if self._transfers:
            plan = self._plan
            wait_ns = min(-(-transfer.left // transfer.rate) for transfer in self._transfers)
            self._world.at(self._now_ns + wait_ns, lambda: self._end(plan))

    def _end(self, plan: int) -> None:
        """The first of the transfers have ended, unless the plan has changed since."""
        if plan != self._plan:
            return
        self._work_done()
        ended = [transfer for transfer in self._transfers if transfer.left <= 0]
        self._transfers = [transfer for transfer in self._transfers if transfer.left > 0]
        for transfer in ended:
            transfer.arrive()
        self._share()


class Port:
    """One engine's way to the others (``ports.Peers``)."""

    def __init__(
        self,
        links: Links,
        engine: str,
        clock: Callable[[], int],
        at_rest: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """``clock``: the loop's own time (ns); ``at_rest``: nothing else happens within such a block, where loops have
        threads of their own."""
        self._links = links
        self._engine = engine
        self._clock = clock
        self._at_rest = at_rest

    def send(self, engine: str, message: Message) -> None:
        """See ports.Peers."""
        self.transfer(engine, message, 0)

    def transfer(self, engine: str, message: Message, size_bytes: int) -> None:
        """See ports.Peers."""
        with self._at_rest():
            self._links.send(self._engine, engine, message, size_bytes, self._clock())
