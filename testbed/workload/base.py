"""What a workload is to a runtime: requests over time, some of them in answer to the end of others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from testbed.messages import GenerateRequest


class TimedRequest(NamedTuple):
    """A request and when it is sent."""

    arrival_ns: int
    request: GenerateRequest
    output_tokens: int
    """How many tokens the executor makes before it ends the request (>= 1): the true length, but never more than
    ``request.max_new_tokens``. The scheduler must not see it."""
    session: str = ""
    tenant: str = ""
    iteration: int = -1
    """>= 0: deliver before this iteration of the event loop, instead of by time."""


class Workload(Protocol):
    """Requests over time. Written once for the simulator and the wall clock: nothing here knows which it is.

    One object serves one run.
    """

    def start(self) -> Iterator[TimedRequest]:
        """Requests that wait for no other, in order of ``arrival_ns``, made one by one as they are asked for."""
        ...

    def on_finish(self, rid: str, now_ns: int, output_ids: NDArray[np.int32]) -> Sequence[TimedRequest]:
        """What request ``rid`` sets off by ending: requests that arrive at ``now_ns`` or later.

        Called once for every request that ended, finished or aborted, with the tokens it produced (int32 [n], n may
        be 0).
        """
        ...

    def expected_requests(self) -> int | None:
        """How many requests there will be, for a progress bar; None where only the run can tell."""
        ...

    def notes(self) -> list[str]:
        """What a reader of the results must know: what was dropped, cut or not sent, and how many."""
        ...
