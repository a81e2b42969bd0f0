"""A router in virtual time: what its replicas tell it takes a while, and a decision uses what has arrived.

Only decisions look at what was told, so it is kept with its time until the next one: no event for a report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from testbed.messages import GenerateRequest, LoadReport, Message
from testbed.routing.controller import Controller
from testbed.runtime.world import World
from testbed.scheduler.load import load_report
from testbed.scheduler.scheduler import Scheduler

REPORT_NS = 20_000
"""From a replica to the router, between two processes of one machine: a guess."""


class VirtualRouter:
    """In front of the replicas of a deployment."""

    def __init__(self, world: World, controller: Controller) -> None:
        """``controller``: has a replica for each of ``inboxes``."""
        self.inboxes: Sequence[Callable[[Message], None]] = ()
        """By replica: what puts a message into its inbox; set by who builds the deployment."""
        self._world = world
        self._controller = controller
        self._told: list[tuple[int, int, int, str | LoadReport]] = []
        """A heap of (when it arrives, serial, replica, the id of an ended request or a report)."""
        self._serial = 0

    def submit(self, request: GenerateRequest) -> None:
        """To the replica that the policy chooses, now."""
        now_ns, told = int(self._world.env.now), self._told
        while told and told[0][0] <= now_ns:
            _, _, replica, what = heappop(told)
            if isinstance(what, LoadReport):
                self._controller.reported(replica, what)
            else:
                self._controller.ended(what)
        self.inboxes[self._controller.submit(request)](request)

    def ended(self, replica: int, rid: str, when_ns: int) -> None:
        """The end of a request passes on its way to the client."""
        self._tell(when_ns, replica, rid)

    def reported(self, replica: int, report: LoadReport, when_ns: int) -> None:
        """A report is sent."""
        self._tell(when_ns + REPORT_NS, replica, report)

    def _tell(self, when_ns: int, replica: int, what: str | LoadReport) -> None:
        self._serial += 1
        heappush(self._told, (when_ns, self._serial, replica, what))


class Reporter:
    """Tells the router of one replica's load: after every ``every_steps`` processed steps, and when its loop begins to
    wait."""

    def __init__(self, router: VirtualRouter, replica: int, scheduler: Scheduler, every_steps: int) -> None:
        self._router = router
        self._replica = replica
        self._scheduler = scheduler
        self._every_steps = every_steps

    def processed(self, steps: int, now_ns: int) -> None:
        """``steps`` have been processed in all."""
        if steps % self._every_steps == 0:
            self.waits(now_ns)

    def waits(self, now_ns: int) -> None:
        """The loop is about to wait for a message."""
        self._router.reported(self._replica, load_report(self._scheduler), now_ns)

    def leapt(self, steps: int, sent_ns: NDArray[np.int64], free_tokens: NDArray[np.int64], horizon_ns: int) -> None:
        """Many decode steps at once, ``steps`` processed with the last of them. ``sent_ns``, ``free_tokens``: int64
        [n], after each. Nobody decides before ``horizon_ns``: reports that are overtaken by then are left out."""
        now = load_report(self._scheduler)
        for back in range(steps % self._every_steps, len(sent_ns), self._every_steps):
            used = now.used_tokens - int(free_tokens[-1 - back] - free_tokens[-1])
            report = LoadReport(now.running, now.waiting, used, now.waiting_tokens, steps - back, now.received)
            when_ns = int(sent_ns[-1 - back])
            self._router.reported(self._replica, report, when_ns)
            if when_ns + REPORT_NS <= horizon_ns:
                break
