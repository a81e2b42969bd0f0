"""The workload as a runtime sees it: who is to be sent when, who was sent, who is still open. The same for every
clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from testbed.messages import GenerateRequest, RequestOutput
from testbed.runtime.oracle import Oracle
from testbed.workload.base import TimedRequest, Workload


class Traffic:
    """Feeds one loop from one workload."""

    def __init__(self, workload: Workload, oracle: Oracle) -> None:
        self._workload = workload
        self._oracle = oracle
        self._source = workload.start()
        self._by_iteration: deque[TimedRequest] = deque()
        self.sent: dict[str, tuple[int, str, str]] = {}
        """(arrival_ns, session, tenant) of every request sent so far, by id, in order."""
        self.open = 0
        """Requests sent and not ended."""
        self.ended = 0
        self.exhausted = False
        """Every request that waits for no other has been handed out."""

    def next_timed(self) -> TimedRequest | None:
        """The next request that is sent by time; those tied to iterations are set aside. None: no more."""
        for timed in self._source:
            if timed.iteration < 0:
                return timed
            self._by_iteration.append(timed)
        self.exhausted = True
        return None

    def due(self, iteration: int, now_ns: int) -> list[GenerateRequest]:
        """Requests tied to this iteration of the loop or an earlier one: sent now."""
        due: list[GenerateRequest] = []
        while self._by_iteration and self._by_iteration[0].iteration <= iteration:
            due.append(self.send(self._by_iteration.popleft()._replace(arrival_ns=now_ns)))
        return due

    @property
    def tied_to_iterations(self) -> bool:
        """Whether a later iteration will bring a request, so that the loop must not block."""
        return bool(self._by_iteration)

    def send(self, timed: TimedRequest) -> GenerateRequest:
        """Note that ``timed`` is sent now; returns its message."""
        self.sent[timed.request.rid] = (timed.arrival_ns, timed.session, timed.tenant)
        self.open += 1
        self._oracle.expect(timed)
        return timed.request

    def end(self, output: RequestOutput, now_ns: int) -> Sequence[TimedRequest]:
        """A request ended; returns what its user sends next."""
        self.open -= 1
        self.ended += 1
        return self._workload.on_finish(output.rid, now_ns, output.output_ids)
