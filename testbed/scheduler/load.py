"""What a replica tells its router of itself."""

from __future__ import annotations

from testbed.messages import LoadReport
from testbed.scheduler.scheduler import Scheduler


def load_report(scheduler: Scheduler) -> LoadReport:
    """The load now. Whoever drives the loop asks for one after every ``routing.report_every_steps`` processed steps and
    when the loop is about to wait, where there is a router; nobody pays otherwise."""
    memory, compiling = scheduler.memory, scheduler.grammar_queue.compiling
    waiting = len(scheduler.waiting) + len(compiling)
    waiting_tokens = sum([len(request.fill_ids) for request in scheduler.waiting])
    waiting_tokens += sum([len(request.fill_ids) for request in compiling.values()])
    if scheduler.chunked is not None:
        waiting_tokens += len(scheduler.chunked.fill_ids) - scheduler.chunked.kv_tokens
    return LoadReport(
        running=len(scheduler.requests) - waiting,
        waiting=waiting,
        used_tokens=memory.allocator.capacity_tokens - memory.free_and_evictable_tokens,
        waiting_tokens=waiting_tokens,
        steps=scheduler.steps - len(scheduler.in_flight),
        received=scheduler.received + scheduler.recorder.counters.get("refused", 0),
    )
