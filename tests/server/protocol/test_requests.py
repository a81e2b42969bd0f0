"""What requests come to: each field where it belongs, OpenAI's defaults, what real clients send."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from testbed.messages import AbortRequest, GrammarSpec, TextOptions
from testbed.sampling import SamplingParams
from testbed.server.protocol.errors import ApiError
from testbed.server.protocol.generation import Call, Served, check_prompts
from testbed.server.protocol.limits import Limits
from testbed.server.protocol.native import parse_abort
from testbed.server.protocol.tools import ToolUse
from tests.server.protocol.bodies import SERVED, WEATHER, call, one, refusal

RANDOM = SamplingParams(temperature=1.0)
"""OpenAI's default, where the engine's is greedy."""
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def prompts(**fields: Any) -> list[Any]:
    made = [generation.prompt for generation in call("completion", **fields).generations]
    return [prompt if isinstance(prompt, str) else prompt.tolist() for prompt in made]


def test_defaults_are_openais() -> None:
    made = call("completion")
    (generation,) = made.generations
    assert (made.model, made.stream, made.include_usage, made.tools, made.rids) == ("tiny", False, False, None, ())
    assert (generation.max_new_tokens, generation.n, generation.ignore_eos) == (16, 1, False)
    assert generation.sampling == RANDOM and generation.text == TextOptions() and generation.grammar is None
    assert not generation.return_logprob and generation.logprob_start == -1 and generation.add_special_tokens
    assert one("chat").max_new_tokens is None and not one("chat").add_special_tokens
    assert one("generate").max_new_tokens == 128


@pytest.mark.parametrize(
    ("sent", "found"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 4095], [[1, 4095]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [7]], ["a", [7]]),
    ],
)
def test_a_prompt_is_text_or_ids_one_or_many(sent: object, found: list[object]) -> None:
    assert prompts(prompt=sent) == found
    ids = [generation.prompt for generation in call("completion", prompt=[[1], [2]]).generations]
    assert all(isinstance(prompt, np.ndarray) and prompt.dtype == np.int32 for prompt in ids)


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_every_sampling_field_arrives(kind: str) -> None:
    made = call(
        kind,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.25,
        frequency_penalty=-1.5,
        presence_penalty=2,
        repetition_penalty=1.5,
        seed=-(2**63),
        logit_bias={"0": -100, "4095": 1.5},
        stop_token_ids=[3, 4],
        min_tokens=2,
        max_tokens=9,
        n=3,
        ignore_eos=True,
        stop=["x", "yy"],
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        include_stop_str_in_output=True,
        priority=-3,
        extra_key="k",
        cache_salt="s",
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        return_cached_tokens_details=True,
        return_token_ids=True,
        model="alias",
        rid="mine",
        user="me",
    )
    (generation,) = made.generations
    biases = ((0, -100.0), (4095, 1.5))
    expected = SamplingParams(0.5, 7, 0.9, 0.25, -1.5, 2.0, 1.5, 2, biases, -(2**63), (3, 4))
    assert generation.sampling == expected and generation.sampling.problem(SERVED.vocab_size, 9) is None
    assert generation.text == TextOptions(("x", "yy"), True, False, False)
    assert (generation.max_new_tokens, generation.n, generation.ignore_eos) == (9, 3, True)
    assert generation.priority == -3 and generation.extra_key == "s\nk"
    assert made.stream and made.include_usage and made.continuous_usage and made.cached_details and made.token_ids
    assert made.model == "alias" and made.rids == ("mine",)


def test_null_is_the_same_as_absent() -> None:
    names = "max_tokens temperature top_p n stop stream logprobs seed stream_options best_of logit_bias user echo model"
    for kind in ("completion", "chat"):
        nulls = call(kind, **dict.fromkeys(names.split()))
        for made, plain in zip(nulls.generations, call(kind).generations, strict=True):
            assert (made.sampling, made.text, made.max_new_tokens) == (plain.sampling, plain.text, plain.max_new_tokens)
    assert not call("chat", stream=True, stream_options={"include_usage": None}).include_usage
    assert refusal("completion", prompt=None).message == "prompt is required."


def test_stop_may_be_one_string() -> None:
    assert one("completion", stop="ab").text.stop == ("ab",)
    assert one("completion", no_stop_trim=True).text.include_stop


def test_choices_draw_from_seeds_of_their_own() -> None:
    generation = one("completion", seed=7, n=3)
    assert [generation.sampling_of(choice).seed for choice in range(3)] == [7, 8, 9]
    largest = one("completion", seed=2**63 - 1, n=2)
    assert largest.sampling_of(1).problem(SERVED.vocab_size) is None
    assert one("completion", n=2).sampling_of(1).seed is None


def test_logprobs_of_both_protocols() -> None:
    plain = one("completion", logprobs=0)
    assert (plain.return_logprob, plain.top_logprobs, plain.logprob_start) == (True, 0, -1)
    echoed = one("completion", logprobs=5, echo=True)
    assert (echoed.top_logprobs, echoed.logprob_start, echoed.echo) == (5, 0, True)
    assert one("completion", echo=True).logprob_start == -1
    chat = one("chat", logprobs=True, top_logprobs=20)
    assert (chat.return_logprob, chat.top_logprobs) == (True, 20)
    assert not one("chat", logprobs=False).return_logprob
    assert refusal("chat", top_logprobs=2).param == "top_logprobs"
    assert refusal("completion", logprobs=True).message == "logprobs must be an integer."


def test_a_chats_limit_has_two_names() -> None:
    assert one("chat", max_completion_tokens=5).max_new_tokens == 5
    assert one("chat", max_tokens=5, max_completion_tokens=5).max_new_tokens == 5
    assert refusal("chat", max_tokens=4, max_completion_tokens=5).param == "max_tokens"


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_grammars(kind: str) -> None:
    def grammar(**fields: Any) -> GrammarSpec | None:
        return one(kind, **fields).grammar

    wrapped = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    assert grammar(response_format={"type": "text"}) is None
    assert grammar(response_format={"type": "json_object"}) == GrammarSpec("json_object")
    assert grammar(response_format=wrapped) == GrammarSpec("json_schema", json.dumps(SCHEMA))
    assert grammar(json_schema=SCHEMA) == grammar(json_schema=json.dumps(SCHEMA)) == grammar(response_format=wrapped)
    assert grammar(regex="a+") == GrammarSpec("regex", "a+")
    assert grammar(ebnf="root ::= [a-z]") == GrammarSpec("ebnf", "root ::= [a-z]")
    assert "Only one" in refusal(kind, regex="a", ebnf="b").message
    assert "Only one" in refusal(kind, regex="a", response_format={"type": "json_object"}).message
    assert refusal(kind, response_format={"type": "json_schema"}).param == "response_format.json_schema"
    assert refusal(kind, regex="a", ignore_eos=True).param == "ignore_eos"
    assert refusal(kind, regex="a", min_tokens=1, max_tokens=4).param == "min_tokens"


def test_messages_become_one_text() -> None:
    chat = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": "Hi", "name": "a"},
        {"role": "user", "content": ""},
    ]
    text = "<|bos|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>Hi<|end|><|user|><|end|><|assistant|>"
    assert one("chat", messages=chat).prompt == text


def test_tools_are_offered_called_and_answered() -> None:
    asked = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}}
    chat = [
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [asked]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    made = call("chat", messages=chat, tools=[WEATHER])
    prompt = made.generations[0].prompt
    assert isinstance(prompt, str) and json.dumps(WEATHER) in prompt and "<tool_response>sunny" in prompt
    assert '<tool_call>{"name": "weather", "arguments": {"place": "Rome"}}</tool_call><|end|>' in prompt
    assert made.tools == ToolUse(("weather",), "hermes", 128) and made.generations[0].grammar is None


def test_tool_choice() -> None:
    none = call("chat", tools=[WEATHER], tool_choice="none")
    assert none.tools is None and none.generations[0].prompt == call("chat").generations[0].prompt
    assert call("chat", tools=[WEATHER], parallel_tool_calls=False).tools == ToolUse(("weather",), "hermes", 1)
    other = {"type": "function", "function": {"name": "other"}}
    required = call("chat", tools=[WEATHER, other], tool_choice="required")
    grammar = required.generations[0].grammar
    assert grammar is not None and required.tools == ToolUse(("weather", "other"), "forced", 128)
    schema = json.loads(grammar.text)
    assert schema["maxItems"] == 128 and len(schema["items"]["anyOf"]) == 2
    assert schema["items"]["anyOf"][0]["properties"]["arguments"] == WEATHER["function"]["parameters"]
    named = call("chat", tools=[WEATHER, other], tool_choice={"type": "function", "function": {"name": "other"}})
    assert named.tools == ToolUse(("other",), "forced", 1)
    unknown = {"type": "function", "function": {"name": "nobody"}}
    assert refusal("chat", tools=[WEATHER], tool_choice=unknown).param == "tool_choice"
    assert refusal("chat", tool_choice="required").message == "tool_choice needs tools."
    assert refusal("chat", tools=[WEATHER], tool_choice="any").param == "tool_choice"
    forced = {"tools": [WEATHER], "tool_choice": "required"}
    assert "Only one" in refusal("chat", **forced, response_format={"type": "json_object"}).message


def test_generate_takes_one_or_many() -> None:
    made = call("generate", sampling_params={"max_new_tokens": 4, "temperature": 0, "sampling_seed": 3}, rid="r")
    (generation,) = made.generations
    assert generation.sampling == SamplingParams(seed=3) and generation.max_new_tokens == 4
    assert (made.batch, made.rids) == (False, ("r",))
    params = [{"max_new_tokens": 1}, {"max_new_tokens": 2, "n": 2, "regex": "a"}]
    many = call("generate", text=None, input_ids=[[1], [2]], sampling_params=params, rid=["a", "b"])
    assert many.batch and many.rids == ("a", "b")
    assert [generation.max_new_tokens for generation in many.generations] == [1, 2]
    assert many.generations[1].grammar == GrammarSpec("regex", "a")
    shared = call("generate", text=["a", "b"], sampling_params={"max_new_tokens": 5})
    assert [generation.max_new_tokens for generation in shared.generations] == [5, 5]
    assert call("generate", text=["a"]).batch and not call("generate", text=None, input_ids=[5]).batch
    logprobs = one("generate", return_logprob=True, logprob_start_len=0, top_logprobs_num=2)
    assert (logprobs.return_logprob, logprobs.logprob_start, logprobs.top_logprobs) == (True, 0, 2)
    assert one("generate", top_logprobs_num=2).top_logprobs == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input_ids": [1]}, "text"),
        ({"text": None}, "text"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
        ({"text": ["a", "b"], "rid": "x"}, "rid"),
        ({"text": ["a", "b"], "rid": ["x", "x"]}, "rid"),
        ({"sampling_params": {"min_new_tokens": 2, "max_new_tokens": 1}}, "sampling_params.min_new_tokens"),
        ({"sampling_params": {"temperature": "hot"}}, "sampling_params[0].temperature"),
        ({"sampling_params": 3}, "sampling_params[0]"),
        ({"image_data": "http://x"}, "image_data"),
    ],
)
def test_generate_refuses_by_name(fields: dict[str, Any], param: str) -> None:
    assert refusal("generate", **fields).param == param


def test_abort() -> None:
    assert parse_abort(b'{"rid": "r"}', SERVED) == AbortRequest("r")
    assert parse_abort(b'{"rid": "r", "abort_all": true}', SERVED) == AbortRequest("", True)
    with pytest.raises(ApiError, match="rid is required"):
        parse_abort(b"{}", SERVED)


def test_an_unknown_model_is_404() -> None:
    error = refusal("chat", model="gpt-17")
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert "tiny, alias" in error.message and "gpt-17" not in error.message


def test_a_model_without_template_cannot_chat() -> None:
    served = Served(("m",), 4096, 8192)
    assert refusal("chat", served=served).code == "no_chat_template"
    assert call("completion", served=served).model == "m"


def check(made: Call, *tokens: int, served: Served = SERVED) -> None:
    """With prompts of so many tokens."""
    check_prompts([np.zeros(size, np.int32) for size in tokens], made, served)


def test_a_tokenised_prompt_must_fit() -> None:
    check(call("completion", max_tokens=100), 8092)
    with pytest.raises(ApiError) as raised:
        check(call("completion", max_tokens=100), 8093)
    assert raised.value.code == "context_length_exceeded" and "8192" in raised.value.message
    check(call("chat"), 8191)


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        ("completion", {}, "prompt"),
        ("chat", {}, "messages"),
        ("generate", {}, "text"),
        ("generate", {"text": None, "input_ids": [1]}, "input_ids"),
    ],
)
def test_errors_of_a_prompt_name_the_field_that_it_came_in(kind: str, fields: dict[str, Any], param: str) -> None:
    made = call(kind, **fields)
    for prompt in (np.zeros(0, np.int32), np.zeros(8192, np.int32), np.array([1, 4096, 2], np.int32)):
        with pytest.raises(ApiError) as raised:
            check_prompts([prompt], made, SERVED)
        assert raised.value.param == param
    check_prompts([np.array([4095], np.int32)], made, SERVED)


@pytest.mark.parametrize(
    ("kind", "fields", "prompts", "values", "param"),
    [
        ("completion", {"logprobs": 0, "max_tokens": 5}, (10,), 5, "logprobs"),
        ("completion", {"logprobs": 3, "max_tokens": 5, "n": 2}, (10,), 40, "logprobs"),
        ("completion", {"logprobs": 3, "max_tokens": 5, "n": 2, "echo": True}, (10,), 60, "logprobs"),
        ("completion", {"logprobs": 1, "max_tokens": 5, "prompt": ["a", "b"]}, (10, 20), 20, "logprobs"),
        ("chat", {"logprobs": True, "top_logprobs": 2}, (8182,), 30, "logprobs"),
        ("generate", {"return_logprob": True, "logprob_start_len": 4}, (10,), 134, "return_logprob"),
        ("generate", {"return_logprob": True, "sampling_params": {"max_new_tokens": 1}}, (10,), 1, "return_logprob"),
    ],
)
def test_log_probabilities_are_counted_before_anything_is_made_of_them(
    kind: str, fields: dict[str, Any], prompts: tuple[int, ...], values: int, param: str
) -> None:
    """Output tokens times 1 and those beside them, of all choices, and the prompt's behind its beginning."""
    made = call(kind, **fields)
    check(made, *prompts, served=replace(SERVED, limits=Limits(logprob_values=values)))
    if values > 1:
        with pytest.raises(ApiError) as raised:
            check(made, *prompts, served=replace(SERVED, limits=Limits(logprob_values=values - 1)))
        assert raised.value.param == param and str(values) in raised.value.message
    check(call(kind), *prompts[:1], served=replace(SERVED, limits=Limits(logprob_values=1)))


def test_no_output_counts_as_none() -> None:
    """Prompts that are only to be read into the cache are not taken for as many long answers."""
    served = replace(SERVED, context_tokens=2**20)
    assert len(call("generate", served=served, text=["a"] * 2000, sampling_params={"max_new_tokens": 0}).generations)


SGLANG_OAI = {
    "model": "tiny",
    "prompt": "hi",
    "temperature": 0.0,
    "best_of": 1,
    "max_tokens": 8,
    "stream": True,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
    "return_routed_experts": False,
    "return_cached_tokens_details": True,
    "lora_path": None,
}
SGLANG = {
    "text": "hi",
    "sampling_params": {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True},
    "stream": True,
    "stream_options": {"include_usage": True},
    "lora_path": "",
    "return_logprob": False,
    "return_routed_experts": False,
    "logprob_start_len": -1,
}
AIPERF = {
    "model": "tiny",
    "messages": [{"role": "user", "name": "", "content": [{"type": "text", "text": "hi"}]}],
    "max_completion_tokens": 8,
    "stream": True,
    "stream_options": {"include_usage": True},
}
GUIDELLM = {
    "model": "tiny",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    "max_tokens": 8,
    "max_completion_tokens": 8,
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "stop": None,
    "ignore_eos": True,
}


@pytest.mark.parametrize(
    ("kind", "body"),
    [("completion", SGLANG_OAI), ("generate", SGLANG), ("chat", AIPERF), ("chat", GUIDELLM)],
    ids=["sglang-oai", "sglang", "aiperf", "guidellm"],
)
def test_what_benchmark_clients_send(kind: str, body: dict[str, Any]) -> None:
    """Bodies made of the fields that these clients were seen to send."""
    made = call(kind, **body)
    assert made.stream and made.generations[0].max_new_tokens == 8
    assert made.include_usage == (kind != "generate")
