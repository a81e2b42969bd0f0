"""Who sends: an open loop sends whatever happens, a closed loop waits for the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from testbed.workload.base import TimedRequest
from testbed.workload.contents import Contents
from testbed.workload.draw import Quantiles, Uniforms, values
from testbed.workload.traces.rows import SECOND_NS


class _Sending:
    """What both have in common: contents, and an end."""

    def __init__(self, contents: Contents, count: int | None, until_ns: int | None, expected: int | None) -> None:
        self._contents = contents
        self._count = count
        self._until_ns = until_ns
        self._expected = expected
        self._late = 0

    def expected_requests(self) -> int | None:
        """See ``Workload``."""
        return self._expected

    def notes(self) -> list[str]:
        """See ``Workload``."""
        late = [f"{self._late} turns were not sent: duration_s was over"] if self._late else []
        return self._contents.notes() + late

    def _is_over(self, now_ns: int) -> bool:
        return self._until_ns is not None and now_ns >= self._until_ns

    def _reply(self, rid: str, now_ns: int, output_ids: NDArray[np.int32]) -> TimedRequest | None:
        timed = self._contents.reply(rid, now_ns, output_ids)
        if timed is not None and self._is_over(timed.arrival_ns):
            self._late += 1
            return None
        return timed


class OpenLoop(_Sending):
    """Requests (or sessions) that come at given times, or before given iterations of the event loop."""

    def __init__(
        self,
        contents: Contents,
        arrivals: Iterator[tuple[int, int]],
        *,
        count: int | None,
        until_ns: int | None,
        expected: int | None,
    ) -> None:
        """``arrivals``: (arrival in ns, iteration or -1)."""
        super().__init__(contents, count, until_ns, expected)
        self._arrivals = arrivals

    def start(self) -> Iterator[TimedRequest]:
        """See ``Workload``."""
        for arrival_ns, iteration in islice(self._arrivals, self._count):
            if self._is_over(arrival_ns):
                return
            timed = self._contents.open(arrival_ns, iteration)
            if timed is None:
                return
            yield timed

    def on_finish(self, rid: str, now_ns: int, output_ids: NDArray[np.int32]) -> Sequence[TimedRequest]:
        """See ``Workload``."""
        timed = self._reply(rid, now_ns, output_ids)
        return () if timed is None else (timed,)


class ClosedLoopUsers(_Sending):
    """A fixed number of users; each sends, waits for the end, thinks, and sends again."""

    def __init__(
        self,
        contents: Contents,
        think_s: Quantiles,
        *,
        users: int,
        ramp_ns: int,
        seed: int,
        count: int | None,
        until_ns: int | None,
        expected: int | None,
    ) -> None:
        super().__init__(contents, count, until_ns, expected)
        self._users = users if count is None else min(users, count)
        self._ramp_ns = ramp_ns
        # A generator for each user: how long one thinks does not depend on when the others are served.
        self._thinks = [values(think_s, Uniforms(seed, "think", user)) for user in range(self._users)]
        self._user_of: dict[str, int] = {}
        self._opened = 0

    def start(self) -> Iterator[TimedRequest]:
        """See ``Workload``."""
        for user in range(self._users):
            timed = self._open(user, user * self._ramp_ns // self._users)
            if timed is None:
                return
            yield timed

    def on_finish(self, rid: str, now_ns: int, output_ids: NDArray[np.int32]) -> Sequence[TimedRequest]:
        """See ``Workload``."""
        user = self._user_of.pop(rid, None)
        if user is None:
            return ()
        timed = self._reply(rid, now_ns, output_ids)
        if timed is None:
            timed = self._open(user, now_ns + round(next(self._thinks[user]) * SECOND_NS))
        else:
            self._user_of[timed.request.rid] = user
        return () if timed is None else (timed,)

    def _open(self, user: int, arrival_ns: int) -> TimedRequest | None:
        if self._is_over(arrival_ns) or (self._count is not None and self._opened >= self._count):
            return None
        timed = self._contents.open(arrival_ns)
        if timed is not None:
            self._opened += 1
            self._user_of[timed.request.rid] = user
        return timed
