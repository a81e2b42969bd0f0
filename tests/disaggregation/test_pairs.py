"""The router of pairs, by itself, and who carries what it decides."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from testbed.messages import (
    AbortRequest,
    BatchGenerateRequest,
    FlushCache,
    GenerateRequest,
    Message,
    RequestOutput,
    TokenPrompt,
)
from testbed.routing.pairs import PairRouter, Step
from testbed.runtime.pairs import PairFront
from testbed.runtime.world import World

PREFILLS, DECODES = ["p0", "p1"], ["d0", "d1", "d2"]


def request(rid: str) -> GenerateRequest:
    return GenerateRequest(rid, TokenPrompt(np.arange(5)), 3)


def output(rid: str, status: int = 200, tokens: int = 3) -> RequestOutput:
    reason = "length" if status == 200 else "error"
    return RequestOutput(rid, reason, "", status, 5, 0, np.arange(tokens, dtype=np.int32))


def sent(step: Step) -> tuple[str, str]:
    """The engines that a request went to."""
    assert not step.answers
    (prefill, one), (decode, other) = step.sent
    assert isinstance(one, GenerateRequest) and one == other and one.pair is not None
    assert (one.pair.prefill, one.pair.decode) == (prefill, decode)
    return prefill, decode


def test_pairs_are_drawn_alike_and_rooms_once() -> None:
    router = PairRouter(PREFILLS, DECODES, 7)
    steps = [router.submit(request(f"r{i}")) for i in range(1200)]
    pairs = Counter(map(sent, steps))
    assert len(pairs) == 6 and all(140 < count < 260 for count in pairs.values())
    rooms = [message.pair.room for step in steps for _, message in step.sent[:1]]  # type: ignore[union-attr]
    assert len(set(rooms)) == 1200
    again = PairRouter(PREFILLS, DECODES, 7)
    assert [sent(again.submit(request(f"r{i}"))) for i in range(20)] == [sent(step) for step in steps[:20]]
    assert not {*rooms} & {router._next_room for router in (PairRouter(PREFILLS, DECODES, seed) for seed in range(6))}


def test_the_decode_engines_answer_counts_once() -> None:
    router = PairRouter(PREFILLS, DECODES, 0)
    prefill, decode = sent(router.submit(request("r")))
    other = next(name for name in DECODES if name != decode)
    assert router.ended(prefill, output("r", tokens=1)) == Step([], [])
    assert router.ended(other, output("r")) == Step([], [])
    answer = output("r")
    assert router.ended(decode, answer).answers == [answer]
    assert router.ended(decode, answer) == Step([], [])


def test_a_prefill_half_that_fails_before_its_token_is_the_answer() -> None:
    """The decode half may have been lost; one that has all it needs goes on, though its word was lost."""
    router = PairRouter(PREFILLS, DECODES, 0)
    prefill, decode = sent(router.submit(request("r")))
    late = output("r", 504, tokens=1)
    assert router.ended(prefill, late) == Step([], [])
    failure = output("r", 504, tokens=0)
    step = router.ended(prefill, failure)
    assert step.answers == [failure] and step.sent == [(decode, AbortRequest("r"))]
    assert router.ended(decode, output("r", 499)) == Step([], [])


def test_aborts_go_to_both_halves_and_ids_are_open_once() -> None:
    router = PairRouter(PREFILLS, DECODES, 0)
    prefill, decode = sent(router.submit(request("r")))
    twice = router.submit(request("r"))
    assert not twice.sent and [answer.status for answer in twice.answers] == [400]
    abort = AbortRequest("r")
    assert router.abort(abort).sent == [(prefill, abort), (decode, abort)]
    assert router.abort(AbortRequest("nobody")) == Step([], [])
    everybody = AbortRequest(abort_all=True)
    assert router.abort(everybody).sent == [(name, everybody) for name in [*PREFILLS, *DECODES]]


def test_the_loss_of_an_engine_is_answered() -> None:
    router = PairRouter(PREFILLS, DECODES, 0)
    at = {f"r{i}": sent(router.submit(request(f"r{i}"))) for i in range(40)}
    assert router.lost("p0") == Step([], [])
    step = router.lost("d0")
    mine = [rid for rid, (_, decode) in at.items() if decode == "d0"]
    assert [(answer.rid, answer.status) for answer in step.answers] == [(rid, 502) for rid in mine]
    assert step.sent == [(at[rid][0], AbortRequest(rid)) for rid in mine]
    assert router.lost("d0") == Step([], [])


def test_every_message_of_a_client_goes_where_it_belongs() -> None:
    """The requests of a batch each to a pair of their own, aborts to the pair, what concerns all to all (N 53)."""
    engines = [*PREFILLS, *DECODES]
    users: Any = None  # nobody is answered here
    front = PairFront(PairRouter(PREFILLS, DECODES, 0), engines, World(), users)
    came: dict[str, list[Message]] = {engine: [] for engine in engines}
    front.inboxes = [came[engine].append for engine in engines]
    front.send(BatchGenerateRequest((request("r"), request("s"))))
    for rid in "rs":
        halves = {name: m for name in engines for m in came[name] if isinstance(m, GenerateRequest) and m.rid == rid}
        (pair,) = {half.pair for half in halves.values()}
        assert pair is not None and set(halves) == {pair.prefill, pair.decode}
        front.send(AbortRequest(rid))
        assert {name for name in engines if AbortRequest(rid) in came[name]} == set(halves)
    front.send(FlushCache())
    assert all(messages[-1] == FlushCache() for messages in came.values())
