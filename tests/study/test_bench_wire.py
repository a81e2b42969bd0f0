"""What goes over the wire of ``testbed bench``, and how its tokens are counted: against naive models."""

from __future__ import annotations

import json
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.messages import GenerateRequest, Prompt
from testbed.study.bench.exchange import Counted, Exchange, Failure
from testbed.study.bench.wire import LINE_MAX_BYTES, EventStream, complaint
from testbed.workload import TimedRequest

QUICK = settings(max_examples=200, deadline=None, derandomize=True)

LINE = st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), max_size=12)
FIELDS = st.one_of(
    LINE.map(lambda text: f"data: {text}"),
    LINE.map(lambda text: f"data:{text}"),
    LINE.map(lambda text: f": {text}"),
    st.sampled_from(["event: x", "id: 7", "retry: 3", "data", "datax: 1", ""]),
    st.just(""),
)


def naive_events(text: str) -> list[str]:
    """The standard's own words, line by line, without a memory between calls."""
    events, data = [], []
    for line in text.replace("\r\n", "\n").split("\n")[:-1]:
        if line == "" and data:
            events.append("\n".join(data))
            data = []
        elif line.startswith("data:"):
            value = line[len("data:") :]
            data.append(value[1:] if value.startswith(" ") else value)
    return events


@QUICK
@given(st.lists(st.tuples(FIELDS, st.sampled_from(["\n", "\r\n"]))), LINE, st.data())
def test_events_do_not_depend_on_how_bytes_are_cut(
    lines: list[tuple[str, str]], tail: str, data: st.DataObject
) -> None:
    text = "".join(line + end for line, end in lines) + tail
    sent = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=20)))
    stream = EventStream()
    pieces = [sent[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
    assert [event.decode() for piece in pieces for event in stream.feed(piece)] == naive_events(text)


def test_a_line_without_an_end_is_refused() -> None:
    stream = EventStream()
    stream.feed(b"data: " + b"x" * (LINE_MAX_BYTES - 6))
    with pytest.raises(ValueError, match="a line of more than"):
        stream.feed(b"x")


def exchange(output_tokens: int = 4) -> Exchange:
    return Exchange(TimedRequest(0, GenerateRequest("r0", Prompt(()), output_tokens), output_tokens))


def tell(one: Exchange, now_ns: int, **event: Any) -> None:
    one.take(json.dumps(event).encode(), now_ns)


CHUNKS = st.lists(st.integers(0, 4), min_size=1, max_size=12)
"""Tokens of each chunk; 0: a chunk without any."""


@QUICK
@given(CHUNKS, st.sampled_from(Counted), st.booleans())
def test_every_token_has_the_time_of_its_chunk(chunks: list[int], how: Counted, known_at_end: bool) -> None:
    one = exchange()
    for place, (tokens, told) in enumerate(zip(chunks, accumulate(chunks), strict=True)):
        choice: dict[str, Any] = {"text": "x" * tokens if how is Counted.CHUNKS else ""}
        usage = {"usage": {"completion_tokens": told}} if how is Counted.USAGE else {}
        if how is Counted.IDS:
            choice["token_ids"] = list(range(tokens))
        tell(one, 10 * place, choices=[choice], **usage)
    tell(one, 500, choices=[{"text": "", "finish_reason": "length"}])
    if known_at_end:
        tell(one, 600, choices=[], usage={"completion_tokens": sum(chunks)})
    times = one.token_times_ns()
    assert one.output_tokens == len(times) and (one.finish_ns, one.finish_reason) == (500, "length")
    arrivals = [10 * place for place, tokens in enumerate(chunks) if tokens]
    if how is not Counted.CHUNKS:
        assert times.tolist() == [10 * place for place, tokens in enumerate(chunks) for _ in range(tokens)]
        assert one.counted is (how if arrivals else None)
    elif not known_at_end:
        assert times.tolist() == arrivals and not one.spread
    else:  # spread: as many as were told, every time a chunk's, first and last where they are known, none crowded
        assert len(times) == sum(chunks) and set(times) <= set(arrivals)
        if arrivals:
            assert (times[0], times[-1]) == (arrivals[0], arrivals[-1] if len(times) > 1 else arrivals[0])
            counts = [int((times == at).sum()) for at in arrivals[1:-1]]
            assert (np.diff(times) >= 0).all() and max(counts, default=0) - min(counts, default=0) <= 1


def test_a_count_that_goes_back_takes_nothing_away() -> None:
    one = exchange()
    for now, told in enumerate((2, 1, 3)):
        tell(one, now, choices=[{"text": "x"}], usage={"completion_tokens": told})
    assert one.token_times_ns().tolist() == [0, 0, 2]


def test_the_last_chunk_may_hold_token_end_and_count_at_once() -> None:
    one = exchange()
    tell(one, 5, choices=[{"text": "x", "finish_reason": "stop"}], usage={"completion_tokens": 1, "prompt_tokens": 9})
    assert (one.token_times_ns().tolist(), one.finish_reason, one.finish_ns) == ([5], "stop", 5)
    assert one.usage is not None and one.usage.prompt_tokens == 9


def test_the_last_count_is_the_one_that_stands_and_nothing_counts_after_done() -> None:
    one = exchange()
    tell(one, 1, choices=[{"text": "x"}], usage={"completion_tokens": 1})
    tell(one, 2, choices=[{"text": "x", "finish_reason": "stop"}], usage={"completion_tokens": 2})
    tell(one, 3, choices=[], usage={"completion_tokens": 2, "prompt_tokens": 9})
    one.take(b"[DONE]", 4)
    tell(one, 5, choices=[], usage={"completion_tokens": 7, "prompt_tokens": 7})
    assert one.usage is not None and (one.usage.prompt_tokens, one.output_tokens) == (9, 2)


@pytest.mark.parametrize(
    ("told", "reason"), [("length", "length"), ("stop", "stop"), ("tool_calls", "stop"), ("abort", "abort")]
)
def test_reasons(told: str, reason: str) -> None:
    one = exchange()
    tell(one, 1, choices=[{"text": "x", "finish_reason": told}])
    assert one.finish_reason == reason and (one.failure is Failure.ABORTED) == (told == "abort")


def test_a_whole_answer_cannot_fail_any_more_and_a_failed_one_gets_no_answer() -> None:
    one = exchange()
    tell(one, 1, choices=[{"text": "x", "finish_reason": "stop"}])
    one.fail(Failure.BROKEN, "late", 2)
    assert (one.failure, one.finish_ns, one.finish_reason) == (None, 1, "stop")
    other = exchange()
    other.fail(Failure.TIMEOUT, "first", 1)
    other.fail(Failure.BROKEN, "second", 2)
    tell(other, 3, choices=[{"text": "x", "finish_reason": "stop"}])
    assert (other.failure, other.message, other.finish_ns, other.tokens) == (Failure.TIMEOUT, "first", 1, 0)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": {"message": "no", "code": 400}}', "no"),
        (b'{"error": "no"}', "no"),
        (b'{"object": "error", "message": "no"}', "no"),
        (b'{"detail": [{"msg": "no"}]}', "[{'msg': 'no'}]"),
        (b"<html>\n  no </html>", "<html> no </html>"),
        (b"\xff", "\N{REPLACEMENT CHARACTER}"),
        (b"", ""),
        (b'{"error":' + b"[" * 5000, '{"error":' + "[" * 291),
        (b"x" * 1000, "x" * 300),
    ],
)
def test_complaints(body: bytes, words: str) -> None:
    assert complaint(body) == words


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_are_an_event_or_a_value_error(data: bytes) -> None:
    one = exchange()
    try:
        one.take(data, 1)
    except ValueError:
        assert not one.ended
