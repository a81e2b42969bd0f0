"""Replies in the shape of OpenAI's, held to the types of its own client, and of SGLang's."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from testbed.server.protocol import native, responses
from testbed.server.protocol.errors import ApiError
from testbed.server.protocol.metrics import ServerMetrics
from testbed.server.protocol.responses import Choice, Head, TokenLogprob, TopToken, Usage
from testbed.server.protocol.tools import ToolCall
from testbed.study.bench.wire import decode_event

HEAD = Head("cmpl-1a", 1_700_000_000, "tiny")
CHAT = Head("chatcmpl-1a", 1_700_000_000, "tiny")
USAGE = Usage(7, 5, 3)
USAGE_CONTENT = {
    "prompt_tokens": 7,
    "completion_tokens": 5,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 3},
}
EURO = "€".encode()
TOKENS = (
    TokenLogprob(1, b"a", None),
    TokenLogprob(2, EURO[:2], -0.5, (TopToken(2, EURO[:2], -0.5), TopToken(1, b"a", -1.5), TopToken(9, b"a", -2.5))),
    TokenLogprob(3, EURO[2:], -math.inf, (TopToken(3, EURO[2:], -math.inf),)),
    TokenLogprob(4, b" b", -1.0, (TopToken(4, b" b", -1.0),)),
)
"""The text "a€ b", whose second character is two tokens."""
CALLS = (ToolCall("f", '{"a": 1}'), ToolCall("g", "{}"))


def read(data: bytes) -> Any:
    """The JSON of one event, or of a body; strictly."""
    assert data.startswith(b"data: ") and data.endswith(b"\n\n") and data.count(b"\n") == 2
    return json.loads(data[6:], parse_constant=lambda text: pytest.fail(text))


def plain(reply: dict[str, Any]) -> Any:
    return json.loads(json.dumps(reply, allow_nan=False))


def test_a_completion() -> None:
    choices = [Choice(0, "a", "stop", matched="x"), Choice(1, "b\n", "length")]
    reply = plain(responses.completion(HEAD, choices, USAGE))
    assert reply == {
        "id": "cmpl-1a",
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "tiny",
        "choices": [
            {"text": "a", "index": 0, "logprobs": None, "finish_reason": "stop", "matched_stop": "x"},
            {"text": "b\n", "index": 1, "logprobs": None, "finish_reason": "length"},
        ],
        "usage": USAGE_CONTENT,
    }
    assert list(reply) == ["id", "object", "created", "model", "choices", "usage"]
    parsed = Completion.model_validate(reply)
    assert parsed.usage is not None and parsed.usage.prompt_tokens_details is not None
    assert parsed.usage.prompt_tokens_details.cached_tokens == 3
    assert [choice.finish_reason for choice in parsed.choices] == ["stop", "length"]


def test_the_stream_of_a_completion() -> None:
    nothing = responses.usage_field(include=True)
    events = [
        responses.completion_event(HEAD, Choice(0, "é\u2028"), nothing),
        responses.completion_event(HEAD, Choice(0, "", "length"), nothing),
        responses.completion_usage_event(HEAD, USAGE),
    ]
    chunks = [read(event) for event in events]
    for chunk in chunks[1:]:  # OpenAI's own stream has null for the others' finish reason, against its types
        Completion.model_validate(chunk)
    assert [chunk["usage"] for chunk in chunks] == [None, None, USAGE_CONTENT]
    assert chunks[0]["choices"] == [{"text": "é\u2028", "index": 0, "logprobs": None, "finish_reason": None}]
    assert chunks[2]["choices"] == [] and responses.DONE == b"data: [DONE]\n\n"
    assert "usage" not in read(responses.completion_event(HEAD, Choice(0, "a"), responses.usage_field(False)))
    running = read(responses.completion_event(HEAD, Choice(0, "a"), responses.usage_field(True, Usage(7, 1, 3))))
    assert running["usage"]["completion_tokens"] == 1


def test_logprobs_of_a_completion() -> None:
    choices = [Choice(0, "€ b", "stop", logprobs=TOKENS[1:])]
    parsed = Completion.model_validate(plain(responses.completion(HEAD, choices, USAGE))).choices[0].logprobs
    assert parsed is not None
    assert parsed.tokens == ["bytes:\\xe2\\x82", "bytes:\\xac", " b"]
    assert parsed.text_offset == [0, 0, 1]
    assert parsed.token_logprobs == [-0.5, -9999.0, -1.0]
    assert parsed.top_logprobs == [{"bytes:\\xe2\\x82": -0.5, "a": -1.5}, {"bytes:\\xac": -9999.0}, {" b": -1.0}]
    assert list(parsed.top_logprobs[0]) == ["bytes:\\xe2\\x82", "a"]


def test_logprobs_of_an_echo_and_of_a_later_chunk() -> None:
    """Nothing predicts a prompt's first token: OpenAI's API has null there, against its types."""
    echo = read(responses.completion_event(HEAD, Choice(0, "a€ b", logprobs=TOKENS)))["choices"][0]["logprobs"]
    assert echo["token_logprobs"] == [None, -0.5, -9999.0, -1.0] and echo["text_offset"] == [0, 1, 1, 2]
    assert echo["top_logprobs"][0] is None
    bare = TokenLogprob(4, b" b", -1.0)
    later = read(responses.completion_event(HEAD, Choice(0, " b", logprobs=[bare], text_offset=2)))
    assert later["choices"][0]["logprobs"] == {
        "text_offset": [2],
        "token_logprobs": [-1.0],
        "tokens": [" b"],
        "top_logprobs": None,
    }


def test_a_chat() -> None:
    reply = plain(responses.chat(CHAT, [Choice(0, "hi", "stop", matched=5)], USAGE, cached_details=True))
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hi", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "matched_stop": 5,
        }
    ]
    assert (reply["object"], reply["usage"]) == ("chat.completion", USAGE_CONTENT)
    assert reply["sglext"] == {"cached_tokens_details": {"device": 3, "host": 0}}
    assert ChatCompletion.model_validate(reply).choices[0].message.content == "hi"
    assert "sglext" not in responses.chat(CHAT, [], USAGE)


def test_logprobs_of_a_chat() -> None:
    reply = plain(responses.chat(CHAT, [Choice(0, "€ b", "length", logprobs=TOKENS[1:])], USAGE))
    parsed = ChatCompletion.model_validate(reply).choices[0].logprobs
    assert parsed is not None and parsed.content is not None
    assert b"".join(bytes(token.bytes or []) for token in parsed.content).decode() == "€ b"
    assert [token.logprob for token in parsed.content] == [-0.5, -9999.0, -1.0]
    assert [len(token.top_logprobs) for token in parsed.content] == [3, 1, 1]
    assert parsed.content[0].top_logprobs[1].token == "a"


def test_the_stream_of_a_chat() -> None:
    events = [
        responses.chat_first_event(CHAT, 0),
        responses.chat_event(CHAT, Choice(0, "hi", logprobs=TOKENS[3:])),
        responses.chat_event(CHAT, Choice(0, "", "length")),
        responses.chat_usage_event(CHAT, USAGE, cached_details=True),
    ]
    chunks = [read(event) for event in events]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
        assert chunk["object"] == "chat.completion.chunk"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:3]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "hi"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:3]] == [None, None, "length"]
    assert chunks[3]["choices"] == [] and chunks[3]["usage"] == USAGE_CONTENT and "sglext" in chunks[3]
    assert chunks[1]["choices"][0]["logprobs"]["content"][0]["token"] == " b"


def test_token_ids_are_told_where_they_are_wanted() -> None:
    """vLLM's ``token_ids``, which ``testbed bench`` reads too."""
    told = Choice(0, "a", "stop", token_ids=[7, 8])
    replies = (
        plain(responses.completion(HEAD, [told], USAGE)),
        plain(responses.chat(CHAT, [told], USAGE)),
        read(responses.completion_event(HEAD, told)),
        read(responses.chat_event(CHAT, told)),
    )
    assert all(reply["choices"][0]["token_ids"] == [7, 8] for reply in replies)
    assert all(reply["choices"][0]["finish_reason"] == "stop" for reply in replies)
    event = decode_event(responses.completion_event(HEAD, told)[6:])
    assert event.choices[0].token_ids == [7, 8]
    assert "token_ids" not in read(responses.chat_event(CHAT, Choice(0, "a")))["choices"][0]


def test_tool_calls_whole_and_streamed() -> None:
    reply = plain(responses.chat(CHAT, [Choice(2, "", "stop", calls=CALLS)], USAGE))
    choice = ChatCompletion.model_validate(reply).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert choice.message.tool_calls is not None
    whole = [(call.id, call.type, call.function.name, call.function.arguments) for call in choice.message.tool_calls]  # type: ignore[union-attr]
    assert whole == [("call_1a_2_0", "function", "f", '{"a": 1}'), ("call_1a_2_1", "function", "g", "{}")]
    streamed = []
    for event in (
        responses.chat_event(CHAT, Choice(2, "so", calls=CALLS[:1])),
        responses.chat_event(CHAT, Choice(2, "", calls=CALLS[1:], first_call=1)),
        responses.chat_event(CHAT, Choice(2, "", "stop", first_call=2)),
    ):
        chunk = ChatCompletionChunk.model_validate(read(event)).choices[0]
        for call in chunk.delta.tool_calls or []:
            assert call.function is not None
            streamed.append((call.id, call.type, call.function.name, call.function.arguments))
            assert call.index == len(streamed) - 1
    assert streamed == whole and chunk.finish_reason == "tool_calls"
    cut = plain(responses.chat(CHAT, [Choice(0, "", "length", calls=CALLS)], USAGE))
    assert cut["choices"][0]["finish_reason"] == "length"


def test_every_end_has_a_word() -> None:
    words = {reason: responses.finish_reason(reason) for reason in (None, "length", "stop", "abort", "error")}
    assert words == {None: None, "length": "length", "stop": "stop", "abort": "abort", "error": "abort"}


def test_an_error_in_a_stream_is_one_that_the_client_raises() -> None:
    """G9."""
    event = read(responses.error_event(ApiError("It broke.", status=500, code="internal_error")))
    assert event == {"error": {"message": "It broke.", "type": "server_error", "param": None, "code": "internal_error"}}


def test_models() -> None:
    listed = plain(responses.models(["a", "b"], 5, 8192))
    assert listed["object"] == "list" and [entry["id"] for entry in listed["data"]] == ["a", "b"]
    for entry in listed["data"]:
        assert Model.model_validate(entry).owned_by == "testbed" and entry["max_model_len"] == 8192


def test_generate() -> None:
    choice = Choice(0, "a€ b", "stop", matched=4, logprobs=TOKENS[1:])
    reply = plain(native.generate_reply("r", choice, [2, 3, 4], 7, 3, 0.25, TOKENS[:1]))
    assert reply["text"] == "a€ b" and reply["output_ids"] == [2, 3, 4]
    info = reply["meta_info"]
    assert info["finish_reason"] == {"type": "stop", "matched": 4}
    assert [info[name] for name in ("id", "prompt_tokens", "completion_tokens", "cached_tokens")] == ["r", 7, 3, 3]
    assert info["e2e_latency"] == 0.25 and info["input_token_logprobs"] == [[None, 1, None]]
    assert info["output_token_logprobs"] == [[-0.5, 2, None], [-9999.0, 3, None], [-1.0, 4, None]]
    assert info["output_top_logprobs"][0] == [[-0.5, 2, None], [-1.5, 1, None], [-2.5, 9, None]]
    assert info["output_top_logprobs"][2] == [[-1.0, 4, None]] and "input_top_logprobs" not in info
    running = native.generate_reply("r", Choice(0, "a"), [2], 7, 3)
    assert running["meta_info"]["finish_reason"] is None  # type: ignore[index]
    assert read(native.generate_event(running, None)) == plain(running)
    assert read(native.generate_event(running, 3))["index"] == 3
    ended = native.generate_reply("r", Choice(0, "", "length"), [1, 2], 7, 3)["meta_info"]
    assert ended["finish_reason"] == {"type": "length", "length": 2}  # type: ignore[index]
    aborted = native.generate_reply("r", Choice(0, "", "abort", message="aborted", status=499), [], 7, 3)["meta_info"]
    assert aborted["finish_reason"] == {"type": "abort", "message": "aborted", "status_code": 499}  # type: ignore[index]


STATE: dict[str, int | float | str] = {
    "running": 3,
    "waiting": 2,
    "max_total_num_tokens": 1000,
    "free_tokens": 500,
    "evictable_tokens": 300,
    "new_token_ratio": 0.5,
}


def test_what_the_server_says_of_itself() -> None:
    assert native.load([STATE]) == [{"dp_rank": 0, "num_reqs": 5, "num_waiting_reqs": 2, "num_tokens": 200}]
    info = native.server_info({"model_path": "m"}, STATE, "1")
    assert (info["model_path"], info["max_total_num_tokens"], info["version"]) == ("m", 1000, "1")
    assert info["internal_states"] == [STATE]
    assert native.model_info("m", 8)["is_generation"] is True


def test_metrics_have_sglangs_names() -> None:
    metrics = ServerMetrics(CollectorRegistry(), "tiny")
    metrics.first_token(0.02)
    metrics.later_tokens(0.04, 4)
    metrics.later_tokens(0.0, 0)
    metrics.ended("length", 10, 4, 5, 0.06, 0.01)
    metrics.ended("abort", 2, 0, 0, 0.5, None, grammar=True)
    metrics.state(STATE)
    page = metrics.page()
    found, gaps = {}, {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            assert sample.labels["model_name"] == "tiny"
            if sample.name == "sglang:inter_token_latency_seconds_bucket":
                gaps[float(sample.labels["le"])] = sample.value
            if "le" not in sample.labels and not sample.name.endswith("_created"):
                found[sample.name.removeprefix("sglang:")] = sample.value
    assert (gaps[0.0075], gaps[0.01], gaps[0.015], gaps[math.inf]) == (0, 4, 4, 4)
    assert found == pytest.approx(
        {
            "prompt_tokens_total": 12,
            "generation_tokens_total": 5,
            "cached_tokens_total": 4,
            "num_requests_total": 2,
            "num_so_requests_total": 1,
            "num_aborted_requests_total": 1,
            "time_to_first_token_seconds_count": 1,
            "time_to_first_token_seconds_sum": 0.02,
            "inter_token_latency_seconds_count": 4,
            "inter_token_latency_seconds_sum": 0.04,
            "e2e_request_latency_seconds_count": 2,
            "e2e_request_latency_seconds_sum": 0.56,
            "queue_time_seconds_count": 1,
            "queue_time_seconds_sum": 0.01,
            "num_running_reqs": 3,
            "num_queue_reqs": 2,
            "num_used_tokens": 200,
            "token_usage": 0.2,
            "max_total_num_tokens": 1000,
            "new_token_ratio": 0.5,
        }
    )
