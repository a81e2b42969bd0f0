"""The tokens of a modelled device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from testbed.batch import NO_ROWS, Batch
from testbed.request import ADVANCES, Request
from testbed.tokens import STEP, oracle_key, scale
from testbed.workload.base import TimedRequest

FAR = 1 << 62


class _Rows:
    """What is known of the rows of a running batch until they change."""

    __slots__ = ("ends", "next_end", "rows", "states")

    def __init__(self, rows: Sequence[Request], states: NDArray[np.uint64]) -> None:
        self.rows = rows
        self.states = states
        """uint64 [rows]: each row's state at advance 0."""
        self.ends = NO_ROWS
        """int64 [rows]: the advance that each row ends at; empty where nobody stops early."""
        self.next_end = FAR


class Oracle:
    """A token is a function of request and position alone, so that every mix-up shows. The oracle alone knows true
    output lengths: it lists the rows that end before their ``max_new_tokens``."""

    def __init__(
        self,
        seed: int,
        vocab_size: int,
        slots: int,
        key_of: Callable[[str], int] | None = None,
        stop_at: dict[str, int] | None = None,
    ) -> None:
        """``stop_at``: the ends that another loop's oracle knows, where a request may come to any of them."""
        self._vocab_size = vocab_size
        self._key_of = key_of or (lambda rid: oracle_key(seed, rid))
        self._keys = np.zeros(slots, dtype=np.uint64)
        self.stop_at: dict[str, int] = {} if stop_at is None else stop_at
        """Output index at which a request stops, for those that stop before their max_new_tokens."""
        self._at = _Rows((), np.empty(0, np.uint64))
        """The rows of the last step that had decodes."""
        self._of: dict[int, _Rows] = {}
        """The same of each micro-batch."""

    def expect(self, timed: TimedRequest) -> None:
        """A request was sent: remember where it ends if that is before what the scheduler was told."""
        request = timed.request
        if request.max_new_tokens is None or timed.output_tokens < request.max_new_tokens or not request.ignore_eos:
            self.stop_at[request.rid] = timed.output_tokens - 1
        else:
            self.forget(request.rid)  # an earlier request with this id

    def forget(self, rid: str) -> None:
        """A request has ended: where it would stop need not be kept."""
        self.stop_at.pop(rid, None)

    def result(self, batch: Batch) -> tuple[NDArray[np.int32], tuple[int, ...]]:
        """Token ids, int32 [rows], and the rows that stop."""
        if not batch.decodes:
            return scale(self._prefill_states(batch), self._vocab_size), self._stops(batch)
        if batch.decodes is not self._at.rows:
            self._look_up(batch)
        token_ids = scale(self._at.states + np.uint64(batch.advance * STEP % 2**64), self._vocab_size)
        if batch.prefills:
            token_ids = np.concatenate((scale(self._prefill_states(batch), self._vocab_size), token_ids))
            return token_ids, self._stops(batch)
        return token_ids, self._stops(batch) if batch.advance >= self._at.next_end else ()

    def stops(self, batch: Batch) -> tuple[int, ...]:
        """The rows that stop, where tokens come from elsewhere."""
        if batch.decodes and batch.decodes is not self._at.rows:
            self._look_up(batch)
        return self._stops(batch)

    def next_end(self, rows: Sequence[Request]) -> int:
        """The next advance at which one of ``rows`` ends early; 0 when these are not the rows of the last step."""
        return self._at.next_end if rows is self._at.rows else 0

    def tokens_ahead(self, advance: int, steps: int) -> NDArray[np.int32]:
        """Token ids of the advances after ``advance``, of the rows of the last step: int32 [steps, rows]."""
        ahead = np.arange(advance + 1, advance + 1 + steps, dtype=np.uint64) * np.uint64(STEP)
        return scale(ahead[:, None] + self._at.states, self._vocab_size)

    def _look_up(self, batch: Batch) -> None:
        """Per membership of the running batch: each row's state at advance 0, and the advance it ends at.

        KV of length n holds tokens 0 .. n - 1, so the step that makes it n yields the token with index n of the
        sequence: output number n - prompt_tokens.
        """
        known = self._of.get(batch.advance // ADVANCES)
        if known is not None and known.rows is batch.decodes:
            self._at = known
            return
        for request in batch.prebuilt:
            self._keys[request.slot] = self._shifted_key(request)
        states = self._keys[batch.slots] + batch.start.astype(np.uint64) * np.uint64(STEP)
        self._at = self._of[batch.advance // ADVANCES] = _Rows(batch.decodes, states)
        stop_at = self.stop_at
        if stop_at:
            ends = [r.joined + stop_at[r.rid] - r.old_outputs if r.rid in stop_at else FAR for r in batch.decodes]
            self._at.ends = np.array(ends, dtype=np.int64)
            self._at.next_end = int(self._at.ends.min())

    def _shifted_key(self, request: Request) -> int:
        """A slot's key: shifted, so that a token depends on its place in the sequence."""
        return (self._key_of(request.rid) - STEP * request.prompt_tokens) % 2**64

    def _prefill_states(self, batch: Batch) -> NDArray[np.uint64]:
        """States of the first tokens."""
        states = np.zeros(len(batch.prefills), dtype=np.uint64)
        for row, (request, prefix, new, last) in enumerate(batch.prefills):
            if not last:
                continue
            self._keys[request.slot] = key = self._shifted_key(request)
            states[row] = (key + STEP * (prefix + new)) % 2**64
        return states

    def _stops(self, batch: Batch) -> tuple[int, ...]:
        """Rows whose token is the last of a request that ends early."""
        stops = []
        for row, (request, _, _, last) in enumerate(batch.prefills):
            if last and self.stop_at.get(request.rid, FAR) <= request.old_outputs:
                stops.append(row)
        at = self._at
        if batch.decodes and batch.advance >= at.next_end:
            first = len(batch.prefills)
            stops.extend((np.flatnonzero(at.ends == batch.advance) + first).tolist())
            later = at.ends[at.ends > batch.advance]
            at.next_end = int(later.min()) if len(later) else FAR
        return tuple(stops)
