"""What the loops of prefill and decode engines do besides (specification A.4 to A.8)."""

from __future__ import annotations

from testbed.batch import Batch
from testbed.loops.base import LoopContext
from testbed.messages import Timer
from testbed.ports import Stage


def tell_peers(loop: LoopContext) -> None:
    """Send what the other engines are to know. Pages that a launched step may still write to are offered to nobody
    before it has ended."""
    scheduler = loop.scheduler
    assert scheduler.side is not None
    rooms = scheduler.side.rooms
    if rooms.outgoing:
        held = []
        for out in rooms.outgoing:
            if scheduler.in_flight and out.fence >= scheduler.in_flight[0].index:
                held.append(out)
            elif out.size_bytes:
                loop.peers.transfer(out.engine, out.message, out.size_bytes)
            else:
                loop.peers.send(out.engine, out.message)
        rooms.outgoing = held
    for when_ns in scheduler.wakes:
        loop.inbox.post_at(when_ns, Timer("lease"))
    scheduler.wakes.clear()


def pop_bootstrapped(loop: LoopContext) -> None:
    """Requests for which there is room on the other side wait for memory on this one."""
    side = loop.scheduler.prefill_side
    assert side is not None
    side.pop_bootstrapped()
    loop.scheduler.running.is_full = False  # nobody ever decodes here: nothing else would open SGLang's latch
    tell_peers(loop)


def process_decode_queue(loop: LoopContext) -> None:
    """Memory for those who were retracted, then for prompts that are to come."""
    side = loop.scheduler.decode_side
    assert side is not None
    side.process_decode_queue()
    tell_peers(loop)


def process_prebuilt(loop: LoopContext) -> bool:
    """Let requests whose KV is here join the running batch: there is nothing to compute, and their first tokens are
    sent. Whether there were any."""
    side = loop.scheduler.decode_side
    assert side is not None
    taken = side.get_new_prebuilt_batch()
    if not taken:
        return False
    batch, result, ended = side.process_prebuilt(taken)
    loop.cpu.charge(Stage.PROCESS, len(taken), 0, len(ended))
    sent_ns = loop.outbox.send_tokens(batch, result)
    side.prebuilt_sent(batch, ended, sent_ns)
    for request in ended:
        loop.outbox.send(loop.scheduler.output_of(request))
    return True


async def get_next_decode_batch(loop: LoopContext) -> Batch | None:
    """The next decode step, once what it moves between device and host is copied."""
    side = loop.scheduler.decode_side
    assert side is not None
    batch = loop.get_next_batch_to_run()
    if batch:
        batch.prebuilt = side.take_joined()
    if side.moved_tokens:
        await loop.cpu.sleep(side.take_copy_ns())
    return batch
