"""The normal loop: decide, run, wait, process; host and device take turns (specification A.1)."""

from __future__ import annotations

from testbed.loops.base import LoopContext


async def event_loop_normal(loop: LoopContext) -> None:
    """Results are never late: a request that ends in one step is gone before the next is built."""
    while True:
        await loop.recv_requests(block=not loop.scheduler.can_build_batch)
        batch = loop.get_next_batch_to_run()
        if batch:
            pending = await loop.run_batch(batch)
            await loop.process_batch_result(batch, pending)
        else:
            loop.self_check_during_idle()
