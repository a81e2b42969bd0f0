"""Requests that wait for their grammar: where they count, and where they go."""

from __future__ import annotations

import msgspec
import pytest

from testbed.messages import (
    AbortRequest,
    ControlOutput,
    FlushCache,
    GenerateRequest,
    GetInternalState,
    GrammarReady,
    GrammarSpec,
    Message,
    RequestOutput,
    TokenPrompt,
    decode_message,
    encode_message,
)
from testbed.sampling import SamplingParams
from testbed.scheduler.scheduler import Scheduler
from tests.properties.grammars import Rule
from tests.properties.world import Job, burst, engine, run

SPEC = GrammarSpec("regex", "[a-z]+")


def scheduler(**fields: int) -> Scheduler:
    return Scheduler(engine(**fields), kv_tokens=200, context_length=500, vocab_size=100, checks="full")


def asked(rid: str, spec: GrammarSpec | None = SPEC, **fields: object) -> GenerateRequest:
    return GenerateRequest(rid, TokenPrompt(list(range(8))), 5, grammar=spec, **fields)  # type: ignore[arg-type]


def tell(target: Scheduler, *messages: Message) -> list[RequestOutput | ControlOutput]:
    return [output for message in messages for output in target.handle_message(7, message)]


def only(outputs: list[RequestOutput | ControlOutput]) -> RequestOutput:
    (output,) = outputs
    assert isinstance(output, RequestOutput)
    return output


def test_nothing_is_built_until_it_is_ready() -> None:
    target = scheduler()
    assert tell(target, asked("r")) == []
    assert not target.idle and target.grammar_queue.orders == [(0, SPEC)]
    assert target.get_next_batch_to_run(8) is None
    target.on_idle()
    assert not target.can_build_batch, "a loop would spin"
    assert tell(target, GrammarReady(0)) == [] and target.can_build_batch
    batch = target.get_next_batch_to_run(9)
    assert batch is not None and batch.has_grammar


def test_it_waits_as_if_it_had_waited_in_the_queue() -> None:
    target = scheduler()
    tell(target, asked("a"), asked("b"), asked("c", None), asked("d"))
    tell(target, GrammarReady(3), GrammarReady(0), GrammarReady(1))
    assert [request.rid for request in target.waiting] == ["a", "b", "c", "d"]


def test_it_counts_as_queued() -> None:
    target = scheduler(max_queued_requests=2)
    assert tell(target, asked("a"), asked("b", None)) == []
    assert only(tell(target, asked("c"))).status == 503
    (state,) = tell(target, GetInternalState())
    assert isinstance(state, ControlOutput) and (state.state["compiling"], state.state["waiting"]) == (1, 1)
    (flush,) = tell(target, FlushCache())
    assert isinstance(flush, ControlOutput) and not flush.success


def test_an_error_ends_it() -> None:
    target = scheduler()
    tell(target, asked("a"), asked("b"))
    end = only(tell(target, GrammarReady(0, "no such grammar", 503)))
    assert (end.rid, end.finish_reason, end.message, end.status) == ("a", "error", "no such grammar", 503)
    assert target.grammar_queue.orders[2:] == [(0, None)] and list(target.requests) == ["b"]
    assert tell(target, GrammarReady(0)) == tell(target, GrammarReady(9, "nobody")) == []


def test_an_answer_to_an_aborted_request_is_not_taken_for_the_next_of_that_name() -> None:
    target = scheduler()
    tell(target, asked("a"))
    assert only(tell(target, AbortRequest("a"))).status == 499
    tell(target, asked("a"))
    assert tell(target, GrammarReady(0)) == [] and not target.waiting
    tell(target, GrammarReady(1))
    assert [request.rank for request in target.waiting] == [1]
    assert target.grammar_queue.orders == [(0, SPEC), (0, None), (1, SPEC)]
    assert len(tell(target, AbortRequest(abort_all=True))) == 1 and target.idle and not target.grammar_queue.open


def test_a_minimum_length_is_refused_beside_it() -> None:
    """Its end of sequence may be all that the grammar allows (menu H20)."""
    target = scheduler()
    end = only(tell(target, asked("a", sampling=SamplingParams(min_new_tokens=2))))
    assert end.status == 400 and "min_new_tokens" in end.message and not target.grammar_queue.orders


@pytest.mark.parametrize("message", [asked("a"), GrammarReady(3), GrammarReady(2**61, "why", 503)])
def test_messages_travel(message: Message) -> None:
    again = decode_message(encode_message(message))
    assert again == message or (isinstance(again, GenerateRequest) and again.grammar == SPEC)


@pytest.mark.parametrize("data", [{"kind": "xml"}, {"kind": "regex", "text": 3}, {"kind": "regex", "more": 1}])
def test_other_grammars_are_no_message(data: dict[str, object]) -> None:
    whole = {"type": "GenerateRequest", "rid": "r", "prompt": {"type": "TokenPrompt", "tokens": b""}, "grammar": data}
    with pytest.raises(ValueError, match="grammar"):
        decode_message(msgspec.msgpack.encode(whole))


def test_where_nobody_compiles_it_is_refused() -> None:
    jobs = [*burst(2), Job("asking", grammar=Rule(0, 3).spec())]
    outcome = run(engine(), jobs, paced=True)
    assert outcome.outputs["asking"].status == 400 and "compiles no grammars" in outcome.outputs["asking"].message
