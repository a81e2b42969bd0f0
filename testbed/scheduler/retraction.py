"""When a decode step does not fit: which running requests give their KV back and wait again (specification B.8)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from testbed.batch import Batch
from testbed.request import FinishReason, Request
from testbed.scheduler.disaggregation.rooms import Ending

if TYPE_CHECKING:
    from testbed.scheduler.scheduler import Scheduler

RETRACT_DECODE_STEPS = 20
"""SGLang keeps 20 tokens free for each survivor, and counts 20 future tokens in the new ratio."""


def retract_decode(scheduler: Scheduler, batch: Batch) -> None:
    """Retract until the next step fits. ``batch.retracted`` gets the victims, in order; they wait again, their outputs
    kept as part of what is to be prefilled (in a decode engine: with their KV on the host). The ratio becomes what the
    survivors have generated so far suggests."""
    running, rules = scheduler.running, scheduler.rules
    rows = _order(scheduler)
    opening = np.zeros(len(running), dtype=np.int64)
    opening[running.rows_opening_a_page()] = scheduler.config.page_size
    requests = running.requests

    def wanted() -> int:
        if rules.retract_until == "20_tokens_per_request":
            return RETRACT_DECODE_STEPS * len(rows)
        return int(opening[rows].sum())

    victims: list[Request] = []
    chunked = scheduler.chunked
    if chunked is not None and _is_the_newest(scheduler, chunked):
        scheduler.chunked = None
        _retract(scheduler, chunked)
        victims.append(chunked)
        batch.evicted_tokens += scheduler.memory.make_room(wanted())
    while rows and (not victims or scheduler.memory.allocator.available_tokens < wanted()):
        if len(rows) == 1 and not _the_last_goes(scheduler, int(opening[rows].sum())):
            break
        request = requests[rows.pop()]
        _retract(scheduler, request)
        victims.append(request)
        batch.evicted_tokens += scheduler.memory.make_room(wanted())
    alone = len(rows) == 1 and scheduler.memory.allocator.available_tokens < int(opening[rows].sum())
    running.keep(rows)
    if alone:
        _give_up(scheduler, running.requests[0])
    batch.retracted = victims
    _wait_again(scheduler, victims)
    _new_ratio(scheduler)
    scheduler.recorder.count("retractions", len(victims))


def _the_last_goes(scheduler: Scheduler, wanted: int) -> bool:
    """The last row goes too where somebody else holds what it wants: a half-computed prompt, or other micro-batches,
    whose ends will free it. (It would be retracted again and again for nothing if nobody did, and if it waited in its
    place, the last rows of two micro-batches could wait for each other.)"""
    if scheduler.others_run():
        return scheduler.memory.allocator.available_tokens < wanted
    return scheduler.chunked is not None and not scheduler.rules.can_stall


def _order(scheduler: Scheduler) -> list[int]:
    """Rows with the victims at the end."""
    running = scheduler.running
    rows = list(range(len(running)))
    if scheduler.rules.retract_victim == "newest":
        return sorted(rows, key=lambda row: running.requests[row].rank)
    done, requests = running.done, running.requests
    # Most generated first, ties shortest prompt first; a reversed sort keeps equal rows in batch order.
    return sorted(rows, key=lambda r: (requests[r].outputs_known(done), -requests[r].prompt_tokens), reverse=True)


def _is_the_newest(scheduler: Scheduler, chunked: Request) -> bool:
    """Under ``retract_victim: newest`` the request whose prompt is half computed goes before older ones that decode."""
    youngest = max(request.rank for request in scheduler.running.requests)
    return scheduler.rules.retract_victim == "newest" and chunked.rank > youngest


def _retract(scheduler: Scheduler, request: Request) -> None:
    """Take the request's KV; its known outputs become part of what its next prefill computes."""
    memory = scheduler.memory
    known = scheduler.outputs_known(request)
    fresh = known - request.old_outputs
    outputs = memory.slots.outputs[request.slot, :fresh].copy()
    if fresh > 1:
        request.segments.append((request.joined, fresh - 1))
    scheduler.count_extra_rows([request])
    memory.drop(request, scheduler.allocated_tokens(request))
    if scheduler.decode_side is not None:
        scheduler.decode_side.save(request, outputs)
    else:
        request.fill_ids = np.concatenate((request.fill_ids, outputs)) if fresh else request.fill_ids
        request.old_outputs = known
        request.sampled = False
    request.in_running = False
    request.retractions += 1
    if request.retracted_at_ns < 0:
        request.retracted_at_ns = scheduler.now_ns


def _give_up(scheduler: Scheduler, request: Request) -> None:
    """The last running request does not fit into the whole pool: end it with a reason instead of stopping the
    engine."""
    scheduler.end(request, Ending(FinishReason.ERROR, "the KV pool does not hold this request", 500))
    scheduler.running.filter_finished()


def _wait_again(scheduler: Scheduler, victims: list[Request]) -> None:
    """Back to the queue: to the end as SGLang, or to the place of their arrival."""
    if scheduler.decode_side is not None:
        return  # they wait there
    waiting = scheduler.waiting
    if scheduler.config.retract_to == "back":
        waiting.extend(victims)
        return
    for request in victims:
        insert_by_arrival(waiting, request)


def insert_by_arrival(waiting: list[Request], request: Request) -> None:
    """Put a request in front of those that arrived after it."""
    later = (place for place, other in enumerate(waiting) if other.rank > request.rank)
    waiting.insert(next(later, len(waiting)), request)


def _new_ratio(scheduler: Scheduler) -> None:
    running = scheduler.everybody_running()
    generated = sum(map(scheduler.outputs_known, running))
    most = sum(request.max_new_tokens for request in running)
    ahead = RETRACT_DECODE_STEPS * len(running)
    scheduler.new_token_ratio = min(1.0, (generated + ahead) / most) if most else scheduler.ratio_init
