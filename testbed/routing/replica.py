"""What a router knows of one replica."""

from __future__ import annotations

from collections import deque

from testbed.messages import LoadReport


class Replica:
    """A replica's last report, and what was sent there since.

    Policies read ``index``, ``requests`` and ``tokens``. A replica takes requests from this router alone, in the order
    of sending, and none is lost on the way: then the number that it has received says which of them its report covers.
    """

    __slots__ = ("_received", "_steps", "_unreported", "draining", "index", "requests", "tokens")

    def __init__(self, index: int) -> None:
        self.index = index
        self.draining = False
        """It gets no more requests."""
        self.requests = 0
        """Waiting or running there."""
        self.tokens = 0
        """KV tokens in use there, and prompt tokens that wait."""
        self._unreported: deque[int] = deque()
        """Prompt tokens of the requests that no report covers yet, in order of sending."""
        self._received = self._steps = 0

    def sent(self, prompt_tokens: int) -> None:
        """A request is on its way there."""
        self._unreported.append(prompt_tokens)
        self.requests += 1
        self.tokens += prompt_tokens

    def reported(self, report: LoadReport) -> None:
        """What was known is replaced, but for requests that the replica had not received when it reported. A report
        that was overtaken by a newer one says nothing."""
        if report.received < self._received or report.steps < self._steps:
            return
        for _ in range(report.received - self._received):
            self._unreported.popleft()
        self._received, self._steps = report.received, report.steps
        self.requests = report.running + report.waiting + len(self._unreported)
        self.tokens = report.used_tokens + report.waiting_tokens + sum(self._unreported)

    def ended(self, prompt_tokens: int) -> None:
        """The end of a request was heard from there. Its outputs are in the last report, as far as they are known."""
        self.requests = max(self.requests - 1, 0)
        self.tokens = max(self.tokens - prompt_tokens, 0)
