"""What enters the scheduler, by type (specification E). A bad message is answered, never raised: one request must not
stop the engine for the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from testbed.messages import (
    AbortRequest,
    BatchGenerateRequest,
    ControlOutput,
    FlushCache,
    GenerateRequest,
    GetInternalState,
    GrammarReady,
    KvChunk,
    KvReceived,
    Message,
    RequestOutput,
    RoomAsked,
    RoomClosed,
    RoomReserved,
    SetInternalState,
    SlowDown,
    Timer,
)

if TYPE_CHECKING:
    from testbed.scheduler.scheduler import Scheduler

Outputs = list[RequestOutput | ControlOutput]


def dispatch(scheduler: Scheduler, message: Message) -> Outputs:
    """Hand the message to its handler; a type without one is answered with a failure."""
    handler = HANDLERS.get(type(message))
    if handler is None:
        return [ControlOutput(message, False, f"no handler for {type(message).__name__}")]
    return handler(scheduler, message)


def generate(scheduler: Scheduler, message: GenerateRequest) -> Outputs:
    """Into the waiting queue, or refused."""
    return scheduler.add_request(message)


def batch_generate(scheduler: Scheduler, message: BatchGenerateRequest) -> Outputs:
    """The same as its requests one by one."""
    return [output for request in message.requests for output in scheduler.add_request(request)]


def abort(scheduler: Scheduler, message: AbortRequest) -> Outputs:
    """End one request, or all; the aborted requests' ends are the answer."""
    rids = list(scheduler.requests) if message.abort_all else [message.rid]
    return [output for rid in rids for output in scheduler.abort(rid)]


def grammar_ready(scheduler: Scheduler, message: GrammarReady) -> Outputs:
    """Into the waiting queue, or ended with the grammar's error."""
    return scheduler.grammar_ready(message)


def flush_cache(scheduler: Scheduler, message: FlushCache) -> Outputs:
    """Empty the prefix cache if the engine is fully idle."""
    flushed = scheduler.flush_cache()
    why = "" if flushed else "requests are waiting, running or in flight"
    return [ControlOutput(message, flushed, why)]


def get_internal_state(scheduler: Scheduler, message: GetInternalState) -> Outputs:
    """Queue lengths, pool use and the settings that ``SetInternalState`` may change."""
    memory = scheduler.memory
    state: dict[str, int | float | str] = {
        "running": sum(one.rows for one in scheduler.micro_batches),
        "waiting": len(scheduler.waiting),
        "compiling": len(scheduler.grammar_queue),
        "max_total_num_tokens": memory.allocator.capacity_tokens,
        "free_tokens": memory.allocator.available_tokens,
        "evictable_tokens": memory.cache.evictable_tokens,
        "new_token_ratio": scheduler.new_token_ratio,
        "max_running_requests": scheduler.max_running_requests,
        "steps": scheduler.steps,
    }
    return [ControlOutput(message, True, state=state)]


def set_internal_state(scheduler: Scheduler, message: SetInternalState) -> Outputs:
    """Change ``max_running_requests`` (1 .. the configured number) or ``new_token_ratio`` (0 < r <= 1); all or nothing,
    and the answer says truly which."""
    ranges = {"max_running_requests": (1, scheduler.config.max_running_requests), "new_token_ratio": (1e-9, 1.0)}
    for name, value in message.settings.items():
        if name not in ranges:
            return [ControlOutput(message, False, f"{name!r} cannot be set; these can: {', '.join(ranges)}")]
        low, high = ranges[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            return [ControlOutput(message, False, f"{name} must be between {low:g} and {high:g}, not {value!r}")]
    if "max_running_requests" in message.settings:
        scheduler.max_running_requests = int(message.settings["max_running_requests"])
    if "new_token_ratio" in message.settings:
        scheduler.new_token_ratio = float(message.settings["new_token_ratio"])
    return [ControlOutput(message, True)]


def slow_down(scheduler: Scheduler, message: SlowDown) -> Outputs:
    """Sleep before every launch from now on; 0 or less: no more."""
    scheduler.forward_sleep_ns = max(message.forward_sleep_ns, 0)
    return [ControlOutput(message, True)]


def between_engines(scheduler: Scheduler, message: Message) -> Outputs:
    """For the half of a pair; no other engine has anything to do with rooms."""
    if scheduler.side is None:
        return [ControlOutput(message, False, "this engine is no half of a pair")]
    scheduler.side.handle(message)
    return []


def timer(scheduler: Scheduler, message: Timer) -> Outputs:
    """A timer only wakes the loop."""
    return []


HANDLERS: dict[type, Callable[[Scheduler, Any], Outputs]] = {
    GenerateRequest: generate,
    BatchGenerateRequest: batch_generate,
    AbortRequest: abort,
    GrammarReady: grammar_ready,
    FlushCache: flush_cache,
    GetInternalState: get_internal_state,
    SetInternalState: set_internal_state,
    SlowDown: slow_down,
    Timer: timer,
    RoomAsked: between_engines,
    RoomReserved: between_engines,
    KvChunk: between_engines,
    KvReceived: between_engines,
    RoomClosed: between_engines,
}
