"""A router between users and replicas, in any time: what it is told takes a while to come, and a decision uses what has
come by then.

Only decisions look at what was told, so it is kept with its time until the next one: no event for a report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from heapq import heappop, heappush

from testbed.messages import ControlOutput, GenerateRequest, LoadReport, Message, RequestOutput
from testbed.routing.controller import Controller
from testbed.runtime.users import Users

REPORT_NS = 20_000
"""From a replica to the router, between two processes of one machine: a guess."""


class Router:
    """In front of the replicas of a deployment."""

    def __init__(
        self,
        controller: Controller,
        now_ns: Callable[[], int],
        at_rest: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """``controller``: has a replica for each of ``inboxes``; ``now_ns``: the time; ``at_rest``: nothing else
        happens within such a block, where replicas have threads of their own."""
        self.inboxes: Sequence[Callable[[Message], None]] = ()
        """By replica: what puts a message into its inbox; set by who builds the deployment."""
        self._controller = controller
        self._now_ns = now_ns
        self._at_rest = at_rest
        self._told: list[tuple[int, int, int, str | LoadReport]] = []
        """A heap of (when it comes, serial, replica, the id of an ended request or a report)."""
        self._serial = 0

    def submit(self, request: GenerateRequest) -> None:
        """To the replica that the policy chooses, now."""
        self._listen()
        self.inboxes[self._controller.submit(request)](request)

    def send(self, message: Message) -> None:
        """Any message of a client, to whom it concerns."""
        self._listen()
        for replica, part in self._controller.route(message):
            self.inboxes[replica](part)

    def _listen(self) -> None:
        """Take in what has come by now."""
        now_ns, told = self._now_ns(), self._told
        while told and told[0][0] <= now_ns:
            _, _, replica, what = heappop(told)
            if isinstance(what, LoadReport):
                self._controller.reported(replica, what)
            else:
                self._controller.ended(what)

    def tell(self, when_ns: int, replica: int, what: str | LoadReport) -> None:
        """A report, or the end of a request by its id, comes at ``when_ns``."""
        with self._at_rest():
            self._serial += 1
            heappush(self._told, (when_ns, self._serial, replica, what))


class RoutedUsers:
    """The users of one replica's loop: its answers pass the router."""

    tied_to_iterations = False

    def __init__(self, router: Router, replica: int, users: Users) -> None:
        self._router, self._replica, self._users = router, replica, users

    def due(self, iteration: int, now_ns: int) -> Sequence[Message]:
        """See Users: a router cannot know of iterations."""
        return ()

    def hear(self, output: RequestOutput | ControlOutput, now_ns: int) -> None:
        """See Users."""
        if isinstance(output, RequestOutput):
            self._router.tell(now_ns, self._replica, output.rid)
        self._users.hear(output, now_ns)


class RouterReports:
    """One replica's reports: see ports.Reports."""

    def __init__(self, router: Router, replica: int, every_steps: int, now_ns: Callable[[], int]) -> None:
        """``now_ns``: the time of the replica's loop."""
        self.every_steps = every_steps
        self._router, self._replica, self._now_ns = router, replica, now_ns

    def send(self, load: LoadReport) -> None:
        """See ports.Reports."""
        self.send_at(self._now_ns(), load)

    def send_at(self, when_ns: int, load: LoadReport) -> int:
        """Send at another time than now; returns when it comes."""
        self._router.tell(when_ns + REPORT_NS, self._replica, load)
        return when_ns + REPORT_NS
