"""Which tokens of a step were kept."""

from __future__ import annotations

from collections.abc import Iterator

from testbed.batch import Batch
from testbed.request import Request


def kept_rows(batch: Batch) -> Iterator[tuple[int, Request]]:
    """(row, request) of the tokens that ``process_batch_result`` of ``batch`` added to an output, the last ones of
    requests that they ended included: not those of requests that had ended before, or were retracted since the launch.

    Only between ``process_batch_result`` and the next decision.
    """
    for row, (request, _, _, last) in enumerate(batch.prefills):
        if last and request.sampled and not request.pending_prefills and _ours(request, batch):
            yield row, request
    for row, request in enumerate(batch.decodes, len(batch.prefills)):
        if request.in_running and _ours(request, batch):
            yield row, request


def _ours(request: Request, batch: Batch) -> bool:
    """Whether the request has not ended, or by a token of this step."""
    return request.finish_reason is None or request.ended_by == batch.index
