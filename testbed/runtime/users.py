"""Who sends to a deployment and hears its answers, whatever its time is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from testbed.messages import ControlOutput, GenerateRequest, Message, RequestOutput
from testbed.runtime.traffic import Traffic
from testbed.workload.base import TimedRequest


class Timeline(Protocol):
    """Where things can be made to happen at a time."""

    open_requests: Callable[[], int]
    """Requests that were sent and have not ended."""

    def now_ns(self) -> int:
        """The time."""
        ...

    def at(self, when_ns: int, action: Callable[[], None]) -> None:
        """Call ``action`` at ``when_ns``; now, if that is past."""
        ...


class Users(Protocol):
    """Whom a loop's outputs go to."""

    @property
    def tied_to_iterations(self) -> bool:
        """Whether a later iteration will bring a request, so that the loop must not block."""
        ...

    def due(self, iteration: int, now_ns: int) -> Sequence[Message]:
        """Messages tied to this iteration or an earlier one: sent now."""
        ...

    def hear(self, output: RequestOutput | ControlOutput, now_ns: int) -> None:
        """The end of a request, or the answer to a control message."""
        ...


class WorkloadUsers:
    """A workload's users: they send to ``submit``, an engine's inbox or a router, and hear the ends."""

    def __init__(self, world: Timeline, traffic: Traffic) -> None:
        self.traffic = traffic
        self.submit: Callable[[GenerateRequest], None]
        """Whoever takes their requests; set by who builds the deployment."""
        self._world = world
        world.open_requests = lambda: traffic.open

    @property
    def tied_to_iterations(self) -> bool:
        """Whether a later iteration of a loop will bring a request."""
        return self.traffic.tied_to_iterations

    def start(self) -> None:
        """Begin to send the workload's requests, one scheduled event ahead."""
        timed = self.traffic.next_timed()
        if timed is None:
            return

        def arrive() -> None:
            self._arrive(timed)
            self.start()

        self._world.at(timed.arrival_ns, arrive)

    def _arrive(self, timed: TimedRequest) -> None:
        self.submit(self.traffic.send(timed))

    def due(self, iteration: int, now_ns: int) -> list[GenerateRequest]:
        """Requests tied to an iteration of the only loop: sent now."""
        return self.traffic.due(iteration, now_ns)

    def hear(self, output: RequestOutput | ControlOutput, now_ns: int) -> None:
        """The end of a request may make its user send the next."""
        if isinstance(output, RequestOutput):
            for timed in self.traffic.end(output, now_ns):
                self._world.at(timed.arrival_ns, lambda timed=timed: self._arrive(timed))  # type: ignore[misc]
