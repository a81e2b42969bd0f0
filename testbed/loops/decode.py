"""The loops of a decode engine (specification A.7, A.8): it takes KV and never prefills.

A request whose KV has come joins the running batch in an iteration that launches nothing: SGLang's *prebuilt* batch, an
extend without a forward.
"""

from __future__ import annotations

from collections import deque

from testbed.batch import Batch
from testbed.loops.base import LoopContext
from testbed.loops.disaggregation import get_next_decode_batch, process_decode_queue, process_prebuilt, tell_peers
from testbed.ports import Pending


async def event_loop_normal_decode(loop: LoopContext) -> None:
    """Decide, run, wait, process."""
    while True:
        await loop.recv_requests(block=not loop.scheduler.can_build_batch)
        process_decode_queue(loop)
        if process_prebuilt(loop):
            continue
        batch = await get_next_decode_batch(loop)
        if batch:
            await loop.process_batch_result(batch, await loop.run_batch(batch))
        else:
            loop.self_check_during_idle()
        tell_peers(loop)


async def event_loop_overlap_decode(loop: LoopContext) -> None:
    """Launch a step before the result of the one before is looked at. A prebuilt batch has no result to wait for, and
    is never queued."""
    result_queue: deque[tuple[Batch, Pending]] = deque()
    while True:
        await loop.recv_requests(block=not (loop.scheduler.can_build_batch or result_queue))
        process_decode_queue(loop)
        prebuilt = process_prebuilt(loop)
        batch = None if prebuilt else await get_next_decode_batch(loop)
        if batch:
            result_queue.append((batch, await loop.run_batch(batch)))
        if len(result_queue) == 2 or (result_queue and not batch):
            await loop.process_batch_result(*result_queue.popleft())
        elif not (batch or prebuilt):
            loop.self_check_during_idle()
        tell_peers(loop)
