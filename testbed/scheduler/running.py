"""The running batch as a column store: every request that decodes is a row, and a step costs the same at 1 or 256 rows.

Between two changes of membership the columns are constant. What moves is one number, ``advance``, the count of decode
steps launched: row i holds ``start[i] + advance`` tokens of KV, and finishes with the result of advance
``finish_at[i]``. Columns are replaced, never written to, so a launched batch keeps references as its snapshot.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from testbed.batch import Batch
from testbed.memory import PageAllocator, RequestSlots
from testbed.request import ADVANCES, Request

Column = NDArray[np.int64]
FAR = sys.maxsize


class RunningBatch:
    """Rows in batch order.

    requests: the rows; slots: int64 [n]; start: KV length minus ``advance``; finish_at: the advance whose result is the
    last by length; output_base: where the output before the next goes in the output table (as of the last change).
    """

    def __init__(self, slots: RequestSlots, allocator: PageAllocator, micro_batch: int = 0) -> None:
        """``micro_batch``: whose it is; the first is 0."""
        self._tables = slots
        self._allocator = allocator
        self._page_size = allocator.page_size
        self.advance = micro_batch * ADVANCES
        """Number of the last decode step launched; the first is ``micro_batch * ADVANCES + 1``."""
        self.done = self.advance
        """Number of the last decode step whose result has been processed."""
        self.is_full = False
        """SGLang's ``batch_is_full``; used under ``admission: when_batch_shrinks`` only."""
        self.finished_rows = 0
        """Rows whose request has ended and that the next filter drops."""
        self.requests: list[Request] = []
        self._set_columns(np.empty((5, 0), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.requests)

    def _set_columns(self, columns: NDArray[np.int64]) -> None:
        """``columns``: int64 [5, n], one row a column, so that a change of membership is one operation."""
        self._columns = columns
        self.slots, self.start, self.finish_at, self.output_base, self.ranks = columns
        rows = columns.shape[1]
        self._start_sum = int(self.start.sum()) if rows else 0
        self._start_max = int(self.start.max()) if rows else 0
        self.since = advance = self.advance
        """The advance at the last change of membership."""
        # Where each row's next page id and next output go, as of now: a step writes through a view shifted by the steps
        # since (``table[shift:][base]``), which spares an addition over the rows.
        if self._page_size == 1:
            self._page_base = self.slots * self._tables.page_stride + (self.start + advance)
        self._opening: dict[int, Column] = {}
        later = self.finish_at[self.finish_at > self.done]
        self.next_finish = int(later.min()) if len(later) else FAR
        """No row ends by length with the result of an advance before this one."""

    def _settled_columns(self) -> NDArray[np.int64]:
        """The columns with ``output_base`` as of now."""
        if self.advance != self.since:
            columns = self._columns.copy()
            columns[3] += self.advance - self.since
            return columns
        return self._columns

    # -- membership ---------------------------------------------------------------------------------------------

    def merge(self, requests: list[Request], front: bool = False) -> None:
        """Requests whose prefill was launched join, at the end of the batch or (SGLang's mixed batches) in front."""
        advance, stride = self.advance, self._tables.output_stride
        # The prefill yields one token, so max_new_tokens - 1 decodes remain; earlier outputs count after a retraction.
        rows = [
            (r.slot, len(r.fill_ids) - advance, advance + r.max_new_tokens - r.old_outputs - 1, r.slot * stride, r.rank)
            for r in requests
        ]
        joining = np.array(rows, dtype=np.int64).T
        for request in requests:
            request.joined = advance
            request.in_running = True
        if not self.requests:
            self.requests = list(requests)
            self._set_columns(joining)
            return
        staying = self._settled_columns()
        self.requests = [*requests, *self.requests] if front else [*self.requests, *requests]
        self._set_columns(np.concatenate((joining, staying) if front else (staying, joining), axis=1))

    def keep(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        requests = self.requests
        for request in requests:
            request.in_running = False
        self.requests = kept = [requests[row] for row in rows]
        self.finished_rows = 0
        for request in kept:
            request.in_running = True
            if request.finish_reason is not None:
                self.finished_rows += 1
        self._set_columns(self._settled_columns()[:, np.array(rows, dtype=np.int64)])

    def filter_finished(self) -> bool:
        """Drop the rows of ended requests; whether there were any."""
        if not self.finished_rows:
            return False
        requests = self.requests.copy()
        staying = np.ones(len(requests), dtype=np.bool_)
        for row in range(len(requests) - 1, -1, -1):
            if requests[row].finish_reason is not None:
                requests[row].in_running = False
                staying[row] = False
                del requests[row]
        self.requests = requests
        self.finished_rows = 0
        self._set_columns(self._settled_columns()[:, staying])
        return True

    # -- one step -----------------------------------------------------------------------------------------------

    def rows_opening_a_page(self) -> Column:
        """Rows whose next token is the first of a page: int64 [k] (page size > 1)."""
        phase = self.advance % self._page_size
        rows = self._opening.get(phase)
        if rows is None:
            rows = self._opening[phase] = np.flatnonzero((self.start + phase) % self._page_size == 0)
        return rows

    def pages_needed(self) -> int:
        """Pages that the next decode step takes."""
        return len(self.requests) if self._page_size == 1 else len(self.rows_opening_a_page())

    def take_pages(self) -> NDArray[np.int32]:
        """Give every row room for one more token; returns the new pages, int32 [k]. Raises OutOfPages."""
        advance = self.advance
        if self._page_size == 1:
            pages = self._allocator.alloc(len(self.requests))
            self._tables.pages_flat[advance - self.since :][self._page_base] = pages
        else:
            rows = self.rows_opening_a_page()
            pages = self._allocator.alloc(len(rows))
            if len(rows):
                page = (self.start[rows] + advance) // self._page_size
                self._tables.pages_flat[self.slots[rows] * self._tables.page_stride + page] = pages
        self.advance = advance + 1
        return pages

    def take_pages_of(self, steps: int) -> list[NDArray[np.int32]]:
        """``take_pages`` of ``steps`` steps, with the same pages in the same order."""
        if self._page_size > 1:
            return [self.take_pages() for _ in range(steps)]
        # The free list is a stack: the first step's pages are those on top.
        pages = self._allocator.alloc(steps * len(self.requests)).reshape(steps, -1)[::-1]
        shift = self.advance - self.since
        places = np.arange(shift, shift + steps)[:, None] + self._page_base
        self._tables.pages_flat[places] = pages
        self.advance += steps
        return list(pages)

    def decode_into(self, batch: Batch) -> int:
        """One more token for every row: room for it, and the rows as ``batch``'s decodes. Returns the pages taken."""
        pages = self.take_pages()
        batch.pages.append(pages)
        batch.advance = self.advance
        batch.output_shift = self.advance - self.since
        batch.decodes = self.requests
        batch.ranks = self.ranks
        batch.slots = self.slots
        batch.start = self.start
        batch.finish_at = self.finish_at
        batch.output_base = self.output_base
        return len(pages)

    def context_tokens(self) -> int:
        """KV tokens of all rows."""
        return self._start_sum + len(self.requests) * self.advance

    def context_max(self) -> int:
        """KV tokens of the longest row."""
        return self._start_max + self.advance

    def commit(self, batch: Batch, token_ids: NDArray[np.int32]) -> None:
        """Store the tokens of a decode result, int32 [decodes of the batch].

        Rows of requests that ended meanwhile write one token beyond their end into a slot that may have a new owner:
        harmless, because results are applied in launch order, before the new owner's first token.
        """
        self._tables.outputs_flat[batch.output_shift :][batch.output_base] = token_ids
        self.done = batch.advance

    def store_outputs(self, token_ids: NDArray[np.int32]) -> None:
        """``commit`` of the next len(token_ids) advances at once, before they are launched: int32 [steps, rows]."""
        shift = self.advance + 1 - self.since
        places = np.arange(shift, shift + len(token_ids))[:, None] + self.output_base
        self._tables.outputs_flat[places] = token_ids
        self.done = self.advance + len(token_ids)

    # -- estimates ----------------------------------------------------------------------------------------------

    def remaining_outputs(self, clip: int) -> int:
        """Sum over rows of min(max_new_tokens - outputs known, clip)."""
        remaining = self.finish_at - self.done
        for row in self._not_as_columns_say():
            request = self.requests[row]
            ended = request.finish_reason is not None
            known = len(request.output_ids) if ended else request.outputs_known(self.done)
            remaining[row] = request.max_new_tokens - known
        return int(np.minimum(remaining, clip).sum())

    def _not_as_columns_say(self) -> Iterator[int]:
        """Rows whose known outputs do not follow from ``done``: ended ones (theirs stand still), and those whose first
        token is not known yet, which joined last and so are at an end of the batch."""
        requests = self.requests
        if self.finished_rows:
            yield from (row for row, request in enumerate(requests) if request.finish_reason is not None)
        for order in (range(len(requests)), range(len(requests) - 1, -1, -1)):
            for row in order:
                if requests[row].sampled:
                    break
                yield row
