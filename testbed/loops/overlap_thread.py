"""The overlapped loop with a thread that launches: the design of SGLang 0.5.1 (specification A.2; the thread's owner is
its ``TpModelWorkerClient``), which in October 2025 gave way to that of ``overlap.py``.

The loop's thread decides and processes, the forward thread launches and samples; one queue leads there, one back. Both
designs take the same decisions, since a result is one step late in either. What differs is when host work is done.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from testbed.batch import Batch, StepResult
from testbed.loops.base import LoopContext


async def event_loop_overlap_thread(loop: LoopContext) -> None:
    """As ``event_loop_overlap``; every launch waits for its turn in the forward thread."""
    forward = ForwardThread(loop)
    result_queue: deque[tuple[Batch, Submitted]] = deque()
    try:
        while True:
            await loop.recv_requests(block=not (loop.scheduler.can_build_batch or result_queue))
            batch = loop.get_next_batch_to_run()
            if batch:
                result_queue.append((batch, await forward.run_batch(batch)))
                if len(result_queue) == 1:
                    await process_dummy_first_batch(loop, forward)
            if len(result_queue) == 2 or (result_queue and not batch):
                await loop.process_batch_result(*result_queue.popleft())
            elif not batch:
                loop.self_check_during_idle()
    finally:
        forward.end()


async def process_dummy_first_batch(loop: LoopContext, forward: ForwardThread) -> None:
    """Behind an empty pipeline there is no result whose processing would announce the masks of the batch just
    submitted, and its thread would wait for them for ever. So a result of nothing is processed."""
    loop.sample()
    await forward.launched()


class ForwardThread:
    """Launches batches beside the loop's thread, in the order in which they are submitted."""

    def __init__(self, loop: LoopContext) -> None:
        self._loop = loop
        self._inputs, self.outputs = loop.threads.channel(), loop.threads.channel()
        self._newest: Submitted | None = None
        loop.threads.start("forward thread", self._run())

    async def run_batch(self, batch: Batch) -> Submitted:
        """Submit; returns without waiting for the launch. A batch with a grammar waits for its masks in its thread:
        the processing of the result before it announces them, whether that one has a grammar or not."""
        loop = self._loop
        if loop.scheduler.forward_sleep_ns:
            await loop.cpu.sleep(loop.scheduler.forward_sleep_ns)
        self._newest = submitted = Submitted(loop, self, batch)
        if batch.has_grammar:
            loop.unsampled = batch, submitted
        self._inputs.send(submitted)
        return submitted

    async def launched(self) -> None:
        """Waits until the newest batch is launched. Processing a result before would compete with the launch for the
        interpreter, and would change tables of the scheduler that the launch reads."""
        assert self._newest is not None
        await self._newest.launch_done.wait()

    async def _run(self) -> None:
        """The thread."""
        while (submitted := await self._inputs.recv()) is not None:
            batch = submitted.batch
            pending = self._loop.executor.launch(batch, batch.has_grammar)
            submitted.launch_done.set()
            if batch.has_grammar:
                await submitted.sampling_info_done.wait()
                pending.sample(submitted.masks)
            self.outputs.send(pending)

    def end(self) -> None:
        """The loop has ended: let the thread end too, even where it waits for masks that will not come."""
        if self._newest is not None:
            self._newest.sample(None)
        self._inputs.send(None)


class Submitted:
    """A batch on its way through the forward thread (see ports.Pending)."""

    def __init__(self, loop: LoopContext, forward: ForwardThread, batch: Batch) -> None:
        self.batch = batch
        self.launch_done = loop.threads.event()
        self.sampling_info_done = loop.threads.event()
        self.masks: NDArray[np.int32] | None = None
        self._forward = forward

    def sample(self, masks: NDArray[np.int32] | None) -> None:
        """The masks are known."""
        self.masks = masks
        self.sampling_info_done.set()

    async def result(self) -> StepResult:
        """The oldest result that is not fetched yet, which is this batch's."""
        pending = await self._forward.outputs.recv()
        await self._forward.launched()
        result: StepResult = await pending.result()
        return result

    def activations(self) -> None:
        """There is no stage behind a loop that overlaps."""
