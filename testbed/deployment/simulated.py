"""A deployment in virtual time: its loops in one world, the channels between them, the users in front."""

from __future__ import annotations

from collections.abc import Sequence

from testbed.deployment.build import Engine, rings_of
from testbed.deployment.routed import build_front, build_links, open_inboxes, reports_of, users_of
from testbed.loops.base import LoopContext
from testbed.messages import Message
from testbed.runtime.channels import connect_stages
from testbed.runtime.leap import LEAPING, Leaper
from testbed.runtime.links import Port
from testbed.runtime.traffic import Traffic
from testbed.runtime.users import WorkloadUsers
from testbed.runtime.virtual import VirtualRuntime
from testbed.runtime.world import World

CHANNEL_NS = 20_000
"""A message from one stage's process to the next, pickled and sent by gloo or ZMQ on one machine: a guess."""


class Simulation:
    """The engines of one deployment (see ``build_engines``), ready to run once."""

    def __init__(self, engines: Sequence[Engine], *, leap: bool = True) -> None:
        """``leap``: see ``testbed.runtime.leap``; never where loops wait for one another."""
        self.traffic = Traffic(engines[0].workload, engines[0].oracle)
        self._world = World()
        self._users = WorkloadUsers(self._world, self.traffic)
        self._engines = engines
        self._front = build_front(engines, self._world, self._users)
        self._links = build_links(engines, self._world)
        self._runtimes = [self._runtime(engine) for engine in engines]
        for engine, runtime in zip(engines, self._runtimes, strict=True):
            if leap and engine.loop in LEAPING and engine.scheduler.strategy_is_ours:
                runtime.leap = Leaper(engine.scheduler, runtime).try_leap
        for ring in rings_of(engines):
            connect_stages([self._runtimes[number] for number in ring], CHANNEL_NS)

    def _runtime(self, engine: Engine) -> VirtualRuntime:
        runtime = VirtualRuntime(
            world=self._world,
            users=users_of(engine, self._users, self._front),
            cost_model=engine.cost_model,
            host=engine.host,
            recorder=engine.recorder,
            oracle=engine.oracle if engine.place.is_last else None,
            activation_ns=engine.cost_model.activation_ns,
        )
        runtime.reports = reports_of(engine, self._front, lambda: runtime.local_ns)
        if self._links is not None:
            runtime.peers = Port(self._links, engine.place.adapter, lambda: runtime.local_ns)
            self._links.connect(engine.place.adapter, runtime.deliver)
        return runtime

    def send_at(self, when_ns: int, message: Message) -> None:
        """A client's message beside the workload's requests, for example an abort; called before ``run``."""
        self._world.at(when_ns, lambda: self._send(message))

    def _send(self, message: Message) -> None:
        if self._front is None:
            self._runtimes[0].deliver(message)
        else:
            self._front.send(message)

    def run(self) -> None:
        """Until nothing can happen any more. Raises a loop's own exception, and Deadlock."""
        open_inboxes(self._engines, [runtime.deliver for runtime in self._runtimes], self._users, self._front)
        for engine, runtime in zip(self._engines, self._runtimes, strict=True):
            self._world.start(engine.place.name, engine.loop(LoopContext(engine.scheduler, runtime)))
        self._users.start()
        self._world.run()
