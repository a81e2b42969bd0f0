"""The overlapped loop, suspended between two consecutive prefills (specification A.2 "Later", sglang#11856)."""

from __future__ import annotations

from collections import deque

from testbed.batch import Batch
from testbed.loops.base import LoopContext
from testbed.ports import Pending


async def event_loop_overlap_suspended(loop: LoopContext) -> None:
    """As ``event_loop_overlap``, but a prefill directly behind a prefill is launched when the result of the one before
    has been processed.

    Launching a prefill takes long, kernel by kernel. Overlapped, the first tokens of the prefill before it wait for
    that launch; suspended they do not, and the device waits for it.
    """
    result_queue: deque[tuple[Batch, Pending]] = deque()
    while True:
        await loop.recv_requests(block=not (loop.scheduler.can_build_batch or result_queue))
        batch = loop.get_next_batch_to_run()
        if batch and batch.prefills and result_queue and result_queue[0][0].prefills:
            await loop.process_batch_result(*result_queue.popleft())
        if batch:
            result_queue.append((batch, await loop.run_batch(batch)))
        if len(result_queue) == 2 or (result_queue and not batch):
            await loop.process_batch_result(*result_queue.popleft())
        elif not batch:
            loop.self_check_during_idle()
