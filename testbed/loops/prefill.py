"""The loops of a prefill engine (specification A.4 to A.6): it computes prompts and never decodes.

What SGLang polls every iteration, the answers and acknowledgements of the other side, are messages here and handled
where messages are: so its last stage, the queue of requests in flight, comes with the next ``recv_requests``.
"""

from __future__ import annotations

from collections import deque

from testbed.batch import Batch
from testbed.loops.base import LoopContext
from testbed.loops.disaggregation import pop_bootstrapped, tell_peers
from testbed.loops.pipeline import PipelineStage, event_loop_pipeline
from testbed.ports import Pending


async def event_loop_normal_prefill(loop: LoopContext) -> None:
    """The KV of a chunk is sent as soon as it is computed."""
    while True:
        await loop.recv_requests(block=not loop.scheduler.can_build_batch)
        pop_bootstrapped(loop)
        batch = loop.get_next_batch_to_run()
        if batch:
            await loop.process_batch_result(batch, await loop.run_batch(batch))
        else:
            loop.self_check_during_idle()
        tell_peers(loop)


async def event_loop_overlap_prefill(loop: LoopContext) -> None:
    """While the device computes chunk k, the KV of chunk k - 1 is sent."""
    result_queue: deque[tuple[Batch, Pending]] = deque()
    while True:
        await loop.recv_requests(block=not (loop.scheduler.can_build_batch or result_queue))
        pop_bootstrapped(loop)
        batch = loop.get_next_batch_to_run()
        if batch:
            result_queue.append((batch, await loop.run_batch(batch)))
        if len(result_queue) == 2 or (result_queue and not batch):
            await loop.process_batch_result(*result_queue.popleft())
        elif not batch:
            loop.self_check_during_idle()
        tell_peers(loop)


async def event_loop_pipeline_prefill(loop: LoopContext) -> None:
    """Each stage sends the KV of its own layers; the first one speaks for all.

    SGLang's stages agree on who is bootstrapped, and on whose transfer has ended, by passing lists round the ring. Here
    both are messages to the first stage, which all others handle in the same slot; an acknowledgement comes once, when
    the other side has every stage's part.
    """
    await event_loop_pipeline(loop, PrefillStage)


class PrefillStage(PipelineStage):
    """A stage of a prefill engine."""

    async def recv_requests(self, block: bool) -> None:
        """See LoopContext."""
        await super().recv_requests(block)
        pop_bootstrapped(self)

    async def process_batch_result(self, batch: Batch, pending: Pending) -> None:
        """See LoopContext."""
        await super().process_batch_result(batch, pending)
        tell_peers(self)
