"""Grammars through a running server and the ``openai`` package: outputs that match, and what is refused."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.server.serving import Serving

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Lyon", "Oslo", "Turin"]}, "degrees": {"type": "integer", "minimum": -40}},
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
FOR_EVER = {"type": "integer", "multipleOf": 999_983}
"""A schema that takes seconds and hundreds of megabytes to compile."""


@pytest.fixture(params=["tiny", "paced"])
def any_client(request: pytest.FixtureRequest) -> openai.OpenAI:
    client: openai.OpenAI = request.getfixturevalue("tiny_client" if request.param == "tiny" else "client")
    return client


def name_of(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    messages = [{"role": "user", "content": "the weather?"}]
    given = {"max_tokens": 300, "temperature": 0.9, "seed": 3, **fields}
    return client.chat.completions.create(model=name_of(client), messages=messages, **given)  # type: ignore[call-overload]


def weather(text: str) -> None:
    found = json.loads(text)
    assert list(found) == ["city", "degrees"]
    assert found["city"] in ("Lyon", "Oslo", "Turin") and isinstance(found["degrees"], int) and found["degrees"] >= -40


WANTED: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}


def test_a_json_schema(any_client: openai.OpenAI) -> None:
    replies = chat(any_client, response_format=WANTED, n=4).choices
    assert len(replies) == 4 and {choice.finish_reason for choice in replies} <= {"stop", "length"}
    ended = [choice.message.content for choice in replies if choice.finish_reason == "stop"]
    assert ended
    for text in ended:
        weather(text)


def test_a_streamed_json_schema(any_client: openai.OpenAI) -> None:
    for seed in range(5):
        chunks = list(chat(any_client, response_format=WANTED, stream=True, seed=seed))
        if chunks[-1].choices[0].finish_reason == "stop":
            weather("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
            return
    raise AssertionError("none of five ended before its limit")


@pytest.mark.parametrize(
    ("field", "text", "pattern"),
    [
        ("regex", "(red|green|blue), [0-9]{2,5}!", r"(red|green|blue), [0-9]{2,5}!"),
        ("ebnf", 'root ::= "<" [a-f]+ ">" | "none"', r"<[a-f]+>|none"),
    ],
)
def test_a_regex_and_a_grammar(any_client: openai.OpenAI, field: str, text: str, pattern: str) -> None:
    for seed in range(5):
        reply = any_client.completions.create(
            model=name_of(any_client), prompt="say", max_tokens=64, seed=seed, extra_body={field: text}
        ).choices[0]
        if reply.finish_reason == "stop":
            assert re.fullmatch(pattern, reply.text), reply.text
            return
    raise AssertionError("none of five ended before its limit")


def test_json_mode_begins_an_object(any_client: openai.OpenAI) -> None:
    choice = chat(any_client, response_format={"type": "json_object"}, max_tokens=40).choices[0]
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def test_a_forced_tool_is_called(any_client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    for seed in range(5):
        choice = chat(any_client, tools=[tool], tool_choice="required", seed=seed).choices[0]
        if choice.finish_reason == "tool_calls":
            assert choice.message.tool_calls[0].function.name == "weather"
            weather(choice.message.tool_calls[0].function.arguments)
            return
    raise AssertionError("none of five ended before its limit")


BROKEN: list[dict[str, Any]] = [
    {"regex": "("},
    {"regex": r"(a)\1"},
    {"ebnf": "root ::= ("},
    {"ebnf": "(" * 5000},
    {"json_schema": {"type": "nonsense"}},
    {"json_schema": {"$ref": "http://127.0.0.1/"}},
    {"json_schema": {"$ref": "#"}},
    {"json_schema": {"enum": []}},
    {"regex": "a", "ebnf": 'root ::= "a"'},
    {"regex": "a+", "min_tokens": 3},
]


def test_what_is_broken_is_refused_and_nobody_else_is(paced: Serving, client: openai.OpenAI) -> None:
    """Streamed or not; the good ones among them go on."""

    def ask(number: int) -> str:
        body = BROKEN[number % (len(BROKEN) + 1)] if number % (len(BROKEN) + 1) < len(BROKEN) else {"regex": "[ab]{4}"}
        try:
            stream = client.completions.create(
                model=name_of(client), prompt="x", max_tokens=50, stream=True, extra_body={**body, "n": 1}
            )
            return "".join(chunk.choices[0].text for chunk in stream)
        except openai.BadRequestError as error:
            assert error.status_code == 400
            return "refused"

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(66)))
    for number, text in enumerate(found):
        if number % (len(BROKEN) + 1) < len(BROKEN):
            assert text == "refused", BROKEN[number % (len(BROKEN) + 1)]
        else:
            assert re.fullmatch("[ab]{4}", text)
    paced.comes_to_rest()


def test_a_compile_that_never_ends_keeps_nobody_waiting_for_ever(paced: Serving, client: openai.OpenAI) -> None:
    """More of them than there are compilers: each ends with 400, the good one behind them is served (menu H14, H15)."""

    def hopeless(number: int) -> int:
        schema = json.dumps({**FOR_EVER, "title": f"{number}"})
        return paced.request("POST", "/generate", {"text": "x", "sampling_params": {"json_schema": schema}})[0]

    with ThreadPoolExecutor(3) as pool:
        refused = [pool.submit(hopeless, number) for number in range(3)]
        reply = client.completions.create(model=name_of(client), prompt="x", extra_body={"regex": "yes|no"})
        assert reply.choices[0].text in ("yes", "no")
        assert [future.result() for future in refused] == [400] * 3
    paced.comes_to_rest()


def test_a_client_that_leaves_while_its_grammar_is_compiled(paced: Serving) -> None:
    """It is forgotten; nothing is left."""
    for number in range(6):
        schema = json.dumps({**FOR_EVER, "description": f"{number}"})
        body = {"text": "x", "stream": True, "sampling_params": {"json_schema": schema}}
        with paced.streaming("/generate", body, wait=False):
            pass
    state = paced.comes_to_rest()
    while state["compiling"]:
        state = paced.state()
    assert paced.ask("POST", "/generate", {"text": "x", "sampling_params": {"regex": "ok"}})["text"] == "ok"
