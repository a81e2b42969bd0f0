"""The router of prefill and decode engines, between users and loops, in any time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from testbed.messages import (
    AbortRequest,
    BatchGenerateRequest,
    ControlOutput,
    GenerateRequest,
    Message,
    RequestOutput,
)
from testbed.routing.pairs import PairRouter, Step
from testbed.runtime.users import Timeline, Users


class PairFront:
    """Carries what the router decides. Everything that reaches it happens on the deployment's timeline."""

    def __init__(self, router: PairRouter, engines: Sequence[str], timeline: Timeline, users: Users) -> None:
        """``engines``: their names, in the order of ``inboxes``."""
        self.inboxes: Sequence[Callable[[Message], None]] = ()
        """What puts a message into each engine's inbox; set by who builds the deployment."""
        self._router, self._timeline, self._users = router, timeline, users
        self._places = {name: place for place, name in enumerate(engines)}

    def submit(self, request: GenerateRequest) -> None:
        """To both halves of the pair that the router chooses, now."""
        self._carry(self._router.submit(request), self._timeline.now_ns())

    def send(self, message: Message) -> None:
        """Any message of a client, to whom it concerns: a control message goes to every engine."""
        if isinstance(message, GenerateRequest):
            self.submit(message)
        elif isinstance(message, BatchGenerateRequest):
            for request in message.requests:
                self.submit(request)
        elif isinstance(message, AbortRequest):
            self._carry(self._router.abort(message), self._timeline.now_ns())
        else:
            for inbox in self.inboxes:
                inbox(message)

    def hear(self, engine: str, output: RequestOutput | ControlOutput, now_ns: int) -> None:
        """An engine's answer, which it sends at ``now_ns``."""
        if isinstance(output, RequestOutput):
            self._timeline.at(now_ns, lambda: self._carry(self._router.ended(engine, output), now_ns))
        else:
            self._users.hear(output, now_ns)

    def _carry(self, step: Step, now_ns: int) -> None:
        for engine, message in step.sent:
            self.inboxes[self._places[engine]](message)
        for answer in step.answers:
            self._users.hear(answer, now_ns)


class PairedUsers:
    """The users of one engine's loop: its answers pass the router."""

    tied_to_iterations = False

    def __init__(self, front: PairFront, engine: str) -> None:
        self._front, self._engine = front, engine

    def due(self, iteration: int, now_ns: int) -> Sequence[Message]:
        """See Users: a router cannot know of iterations."""
        return ()

    def hear(self, output: RequestOutput | ControlOutput, now_ns: int) -> None:
        """See Users."""
        self._front.hear(self._engine, output, now_ns)
