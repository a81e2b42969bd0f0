"""What stands between the moments that are recorded: queue lengths and KV memory over time.

Step records hold them at each launch. They stand until the next launch, or until the last request leaves: an idle
engine runs nothing, queues nothing, and its requests own no memory.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from testbed.metrics.columns import Floats, Ints, floats, ints
from testbed.metrics.laws import merged, stays
from testbed.metrics.loops import Loop
from testbed.metrics.records import Records

COLUMNS = ("running", "waiting", "rows")


class Levels(NamedTuple):
    """A loop's state as step functions: each value stands from its time to the next one's, the last one on."""

    since_ns: Ints
    """int64 [changes], ascending."""
    values: dict[str, Floats]
    """float64 [changes] each: ``running``, ``waiting``, ``rows``, ``free_tokens``, ``evictable_tokens`` and
    ``owned_tokens``."""

    def held_ns(self, begin_ns: int, end_ns: int) -> Ints:
        """How long each value stands between two times: int64 [changes]."""
        cuts = np.append(self.since_ns, end_ns).clip(begin_ns, end_ns)
        return np.asarray(np.diff(cuts), dtype=np.int64)


def levels(records: Records, loop: Loop) -> Levels:
    """The state of ``loop`` at each launch and wherever its last request leaves.

    What requests owned is then cached, in a run that caches prefixes (one in which anything ever was evictable), and
    free in another. Where its capacity is not known, the most that was ever free or cached stands for it.
    """
    steps = ints(records.steps, "replica") == loop.number
    here = loop.serves(records)
    left = merged(*(side[here] for side in stays(records)["system"]))[1]
    launch = ints(records.steps, "launch_ns")[steps]
    since = np.concatenate([launch, left])
    # At equal times the launch comes first: a step without requests to come is the loop's extra one.
    order = np.argsort(since, kind="stable")
    idle = (order >= len(launch)).copy()
    # An idle moment keeps the memory of the launch before it; -1, none, is seen as nothing owned.
    last = np.cumsum(~idle) - 1

    def at_launch(column: str) -> Floats:
        return floats(records.steps, column).compress(steps)

    free, evictable = at_launch("free_tokens"), at_launch("evictable_tokens")
    capacity = float(loop.kv_tokens or (free + evictable).max(initial=0))
    before = last < 0
    values = {name: np.where(idle, 0.0, _taken(at_launch(name), last)) for name in COLUMNS}
    free_now, cached_now = (_taken(column, last) for column in (free, evictable))
    if evictable.any():
        cached_now = np.where(idle, capacity - free_now, cached_now)
    else:
        free_now = np.where(idle, capacity, free_now)
    values |= {
        "free_tokens": np.where(before, capacity, free_now),
        "evictable_tokens": np.where(before, 0.0, cached_now),
    }
    values["owned_tokens"] = np.maximum(capacity - values["free_tokens"] - values["evictable_tokens"], 0.0)
    return Levels(since[order], values)


def _taken(column: Floats, index: Ints) -> Floats:
    """``column[index]``; 0 for an empty column."""
    return column.take(np.maximum(index, 0)) if len(column) else np.zeros(len(index))
