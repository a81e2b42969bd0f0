"""A deployment on the wall clock, in front of modelled devices: a thread for each loop."""

from __future__ import annotations

from collections.abc import Sequence

from testbed.costs import HostProfile
from testbed.deployment.build import Engine, rings_of
from testbed.deployment.routed import build_front, build_links, open_inboxes, reports_of, users_of
from testbed.loops.base import LoopContext
from testbed.runtime.channels import close_ring
from testbed.runtime.links import Port
from testbed.runtime.paced import PacedDevice
from testbed.runtime.traffic import Traffic
from testbed.runtime.users import WorkloadUsers
from testbed.runtime.wall import WallClock, WallRuntime
from testbed.runtime.wall_threads import runtime_for
from testbed.runtime.wall_world import Mailbox, WallChannel, WallWorld


class PacedDeployment:
    """The engines of one deployment (see ``build_engines``), ready to run once."""

    def __init__(self, engines: Sequence[Engine], clock: WallClock, inject: HostProfile | None) -> None:
        """``inject``: see ``WallRuntime``."""
        self.traffic = Traffic(engines[0].workload, engines[0].oracle)
        self._world = WallWorld(clock)
        self._users = WorkloadUsers(self._world, self.traffic)
        self._engines = engines
        self._front = build_front(engines, self._world, self._users, self._world.at_rest)
        self._links = build_links(engines, self._world)
        self._mailboxes = [
            Mailbox(self._world, engine.place.name, users_of(engine, self._users, self._front)) for engine in engines
        ]
        self._runtimes = [
            self._runtime(engine, mailbox, clock, inject)
            for engine, mailbox in zip(engines, self._mailboxes, strict=True)
        ]
        self._next: list[WallChannel | None] = [None] * len(engines)
        for ring in rings_of(engines):
            self._connect(ring)

    def _runtime(self, engine: Engine, mailbox: Mailbox, clock: WallClock, inject: HostProfile | None) -> WallRuntime:
        oracle = engine.oracle if engine.place.is_last else None
        device = PacedDevice(clock, engine.cost_model, oracle, activation_ns=engine.cost_model.activation_ns)
        kind = runtime_for(engine.loop)
        runtime = kind(clock=clock, device=device, recorder=engine.recorder, clients=mailbox, inject=inject)
        runtime.reports = reports_of(engine, self._front, clock.now_ns)
        if self._links is not None:
            runtime.peers = Port(self._links, engine.place.adapter, clock.now_ns, self._world.at_rest)
            self._links.connect(engine.place.adapter, mailbox.deliver)
        return runtime

    def _connect(self, ring: range) -> None:
        """Make a ring of the loops of one pipeline's stages."""
        channels = []
        for number, receiver in zip(ring, (*ring[1:], ring[0]), strict=True):
            channel = WallChannel(self._world, self._engines[receiver].place.name, self._runtimes[receiver])
            self._next[number] = channel
            channels.append(channel)
        close_ring([self._runtimes[number] for number in ring], channels)

    def run(self) -> None:
        """Until every request has ended. Raises a loop's own exception, and Deadlock."""
        open_inboxes(self._engines, [mailbox.deliver for mailbox in self._mailboxes], self._users, self._front)
        for engine, runtime, channel in zip(self._engines, self._runtimes, self._next, strict=True):
            loop = engine.loop(LoopContext(engine.scheduler, runtime))
            self._world.start(engine.place.name, loop, channel.close if channel else lambda: None)
        self._users.start()
        self._world.run()
