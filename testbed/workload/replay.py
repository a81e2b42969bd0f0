"""Requests from a trace: its rows within a window, its prompts from block ids, its sessions turn by turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count, groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from testbed.messages import Prompt, Segment, TokenPrompt
from testbed.scenario.errors import InputError
from testbed.scenario.workload import Trace
from testbed.tokens import stream_key
from testbed.workload.base import TimedRequest
from testbed.workload.draw import Uniforms
from testbed.workload.prompts import cut, followed_by, fresh, merged, said
from testbed.workload.terms import Terms
from testbed.workload.traces.reader import find_trace, read_trace
from testbed.workload.traces.rows import NO_TIME, SECOND_NS, TraceRow


@dataclass
class Scan:
    """What one pass over the rows of a window found."""

    rows: int = 0
    sessions: bool = False
    too_long: int = 0
    zero_output: int = 0


class TraceWindow:
    """The rows of a trace that a scenario asks for, with arrival times of the run. Iterating reads the file again."""

    def __init__(
        self, config: Trace, *, terms: Terms | None, seed: int, rate_scale: float, limit: int | None, base_dir: Path
    ) -> None:
        """``terms``: the context that rows must fit; None: only their times matter. Reads the file once, so that
        whatever is wrong in it is said before the run.
        """
        self.path = find_trace(config.trace, base_dir)
        self.file = read_trace(self.path, config.format)
        self._config = config
        self._terms = terms
        self._seed = seed
        self._rate_scale = rate_scale
        self._limit = min((each for each in (config.limit, limit) if each is not None), default=None)
        self.scan = Scan()
        ids: set[str] = set()
        for row in self._window(self.scan):
            self._check(row, ids)

    def __iter__(self) -> Iterator[TraceRow]:
        rows = self._window(Scan())
        if self._config.jitter_s:
            rows = jittered(rows, round(self._config.jitter_s * SECOND_NS), Uniforms(self._seed, "jitter"))
        for row in rows:
            yield (
                row if row.arrival_ns == NO_TIME else row._replace(arrival_ns=round(row.arrival_ns / self._rate_scale))
            )

    def notes(self) -> list[str]:
        """What was left out and what was cut."""
        notes = []
        if self.scan.zero_output:
            notes.append(f"{self.scan.zero_output} requests of {self.path.name} have no output and were dropped")
        if self.scan.too_long and self._terms is not None:
            what = "cut" if self._config.too_long == "truncate" else "dropped"
            notes.append(
                f"{self.scan.too_long} requests of {self.path.name} were longer than {self._terms.limit} "
                f"and were {what}"
            )
        return notes

    def _window(self, scan: Scan) -> Iterator[TraceRow]:
        """Rows in the order of the file, times from the start of the window."""
        start_ns = round(self._config.start_s * SECOND_NS)
        end_ns = None if self._config.duration_s is None else start_ns + round(self._config.duration_s * SECOND_NS)
        if not self.file.has_arrivals and (start_ns or end_ns is not None or self._config.jitter_s):
            raise InputError(
                "the trace has lengths only", where=str(self.path), remedy="leave out start_s, duration_s and jitter_s"
            )
        for row in self.file:
            if row.arrival_ns != NO_TIME:
                if row.arrival_ns < start_ns:
                    continue
                if end_ns is not None and row.arrival_ns >= end_ns:
                    return
                row = row._replace(arrival_ns=row.arrival_ns - start_ns)
            kept = self._kept(row, scan)
            if kept is None:
                continue
            scan.rows += 1
            scan.sessions = scan.sessions or bool(row.session)
            yield kept
            if scan.rows == self._limit:
                return

    def _kept(self, row: TraceRow, scan: Scan) -> TraceRow | None:
        """The row as it will be sent; None when it is left out."""
        if self._terms is None:
            return row
        if row.output_tokens == 0:
            if self._config.zero_output == "reject":
                raise self.file.error_at(
                    row,
                    "a request without output",
                    "zero_output: drop leaves such rows out (BurstGPT's failures), and counts them",
                )
            scan.zero_output += 1
            return None
        if self._terms.fits(row.prompt_tokens, row.output_tokens):
            return row
        if self._config.too_long == "reject":
            raise self.file.error_at(
                row,
                f"{row.prompt_tokens} + {row.output_tokens} tokens exceed {self._terms.limit}",
                f"workload.requests.too_long: truncate or drop, or a larger {self._terms.bound_by}",
            )
        scan.too_long += 1
        if self._config.too_long == "drop":
            return None
        prompt_tokens, output_tokens = self._terms.fitted(row.prompt_tokens, row.output_tokens)
        return row._replace(prompt_tokens=prompt_tokens, output_tokens=output_tokens)

    def _check(self, row: TraceRow, ids: set[str]) -> None:
        """What can only be seen across rows, or with the scenario."""
        if bool(row.id) != bool(ids) and self.scan.rows > 1:
            raise self.file.error_at(row, "some rows have an id and some have none", "give every row an id, or none")
        if row.id in ids:
            raise self.file.error_at(row, f"the id {row.id} occurs twice", "ids are unique")
        if row.id:
            ids.add(row.id)
        if row.session and self._config.jitter_s:
            raise self.file.error_at(
                row, "jitter_s cannot spread sessions: turns wait for each other", "leave jitter_s out"
            )


def jittered(rows: Iterable[TraceRow], span_ns: int, uniforms: Uniforms) -> Iterator[TraceRow]:
    """Rows that share a time stamp, spread uniformly over ``span_ns`` after it; file order is kept among them."""
    moved: list[tuple[int, int, TraceRow]] = []
    for arrival_ns, group in groupby(rows, key=lambda row: row.arrival_ns):
        while moved and moved[0][0] <= arrival_ns:
            yield heappop(moved)[2]
        together = list(group)
        spread = np.sort(uniforms.take(len(together))) * span_ns if len(together) > 1 else [0]
        for row, offset in zip(together, spread, strict=True):
            row = row._replace(arrival_ns=arrival_ns + int(offset))
            heappush(moved, (row.arrival_ns, row.line, row))
    while moved:
        yield heappop(moved)[2]


class RowPrompts:
    """Makes the prompts and ids of a trace's rows."""

    def __init__(self, window: TraceWindow, seed: int) -> None:
        self._name = window.path.name
        self._block_tokens = window.file.format.block_tokens
        self._seed = seed
        self._numbers = count()

    def rid(self, row: TraceRow) -> str:
        """The row's own id, else one of its session and turn, else the next number. Call once for each row sent."""
        if row.id:
            return row.id
        return f"s{row.session}.t{row.turn}" if row.session else f"r{next(self._numbers)}"

    def segments(self, row: TraceRow, rid: str) -> list[Segment]:
        """The whole prompt: blocks or the shared prefix, then text of its own."""
        shared = [Segment(stream_key("block", self._name, block), 0, self._block_tokens) for block in row.hash_ids]
        if row.prefix_id:
            shared = [Segment(stream_key("prefix", self._name, row.prefix_id), 0, row.prefix_tokens)]
        shared = cut(shared, row.prompt_tokens)
        own = row.prompt_tokens - sum(segment.length for segment in shared)
        return merged([*shared, fresh(self._seed, rid, own)])


class RowRequests:
    """Rows of a trace, in order, for somebody else's arrival times."""

    def __init__(self, window: TraceWindow, terms: Terms, seed: int) -> None:
        self._rows = iter(window)
        self._window = window
        self._prompts = RowPrompts(window, seed)
        self._terms = terms

    def open(self, arrival_ns: int, iteration: int = -1) -> TimedRequest | None:
        """The next row; None at the end of the window."""
        row = next(self._rows, None)
        if row is None:
            return None
        rid = self._prompts.rid(row)
        prompt = Prompt(self._prompts.segments(row, rid))
        return self._terms.request(
            arrival_ns, rid, prompt, row.output_tokens, tenant=row.tenant, priority=row.priority, iteration=iteration
        )

    def reply(self, rid: str, now_ns: int, output_ids: NDArray[np.int32]) -> TimedRequest | None:
        """Nothing follows."""
        return None

    def notes(self) -> list[str]:
        """What the window left out."""
        return self._window.notes()


@dataclass(slots=True)
class _Session:
    busy: bool = False
    """A turn is under way, or on its way."""
    over: bool = False
    ended_ns: int = NO_TIME
    """When the last turn ended."""
    waiting: deque[TraceRow] = field(default_factory=deque)
    prompt: Prompt | TokenPrompt = Prompt(())  # noqa: RUF009 (immutable)
    """Of the turn under way; then with its output: what the next turn repeats."""


class TraceReplay:
    """A trace at its own times, a turn of a session never before the turn before it has ended.

    A turn arrives at the later of its recorded time and the end of the turn before plus ``think_s`` (0 where the
    trace does not say): a server slower than the recorded one delays the session, a faster one does not hurry it.
    """

    def __init__(self, window: TraceWindow, terms: Terms, *, seed: int, vocab_size: int, until_ns: int | None) -> None:
        self._window = window
        self._terms = terms
        self._seed = seed
        self._vocab_size = vocab_size
        self._until_ns = until_ns
        self._prompts = RowPrompts(window, seed)
        self._keeps_history = window.file.format.block_tokens == 0
        self._sessions: dict[str, _Session] = {}
        self._session_of: dict[str, _Session] = {}
        self._broken = self._late = 0

    def start(self) -> Iterator[TimedRequest]:
        """See ``Workload``. Turns whose predecessor is under way are kept back for ``on_finish``."""
        delayed: list[tuple[int, int, TraceRow]] = []
        for row in self._window:
            if self._is_over(row.arrival_ns):
                break
            while delayed and delayed[0][0] <= row.arrival_ns:
                arrival_ns, _, late = heappop(delayed)
                yield self._send(late, arrival_ns)
            if not row.session:
                yield self._send(row, row.arrival_ns)
                continue
            session = self._sessions.setdefault(row.session, _Session())
            if session.over:
                self._broken += 1
            elif session.busy:
                session.waiting.append(row)
            else:
                session.busy = True
                arrival_ns = self._arrival(session, row)
                if arrival_ns > row.arrival_ns:
                    heappush(delayed, (arrival_ns, row.line, row))
                else:
                    yield self._send(row, arrival_ns)
        while delayed:
            arrival_ns, _, late = heappop(delayed)
            if self._is_over(arrival_ns):
                self._late += 1
            else:
                yield self._send(late, arrival_ns)

    def on_finish(self, rid: str, now_ns: int, output_ids: NDArray[np.int32]) -> Sequence[TimedRequest]:
        """See ``Workload``: the next turn of the session, if it has been read by now."""
        session = self._session_of.pop(rid, None)
        if session is None:
            return ()
        session.busy, session.ended_ns = False, now_ns
        if len(output_ids) == 0:
            session.over = True
            self._broken += len(session.waiting)
            session.waiting.clear()
            return ()
        if self._keeps_history:
            session.prompt = said(session.prompt, self._seed, rid, output_ids, self._vocab_size)
        if not session.waiting:
            return ()
        row = session.waiting.popleft()
        arrival_ns = self._arrival(session, row)
        if self._is_over(arrival_ns):
            self._late += 1 + len(session.waiting)
            session.waiting.clear()
            return ()
        session.busy = True
        return (self._send(row, arrival_ns),)

    def expected_requests(self) -> int | None:
        """See ``Workload``."""
        return None if self._until_ns is not None else self._window.scan.rows

    def notes(self) -> list[str]:
        """See ``Workload``."""
        notes = self._window.notes()
        if self._broken:
            notes.append(f"{self._broken} turns were not sent: a turn before them produced nothing")
        if self._late:
            notes.append(f"{self._late} turns were not sent: duration_s was over")
        return notes

    def _is_over(self, now_ns: int) -> bool:
        return self._until_ns is not None and now_ns >= self._until_ns

    @staticmethod
    def _arrival(session: _Session, row: TraceRow) -> int:
        if session.ended_ns == NO_TIME:
            return row.arrival_ns
        return max(row.arrival_ns, session.ended_ns + row.think_ns)

    def _send(self, row: TraceRow, arrival_ns: int) -> TimedRequest:
        rid = self._prompts.rid(row)
        prompt: Prompt | TokenPrompt = Prompt(self._prompts.segments(row, rid))
        if row.session:
            session = self._sessions[row.session]
            said_tokens = len(session.prompt)
            # A prompt shorter than what was said so far: the recorded client has started afresh.
            if self._keeps_history and 0 < said_tokens <= row.prompt_tokens:
                text = fresh(self._seed, rid, row.prompt_tokens - said_tokens)
                prompt = followed_by(session.prompt, [text], self._vocab_size)
            session.prompt = prompt
            self._session_of[rid] = session
        name = f"s{row.session}" if row.session else ""
        return self._terms.request(arrival_ns, rid, prompt, row.output_tokens, name, row.tenant, row.priority)
