"""The overlapped loop: launch a batch before the result of the one before it is looked at (specification A.2, in the
form without threads that SGLang took in October 2025)."""

from __future__ import annotations

from collections import deque

from testbed.batch import Batch
from testbed.loops.base import LoopContext
from testbed.ports import Pending


async def event_loop_overlap(loop: LoopContext) -> None:
    """While the device works on batch k, the host processes the result of k - 1, receives, and builds k + 1.

    The price: a request whose last token is in result k - 1 is in batch k already and decodes once more for nothing.
    Where both have a grammar, batch k computes its logits meanwhile and is sampled once result k - 1 is processed
    (see ``LoopContext.run_batch``).
    """
    result_queue: deque[tuple[Batch, Pending]] = deque()
    while True:
        await loop.recv_requests(block=not (loop.scheduler.can_build_batch or result_queue))
        batch = loop.get_next_batch_to_run()
        if batch:
            result_queue.append((batch, await loop.run_batch(batch)))
        if len(result_queue) == 2 or (result_queue and not batch):
            await loop.process_batch_result(*result_queue.popleft())
        elif not batch:
            loop.self_check_during_idle()
