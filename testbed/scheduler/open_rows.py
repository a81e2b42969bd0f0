"""Which tokens of a step go on."""

from __future__ import annotations

from collections.abc import Iterator

from testbed.batch import Batch
from testbed.request import Request


def open_rows(batch: Batch) -> Iterator[tuple[int, Request]]:
    """(row, request) of the tokens that ``process_batch_result`` of ``batch`` added to outputs that are not ended by
    them: not those of requests that have ended, or were retracted since the launch.

    Only between ``process_batch_result`` and the next decision.
    """
    for row, (request, _, _, last) in enumerate(batch.prefills):
        if last and request.sampled and not request.pending_prefills and request.finish_reason is None:
            yield row, request
    for row, request in enumerate(batch.decodes, len(batch.prefills)):
        if request.in_running and request.finish_reason is None:
            yield row, request
