"""Each side by itself, message by message: the formulas of its memory (specification G.2), its queues, and what it
refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from testbed.batch import StepResult
from testbed.messages import (
    AbortRequest,
    ControlOutput,
    GenerateRequest,
    GrammarSpec,
    KvChunk,
    KvReceived,
    Pair,
    RoomAsked,
    RoomClosed,
    RoomReserved,
    TokenPrompt,
    chunk_checksum,
    decode_message,
    encode_message,
)
from testbed.request import NEVER
from testbed.scenario.errors import InputError
from testbed.scheduler.disaggregation import DecodeSide, Outgoing, Poll, PrefillSide, Terms
from testbed.scheduler.scheduler import Scheduler
from tests.properties.world import VOCABULARY, engine

P, D = "prefill 0", "decode 0"
TIMEOUT = 1000


def half(role: Any, kv_tokens: int = 1000, **fields: Any) -> Scheduler:
    reserve = fields.pop("reserve", 8)
    terms = Terms(
        role,
        P if role == "prefill" else D,
        epoch=3,
        kv_bytes_per_token=10,
        bootstrap_timeout_ns=TIMEOUT,
        transfer_timeout_ns=TIMEOUT,
        reserved_decode_tokens=reserve,
    )
    return Scheduler(
        engine(**fields), kv_tokens=kv_tokens, context_length=10_000, vocab_size=VOCABULARY, checks="full", terms=terms
    )


def request(room: int, prompt: int = 20, max_new_tokens: int = 10, **fields: Any) -> GenerateRequest:
    tokens = TokenPrompt(np.full(prompt, room, np.int32))
    return GenerateRequest(f"r{room}", tokens, max_new_tokens, pair=Pair(room, P, D), **fields)


def asked(room: int, prompt: int = 20, page_size: int = 1, kv_bytes_per_token: int = 10) -> RoomAsked:
    return RoomAsked(room, P, 1, 0, prompt, page_size, kv_bytes_per_token)


def told(scheduler: Scheduler) -> list[Any]:
    assert scheduler.side is not None
    messages = [out.message for out in scheduler.side.rooms.outgoing]
    scheduler.side.rooms.outgoing.clear()
    return messages


def ends(scheduler: Scheduler) -> list[tuple[str, int]]:
    found = [(ended.rid, ended.status) for ended in scheduler.failed]
    scheduler.failed = []
    return found


def hand(scheduler: Scheduler, *messages: Any, now: int = 0) -> None:
    for message in messages:
        assert scheduler.handle_message(now, message) == []


def decode_side(scheduler: Scheduler) -> DecodeSide:
    assert scheduler.decode_side is not None
    return scheduler.decode_side


def prefill_side(scheduler: Scheduler) -> PrefillSide:
    assert scheduler.prefill_side is not None
    return scheduler.prefill_side


def chunk_of(reserved: RoomReserved, start: int = 0, tokens: int = 20, **fields: Any) -> KvChunk:
    pages = reserved.pages[start : start + tokens]
    chunk = KvChunk(reserved.room, P, 1, 3, index=0, start=start, tokens=tokens, source_pages=pages, pages=pages)
    chunk = replace(chunk, **{"last": True, "token_id": 7, **fields})
    return replace(chunk, checksum=chunk_checksum(chunk))


def reserve(scheduler: Scheduler, room: int, prompt: int = 20, **fields: Any) -> RoomReserved:
    hand(scheduler, request(room, prompt, **fields), asked(room, prompt))
    decode_side(scheduler).process_decode_queue()
    (reserved,) = told(scheduler)
    assert isinstance(reserved, RoomReserved)
    return reserved


def running(scheduler: Scheduler, room: int, prompt: int = 20, **fields: Any) -> None:
    """A request that decodes."""
    hand(scheduler, chunk_of(reserve(scheduler, room, prompt, **fields), 0, prompt))
    side = decode_side(scheduler)
    side.process_prebuilt(side.get_new_prebuilt_batch())
    told(scheduler)


# -- how much memory is given away -------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(2, 60), st.integers(0, 5)), max_size=4),
    st.integers(0, 2),
    st.integers(1, 120),
    st.integers(2, 200),
    st.sampled_from([2, 8, 40]),
    st.sampled_from([150, 240, 400]),
)
def test_admission_is_the_formula_of_the_specification(
    rows: list[tuple[int, int, int]], coming: int, prompt: int, max_new: int, reserve_tokens: int, capacity: int
) -> None:
    """G.2, in so many words: who runs has prompt, limit and outputs; ``coming`` are in the transfer queue."""
    scheduler = half("decode", capacity, reserve=reserve_tokens)
    side = decode_side(scheduler)
    lives: list[list[int]] = []
    held = 0
    for room, (length, limit, steps) in enumerate(rows):
        if held + length + 60 > capacity:
            continue
        side._admits = lambda request: True  # type: ignore[method-assign]
        running(scheduler, room, length, max_new_tokens=limit)
        del side._admits
        lives.append([length, min(limit, capacity), 1])
        held += length
        for _ in range(min(steps, 3)):
            if len(scheduler.running) + held + 20 < capacity:
                batch = scheduler.get_next_batch_to_run(0)
                if batch is None:
                    break
                scheduler.process_batch_result(batch, StepResult(np.zeros(batch.rows, np.int32)))
                for life in lives:
                    life[2] += life[2] < life[1]
                scheduler.running.filter_finished()
                lives = [life for life in lives if life[2] < life[1]]
    for room in range(10, 10 + coming):
        side._admits = lambda request: True  # type: ignore[method-assign]
        if scheduler.memory.allocator.available_tokens > 5:
            reserve(scheduler, room, 5)
        del side._admits
    transfers = len(side.transfer)
    if prompt + 6 >= capacity:
        return
    hand(scheduler, request(99, prompt, max_new), asked(99, prompt))
    limit = min(max_new, scheduler.max_request_tokens - prompt - 1)

    available, r = scheduler.memory.allocator.available_tokens, reserve_tokens
    retractable = sum(life[0] + life[2] for life in lives)
    need_single = max((min(life[1], 4096) + life[0] - retractable for life in lives), default=0)
    allocatable = available - max(r * (len(lives) + transfers), need_single)
    admitted = max(prompt + r, prompt + min(limit, 4096) - retractable) <= allocatable
    nobody = not lives and not transfers
    side.process_decode_queue()
    assert (99 in side.transfer) == (admitted or (nobody and prompt <= available))


def test_a_step_holds_a_reservation_up_only_if_somebody_in_it_has_ended() -> None:
    """Whose pages may be those that are reserved."""
    scheduler = half("decode")
    running(scheduler, 0)
    batch = scheduler.get_next_batch_to_run(0)
    assert batch is not None and scheduler.in_flight == [batch]
    fences = []
    for room in (1, 2):
        hand(scheduler, request(room), asked(room))
        decode_side(scheduler).process_decode_queue()
        fences.append(decode_side(scheduler).rooms.outgoing[-1].fence)
        hand(scheduler, AbortRequest("r0"))
    assert fences == [NEVER, batch.index]


def test_metadata_slots_and_rows_bound_the_transfers() -> None:
    """Twice the running requests have metadata slots; rows are as many and the preallocated ones."""
    scheduler = half("decode", max_running_requests=1)
    assert scheduler.memory.slots.count == 1 + 2 + 2
    for room in range(4):
        hand(scheduler, request(room), asked(room))
    side = decode_side(scheduler)
    side.process_decode_queue()
    assert list(side.transfer) == [0, 1] and list(side.prealloc) == [2, 3] and not side.metadata_slots
    assert half("decode", max_running_requests=64).memory.slots.count == 64 + 2


def test_first_come_first_served_among_those_who_were_asked_for() -> None:
    """Who waits for the other half keeps nobody up; who waits for memory does."""
    scheduler = half("decode", 100, reserve=2)
    side = decode_side(scheduler)
    hand(scheduler, request(0, 10), request(1, 90), request(2, 5), asked(2, 5), asked(1, 90))
    side.process_decode_queue()
    assert list(side.transfer) == [1], "0 is not asked for; 1 is alone; 2 does not fit beside it"
    hand(scheduler, AbortRequest("r1"))
    assert ends(scheduler) == [("r1", 499)]
    side.process_decode_queue()
    assert list(side.transfer) == [2]


def test_a_reserve_that_leaves_no_way_on_is_refused() -> None:
    with pytest.raises(InputError, match="do not let a retracted request go on"):
        half("decode", reserve=1)


# -- the decode side refuses ------------------------------------------------------------------------------------------


def counted(scheduler: Scheduler, why: str) -> int:
    return scheduler.recorder.counters.get(f"refused_{why}", 0)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"epoch": 0}, "old_epoch"),
        ({"to_epoch": 2}, "old_epoch"),
        ({"room": 77}, "unknown"),
        ({"start": 1}, "misplaced"),
        ({"pages": np.arange(20, dtype=np.int32)}, "misplaced"),
    ],
)
def test_chunks_that_are_not_meant_are_refused(fields: dict[str, Any], why: str) -> None:
    scheduler = half("decode")
    hand(scheduler, chunk_of(reserve(scheduler, 5), **fields))
    assert counted(scheduler, why) == 1
    assert 5 in decode_side(scheduler).transfer and not decode_side(scheduler).arrived


def test_a_chunk_counts_once_and_only_with_its_checksum() -> None:
    scheduler = half("decode")
    side = decode_side(scheduler)
    reserved = reserve(scheduler, 5)
    first = chunk_of(reserved, 0, 12, last=False)
    last = chunk_of(reserved, 12, 8, index=1)
    hand(scheduler, replace(first, tokens=13), first, first, replace(last, token_id=8))
    assert counted(scheduler, "corrupt") == 2 and counted(scheduler, "duplicate") == 1
    assert side.transfer[5].state is Poll.TRANSFERRING
    hand(scheduler, last, last)
    assert counted(scheduler, "late") == 1
    assert [arrived.request.rid for arrived in side.arrived] == ["r5"] and told(scheduler) == [KvReceived(5, D, 3, 1)]


def test_chunks_that_are_not_the_prompt_end_the_request() -> None:
    scheduler = half("decode")
    hand(scheduler, chunk_of(reserve(scheduler, 5), 0, 12))
    assert ends(scheduler) == [("r5", 500)]
    assert isinstance(told(scheduler)[0], RoomClosed)


def test_pages_are_set_aside_until_every_chunk_has_come() -> None:
    """Aborted amid a transfer of two chunks, of which one has come: free when the other has, not before."""
    scheduler = half("decode", 100)
    allocator, side = scheduler.memory.allocator, decode_side(scheduler)
    reserved = reserve(scheduler, 5)
    first, last = chunk_of(reserved, 0, 12, last=False), chunk_of(reserved, 12, 8, index=1)
    hand(scheduler, first, AbortRequest("r5"))
    assert ends(scheduler) == [("r5", 499)]
    assert allocator.quarantined_pages == 20 and not scheduler.idle
    hand(scheduler, first)  # twice: it is the same one
    hand(scheduler, RoomClosed(5, P, 1, 3, message="", status=499, chunks=2))
    assert allocator.quarantined_pages == 20
    hand(scheduler, last)
    assert allocator.quarantined_pages == 0 and scheduler.idle and not side.aside
    assert not scheduler.flush_cache() or allocator.free_pages == 100


def test_the_end_of_a_lease_frees_what_nobody_speaks_of() -> None:
    scheduler = half("decode", 100)
    reserve(scheduler, 5)
    hand(scheduler, AbortRequest("r5"))
    assert not scheduler.flush_cache(), "somebody may still write there"
    scheduler.now_ns = TIMEOUT - 1
    decode_side(scheduler).process_decode_queue()
    assert scheduler.memory.allocator.quarantined_pages == 20
    scheduler.now_ns = TIMEOUT
    decode_side(scheduler).process_decode_queue()
    assert scheduler.memory.allocator.quarantined_pages == 0 and scheduler.flush_cache()


def test_a_prefill_engine_that_asks_before_the_request_has_come() -> None:
    """It waits for it; without it, the lease ends, and both it and the request hear so."""
    scheduler = half("decode")
    side = decode_side(scheduler)
    hand(scheduler, asked(4), asked(4), asked(5))
    assert counted(scheduler, "duplicate") == 1
    hand(scheduler, request(4))
    side.process_decode_queue()
    assert list(side.transfer) == [4] and list(side.asks) == [5]
    told(scheduler)
    scheduler.now_ns = TIMEOUT
    side.process_decode_queue()
    assert [(type(message), message.room) for message in told(scheduler)] == [(RoomClosed, 4), (RoomClosed, 5)]
    ends(scheduler)
    hand(scheduler, request(5), now=TIMEOUT + 1)
    assert ends(scheduler) == [("r5", 500)]


@pytest.mark.parametrize(
    ("fields", "what"),
    [({"page_size": 2}, "page size"), ({"kv_bytes_per_token": 9}, "KV bytes"), ({"prompt": 21}, "prompt")],
)
def test_engines_that_do_not_fit_say_so_at_once(fields: dict[str, Any], what: str) -> None:
    scheduler = half("decode")
    hand(scheduler, request(5), asked(5, **fields))
    assert scheduler.failed[0].message.startswith(what)
    assert ends(scheduler) == [("r5", 400)]
    assert [message.status for message in told(scheduler)] == [400]


def test_a_refused_request_is_told_to_the_other_half() -> None:
    """Too long, a full queue, a grammar: the prefill engine does not wait for it (menu E4)."""
    scheduler = half("decode", max_queued_requests=1)
    scheduler.handle_message(0, asked(2, 20))
    for refused in (request(1, 999), request(2, grammar=GrammarSpec("json_object"))):
        (output,) = scheduler.handle_message(0, refused)
        assert output.status == 400
    hand(scheduler, request(3))
    (output,) = scheduler.handle_message(0, request(4))
    assert output.status == 503
    assert [(message.room, message.status) for message in told(scheduler)] == [(1, 400), (2, 400), (4, 503)]


# -- the prefill side -------------------------------------------------------------------------------------------------


def reserved_for(room: int, pages: int = 20) -> RoomReserved:
    return RoomReserved(room, D, 1, 3, np.arange(pages, dtype=np.int32))


def test_a_prompt_waits_for_room_and_for_a_metadata_slot() -> None:
    scheduler = half("prefill", max_running_requests=1)
    side = prefill_side(scheduler)
    for room in range(4):
        hand(scheduler, request(room))
    assert [(message.room, message.prompt_tokens) for message in told(scheduler)] == [(room, 20) for room in range(4)]
    assert all(sender.request.max_new_tokens == 1 for sender in side.senders.values()), "one token, the first"
    side.pop_bootstrapped()
    assert scheduler.waiting == []
    for room in (2, 0, 1, 3):
        hand(scheduler, reserved_for(room))
    side.pop_bootstrapped()
    assert [request.rid for request in scheduler.waiting] == ["r2", "r0"] and not side.metadata_slots
    hand(scheduler, AbortRequest("r2"))
    assert ends(scheduler) == [("r2", 499)]
    side.pop_bootstrapped()
    assert [request.rid for request in scheduler.waiting] == ["r0", "r1"]


def prefilled(scheduler: Scheduler, room: int, prompt: int = 20) -> list[Outgoing]:
    """What is sent until the prompt is computed."""
    side = prefill_side(scheduler)
    hand(scheduler, request(room, prompt), reserved_for(room, scheduler.memory.allocator.pages_for(prompt)))
    side.pop_bootstrapped()
    while side.senders[room].computed_ns < 0:
        batch = scheduler.get_next_batch_to_run(0)
        assert batch is not None
        scheduler.process_batch_result(batch, StepResult(np.full(batch.rows, 7, np.int32), end_ns=50))
    return [out for out in side.rooms.outgoing if isinstance(out.message, KvChunk)]


def test_chunks_are_whole_pages_and_the_last_has_the_metadata() -> None:
    """SGLang's first chunk of 8 - 4 + 1 tokens does not end with a page; what is sent of it does."""
    scheduler = half("prefill", page_size=4, chunked_prefill_size=8, rules={"chunk_align": "page_plus_one"})
    sent = prefilled(scheduler, 5, prompt=22)
    chunks: list[Any] = [out.message for out in sent]
    parts = [(chunk.index, chunk.start, chunk.tokens, chunk.last) for chunk in chunks]
    assert parts == [(0, 0, 4, False), (1, 4, 8, False), (2, 12, 8, False), (3, 20, 2, True)]
    assert [out.size_bytes for out in sent] == [40 * len(chunk.pages) for chunk in chunks]
    assert np.concatenate([chunk.pages for chunk in chunks]).tolist() == list(range(6))
    last = chunks[-1]
    assert last.token_id == 7 and last.spent_ns == 50 and last.checksum == chunk_checksum(last)


def test_the_source_is_free_when_it_is_acknowledged_and_no_earlier() -> None:
    scheduler = half("prefill")
    side = prefill_side(scheduler)
    prefilled(scheduler, 5)
    assert scheduler.cache.protected_tokens == 20
    hand(scheduler, KvReceived(5, D, 0, 3), KvReceived(5, D, 1, 2), KvReceived(6, D, 1, 3))
    assert counted(scheduler, "old_epoch") == 2 and counted(scheduler, "unknown") == 1
    assert scheduler.cache.protected_tokens == 20
    hand(scheduler, KvReceived(5, D, 1, 3), now=80)
    assert ends(scheduler) == [("r5", 200)] and scheduler.cache.protected_tokens == 0
    hand(scheduler, KvReceived(5, D, 1, 3), reserved_for(5))
    assert counted(scheduler, "late") == 2
    assert len(side.metadata_slots) == side.metadata_slots_in_all and not side.rooms.leased


def test_an_abort_waits_for_the_other_sides_word() -> None:
    scheduler = half("prefill")
    prefilled(scheduler, 5)
    told(scheduler)
    hand(scheduler, AbortRequest("r5"), AbortRequest("r5"))
    (closed,) = told(scheduler)
    assert isinstance(closed, RoomClosed) and closed.chunks == 1
    assert ends(scheduler) == [] and scheduler.cache.protected_tokens == 20
    hand(scheduler, RoomClosed(5, D, 1, 3, message="", status=499))
    assert ends(scheduler) == [("r5", 499)] and scheduler.cache.protected_tokens == 0 and told(scheduler) == []


def test_a_higher_epoch_ends_what_the_last_one_had() -> None:
    """And an old message that arrives after it is refused, though the room is open again."""
    scheduler = half("prefill")
    prefilled(scheduler, 5)
    hand(scheduler, request(6), RoomClosed(77, D, 2, 0, message="", status=500))
    assert ends(scheduler) == [("r5", 502)]
    hand(scheduler, RoomClosed(6, D, 1, 3, message="", status=500))
    assert counted(scheduler, "old_epoch") == 1 and 6 in prefill_side(scheduler).senders


def test_a_room_that_was_closed_before_its_request_came() -> None:
    scheduler = half("prefill")
    hand(scheduler, RoomClosed(5, D, 1, 0, message="full", status=503), request(5))
    assert ends(scheduler) == [("r5", 500)] and told(scheduler) == []


# -- messages and engines of another kind ------------------------------------------------------------------------------


def test_messages_travel_and_change_nothing_on_the_way() -> None:
    pages = np.arange(3, dtype=np.int32)
    for message in (
        request(5),
        asked(5),
        reserved_for(5),
        chunk_of(reserved_for(5, 20)),
        KvReceived(1, P, 2, 3),
        RoomClosed(1, P, 2, 3, message="why", status=499, chunks=4),
        KvChunk(1, P, 2, 3, index=0, start=0, tokens=3, source_pages=pages, pages=pages, stopped=True),
    ):
        again = decode_message(encode_message(message))
        assert type(again) is type(message) and encode_message(again) == encode_message(message)
        if isinstance(again, KvChunk):
            assert chunk_checksum(again) == chunk_checksum(message)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(["room", "epoch", "index", "start", "tokens", "token_id", "cached_tokens", "spent_ns"]),
    st.integers(0, 30),
)
def test_every_bit_of_a_chunk_is_in_its_checksum(field: str, bit: int) -> None:
    chunk = chunk_of(reserved_for(5))
    assert chunk_checksum(replace(chunk, **{field: getattr(chunk, field) ^ 1 << bit})) != chunk.checksum


def test_requests_go_to_engines_of_their_kind() -> None:
    whole = Scheduler(engine(), kv_tokens=100, context_length=1000, vocab_size=VOCABULARY)
    (output,) = whole.handle_message(0, request(5))
    assert output.status == 400 and "whole requests" in output.message
    (answer,) = whole.handle_message(0, asked(5))
    assert isinstance(answer, ControlOutput) and not answer.success
    for role in ("prefill", "decode"):
        scheduler = half(role)
        for wrong in (replace(request(5), pair=None), replace(request(5), pair=Pair(5, "x", "y"))):
            (output,) = scheduler.handle_message(0, wrong)
            assert output.status == 400 and "half of requests" in output.message
        hand(scheduler, request(6))
        (output,) = scheduler.handle_message(0, replace(request(6), rid="other"))
        assert output.status == 400 and "belongs to another request" in output.message
        told(scheduler)
        (output,) = scheduler.handle_message(0, request(6))
        assert output.status == 400 and told(scheduler) == [], "the first one goes on"
    hand(half("decode"), KvReceived(1, P, 1, 3))
