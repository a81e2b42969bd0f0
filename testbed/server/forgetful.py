"""Records of a run that does not end: counters stay, all that grows with time goes."""

from __future__ import annotations

from collections.abc import Sequence

from testbed.batch import Batch, StepResult
from testbed.messages import Message
from testbed.metrics.journal import Journal
from testbed.metrics.recorder import Recorder
from testbed.request import NEVER, Request
from testbed.scheduler.decisions import DecisionLog
from testbed.server.wire import Times


class ForgetfulJournal(Journal):
    """Keeps nothing of what entered the scheduler."""

    def received(self, now_ns: int, messages: Sequence[Message]) -> None:
        """See Journal."""

    def stepped(self, result: StepResult, sent_ns: int) -> None:
        """See Journal."""


class ForgetfulLog(DecisionLog):
    """Keeps no decision."""

    def append(self, batch: Batch) -> None:
        """See DecisionLog."""


class _NoTimes:
    """Where the times of steps would be collected."""

    def append(self, time_ns: int) -> None:
        """Forget it."""


class ForgetfulRecorder(Recorder):
    """Keeps counters, and the times of a request until somebody asks, once."""

    def __init__(self) -> None:
        super().__init__()
        self.journal = ForgetfulJournal()
        self.advance_times = _NoTimes()  # type: ignore[assignment]
        self.span = _no_span  # type: ignore[assignment]
        self._times: dict[str, Times] = {}

    def step(self, batch: Batch, result: StepResult, sent_ns: int) -> None:
        """See Recorder."""
        self.count("device_ns", result.end_ns - result.start_ns)
        self.count("retracted", len(batch.retracted))

    def ended(self, request: Request, outputs: int, sent_ns: int) -> None:
        """See Recorder."""
        self._times[request.rid] = times_of(request, sent_ns)

    def arrived(self, rid: str, sent_ns: int) -> None:
        """A worker has sent this request: the scheduler's own stamps are enough."""

    def times_of(self, rid: str) -> Times | None:
        """Of a request that has just ended."""
        return self._times.pop(rid, None)


def _no_span(span: tuple[int, int, int, int]) -> None:
    """Spans are for runs."""


def times_of(request: Request, sent_ns: int) -> Times:
    """Of a request whose end was sent at ``sent_ns``."""
    return Times(
        _since(request.queued_ns, request.first_scheduled_ns),
        _since(request.queued_ns, request.first_token_ns),
        _since(request.queued_ns, sent_ns),
    )


def _since(begin_ns: int, end_ns: int) -> int:
    return end_ns if end_ns == NEVER else end_ns - begin_ns
