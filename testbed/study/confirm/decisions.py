"""The first step in which a simulated and a real run decide differently, and why.

Up to that step both schedulers decided the same. What can make them differ then is what they had been told: which
requests had arrived, which results were known, whether the loop had been idle. If all of that is equal too, the
scheduler itself decides differently.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from testbed.messages import BatchGenerateRequest, GenerateRequest
from testbed.metrics.columns import Floats, floats, ints
from testbed.metrics.journal import Journal
from testbed.metrics.run import Run
from testbed.request import FinishReason
from testbed.scenario.errors import InputError
from testbed.scheduler.decisions import Decision, first_difference

SHOWN = 3
"""Ids that a sentence names at most."""


@dataclass(frozen=True)
class Difference:
    """The first step in which two runs decide differently."""

    step: int
    one: str
    """The decision of the first run, in words."""
    other: str
    cause: str
    """``arrival``: a request had been received in one and not in the other; ``end``: so had the end of a request;
    ``idle``: one loop had been idle, which starts the estimate of output afresh; ``pool``: KV memory or context differ;
    ``end of run``: one of them launches no more; ``scheduler``: both knew the same."""
    why: str
    by_timing: bool
    """Whether it follows from the clock, as between any two runs of a timed workload: not an error."""


def compare_decisions(one: Run, other: Run, names: tuple[str, str] = ("simulation", "run")) -> Difference | None:
    """The first difference between the decision logs of two runs, explained from what both schedulers had received and
    finished when they decided; None where all decisions are equal. Both runs need a journal."""
    found = first_difference(one.records.decisions, other.records.decisions)
    if found is None:
        return None
    step, left, right = found
    sides = _Side(names[0], one, step), _Side(names[1], other, step)
    silent = names[0] if left is None else names[1] if right is None else ""
    cause, why = _explain(*sides, silent)
    arrivals = one.scenario.get("workload", {}).get("arrivals") or {}  # null in those of a trace
    by_timing = cause in ("arrival", "end", "idle") and arrivals.get("kind") != "at_iteration"
    return Difference(step, in_words(left, sides[0].ids), in_words(right, sides[1].ids), cause, why, by_timing)


def ids_by_rank(run: Run) -> list[str]:
    """Ids of the requests that the scheduler accepted, in order: what a decision log calls 0, 1, 2, ..."""
    table = run.records.requests
    refused = {
        rid
        for rid, reason, scheduled in zip(
            table["id"], table["finish_reason"], ints(table, "first_scheduled_ns").tolist(), strict=True
        )
        if reason == FinishReason.ERROR and scheduled < 0
    }
    return [message.rid for _, message in sent_requests(_journal(run)) if message.rid not in refused]


def sent_requests(journal: Journal) -> list[tuple[int, GenerateRequest]]:
    """Every request that reached the scheduler, with the index of the ``recv`` that brought it."""
    found: list[tuple[int, GenerateRequest]] = []
    for index, message in journal.arrivals:
        if isinstance(message, GenerateRequest):
            found.append((index, message))
        elif isinstance(message, BatchGenerateRequest):
            found.extend((index, request) for request in message.requests)
    return found


def in_words(decision: Decision | None, ids: Sequence[str]) -> str:
    """A decision as a sentence."""
    if decision is None:
        return "nothing: it launches no more"

    def named(ranks: Sequence[int]) -> str:
        shown = ", ".join(ids[rank] if rank < len(ids) else f"#{rank}" for rank in ranks[:SHOWN])
        return f"{shown}{f' and {len(ranks) - SHOWN} more' if len(ranks) > SHOWN else ''}"

    parts = []
    if decision.prefills:
        new_tokens = sum(new for _, _, new in decision.prefills)
        behind = sum(prefix for _, prefix, _ in decision.prefills)
        ranks = [rank for rank, _, _ in decision.prefills]
        parts.append(f"prefill of {named(ranks)}: {new_tokens} tokens behind {behind}")
    if decision.decodes:
        parts.append(f"decode of {len(decision.decodes)} ({named(decision.decodes)})")
    if decision.retracted:
        parts.append(f"retraction of {named(decision.retracted)}")
    if decision.evicted_tokens:
        parts.append(f"{decision.evicted_tokens} tokens evicted")
    return "; ".join([*parts, f"{len(decision.pages)} new pages"])


class _Side:
    """What one run's scheduler knew when it decided ``step``."""

    def __init__(self, name: str, run: Run, step: int) -> None:
        self.name, self.step = name, step
        self._run, self._journal = run, _journal(run)
        self._launches = ints(run.records.steps, "launch_ns")

    @property
    def launch_ns(self) -> int:
        """When it was launched; for a step that was not recorded, the last stamp there is."""
        stamps = self._journal.stamps
        return int(self._launches[self.step]) if self.step < len(self._launches) else (stamps[-1] if stamps else 0)

    @cached_property
    def recv(self) -> int:
        """Index of the ``recv`` before the decision."""
        return bisect_right(self._journal.stamps, self.launch_ns) - 1

    @cached_property
    def ids(self) -> list[str]:
        """Ids by rank."""
        return ids_by_rank(self._run)

    @cached_property
    def received(self) -> dict[str, int]:
        """When each request that had been received had: stamp of its ``recv`` (ns) by id."""
        stamps = self._journal.stamps
        return {message.rid: stamps[index] for index, message in sent_requests(self._journal) if index <= self.recv}

    @cached_property
    def ended(self) -> dict[str, int]:
        """When each request whose end was known had ended (ns), by id."""
        table = self._run.records.requests
        pairs = zip(table["id"], ints(table, "finish_ns").tolist(), strict=True)
        return {rid: finish for rid, finish in pairs if 0 <= finish <= self.launch_ns}

    def arrival_ns(self, rid: str) -> int | None:
        """When a request was sent; None where it never was."""
        table = self._run.records.requests
        known = dict(zip(table["id"], ints(table, "arrival_ns").tolist(), strict=True))
        return known.get(rid)

    def recvs_before(self, step: int) -> int:
        """Iterations between the launch before ``step`` and its own: 1, unless the loop was idle between them."""
        before = bisect_right(self._journal.stamps, int(self._launches[step - 1])) if step else 0
        return bisect_right(self._journal.stamps, int(self._launches[step])) - before

    @property
    def ratios(self) -> Floats:
        """The estimate of output at each step before this one: float64 [steps]."""
        return floats(self._run.records.steps, "new_token_ratio")[: self.step]

    @property
    def room(self) -> tuple[int, int]:
        """KV tokens and context."""
        setting = self._journal.setting
        return (setting.kv_tokens, setting.context_length) if setting else (0, 0)


def _explain(one: _Side, other: _Side, silent: str) -> tuple[str, str]:
    """(cause, why) of a difference. ``silent``: the run that launches no more, or ''."""
    for has, lacks in ((one, other), (other, one)):
        more = [rid for rid in has.received if rid not in lacks.received]
        if more:
            return "arrival", _arrival(more, has, lacks)
    for has, lacks in ((one, other), (other, one)):
        more = [rid for rid in has.ended if rid not in lacks.ended]
        if more:
            ago_us = (has.launch_ns - has.ended[more[0]]) / 1e3
            told = f"the {has.name} had sent the end of {_some(more)} {ago_us:,.1f} us before it decided"
            return "end", f"{told}, the {lacks.name} had not"
    if one.room != other.room:
        rooms = [f"{side.room[0]:,} KV tokens and a context of {side.room[1]:,}" for side in (one, other)]
        return "pool", f"the {one.name} has {rooms[0]}, the {other.name} {rooms[1]}"
    if silent:
        return "end of run", f"the {silent} launches no more"
    return _by_estimate(one, other)


def _arrival(more: Sequence[str], has: _Side, lacks: _Side) -> str:
    """A request that only one had received: by how much it was early there, and late here."""
    rid = more[0]
    early_us = (has.launch_ns - has.received[rid]) / 1e3
    told = f"the {has.name} had received {_some(more)} {early_us:,.1f} us before it decided"
    arrival_ns = lacks.arrival_ns(rid)
    if arrival_ns is None:
        return f"{told}; in the {lacks.name} it was never sent"
    late_us = (arrival_ns - lacks.launch_ns) / 1e3
    when = f"{late_us:,.1f} us after" if late_us > 0 else f"{-late_us:,.1f} us before, behind the stamp of"
    return f"{told}; in the {lacks.name} it came {when} that decision"


def _by_estimate(one: _Side, other: _Side) -> tuple[str, str]:
    """Both knew the same. The estimate of output (``new_token_ratio``) is the scheduler's own state, but starts afresh
    whenever the loop finds nothing to do: that is timing, anything else is the scheduler."""
    apart = np.flatnonzero(one.ratios != other.ratios)
    step = int(apart[0]) if len(apart) else one.step
    told = "the estimate of output is the same up to there"
    if len(apart):
        told = (
            f"from step {step:,} on the estimate of output differs ({one.ratios[step]:.4f}, {other.ratios[step]:.4f})"
        )
    recvs = one.recvs_before(step), other.recvs_before(step)
    if recvs[0] == recvs[1]:
        return "scheduler", f"both had received and finished the same, and decide differently; {told}"
    idle = one if recvs[0] > recvs[1] else other
    told = f"before step {step:,} the loop of the {idle.name} had found nothing to do"
    return "idle", f"{told}, which starts its estimate of output afresh"


def _some(ids: Sequence[str]) -> str:
    return f"{ids[0]}{f' and {len(ids) - 1} more' if len(ids) > 1 else ''}"


def _journal(run: Run) -> Journal:
    if run.records.journal is None:
        raise InputError("the run has no journal", where=run.name, remedy="run the scenario again")
    return run.records.journal
