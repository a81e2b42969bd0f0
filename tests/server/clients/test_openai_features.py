"""What applications do with the ``openai`` package beyond plain requests: tools, schemas, retries, many at once."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel

from testbed.server.options import OWN_TOKENIZER
from tests.server.serving import CONSTANT, USER_KEY, Serving, oracle_texts, serving

MODEL = "llama-3.1-8b"
TINY = "tiny"
PARAMETERS: Any = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
TIME: Any = {"type": "function", "function": {"name": "time", "parameters": {**PARAMETERS, "required": ["city"]}}}
ASK: Any = [{"role": "user", "content": "What is the weather in Ulm?"}]
CALL = '<tool_call>{{"name": "weather", "arguments": {{"city": "{}", "days": 2}}}}</tool_call>'


class Forecast(pydantic.BaseModel):
    """What a reply is to be."""

    sky: Literal["clear", "cloudy"]
    degrees: Literal[-5, 10, 35]


def known(arguments: str) -> dict[str, Any]:
    """Arguments of a call of ``weather`` or ``time``, as the schema allows them."""
    found: dict[str, Any] = json.loads(arguments)
    assert isinstance(found["city"], str) and len(found["city"]) <= 8
    assert found.get("days", 1) in (1, 2, 3) and set(found) <= {"city", "days"}
    return found


def talking_to(server: Serving, **options: Any) -> openai.OpenAI:
    """A client of a server that asks for no key."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", **options)


# -- log-probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_completions_have_the_older_form_of_logprobs(tiny_client: openai.OpenAI, stream: bool) -> None:
    reply = tiny_client.completions.create(
        model=TINY,
        prompt="hello",
        max_tokens=8,
        temperature=0,
        logprobs=2,
        stream=stream,
        extra_body={"ignore_eos": True},
    )
    choices = [chunk.choices[0] for chunk in (reply if stream else [reply])]
    text = "".join(choice.text for choice in choices)
    parts = [choice.logprobs for choice in choices if choice.logprobs is not None]
    tokens, values, tops, offsets = (
        [value for part in parts for value in getattr(part, name)]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    )
    assert len(tokens) == len(values) == len(tops) == len(offsets) == 8
    assert offsets[0] == 0 and offsets == sorted(offsets) and offsets[-1] <= len(text)
    for token, value, top in zip(tokens, values, tops, strict=True):
        assert 1 <= len(top) <= 2  # tokens of the same text are one key
        assert top[token] == max(top.values()) == pytest.approx(value) and value < 0


# -- tools ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A server whose model knows nothing but calls of ``weather``, in Hermes' form: each token is one, and the fourth
    ends its turn."""
    folder = tmp_path_factory.mktemp("caller")
    words = {CALL.format(f"C{number}"): number for number in range(64)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=CALL.format("C0")))
    tokenizer.decoder = Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copy(OWN_TOKENIZER / "tokenizer_config.json", folder)
    options = (*CONSTANT, "--set", "engine.kv_tokens=20000", "--tokenizer", str(folder), "--output-tokens", "4")
    with serving(folder, *options) as server, talking_to(server, max_retries=0) as client:
        yield client


def test_calls_that_the_model_chose_to_make_are_found(caller: openai.OpenAI) -> None:
    reply = caller.chat.completions.create(model=MODEL, messages=ASK, tools=[WEATHER, TIME])
    choice = reply.choices[0]
    calls = choice.message.tool_calls or []
    assert choice.finish_reason == "tool_calls" and not choice.message.content
    assert [call.function.name for call in calls] == ["weather"] * 3
    assert all(known(call.function.arguments)["days"] == 2 for call in calls)
    assert len({call.id for call in calls}) == 3


def test_the_packages_own_stream_puts_calls_together(caller: openai.OpenAI) -> None:
    with caller.chat.completions.stream(model=MODEL, messages=ASK, tools=[WEATHER]) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    assert [event.name for event in done] == ["weather"] * 3
    assert [event.index for event in done] == [0, 1, 2]
    calls = [call.function.arguments for call in choice.message.tool_calls or []]
    assert [event.arguments for event in done] == calls


def test_a_reply_of_the_function_is_part_of_the_chat(caller: openai.OpenAI) -> None:
    """What an agent does next: the calls and their results go back, and the model goes on."""
    first = caller.chat.completions.create(model=MODEL, messages=ASK, tools=[WEATHER]).choices[0].message
    calls = first.tool_calls or []
    results = [{"role": "tool", "tool_call_id": call.id, "content": "clear"} for call in calls]
    messages: list[Any] = [*ASK, first, *results]
    reply = caller.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER])
    assert reply.choices[0].finish_reason == "tool_calls"


def test_no_tool_is_called_where_none_is_wanted(caller: openai.OpenAI) -> None:
    reply = caller.chat.completions.create(
        model=MODEL,
        messages=ASK,
        tools=[WEATHER],
        tool_choice="none",
    )
    choice = reply.choices[0]
    assert choice.finish_reason == "stop"
    assert not choice.message.tool_calls and (choice.message.content or "").count("<tool_call>") == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_call_that_must_be_made_is_made(
    tiny_client: openai.OpenAI, choice: Any, stream: bool, temperature: float
) -> None:
    arguments: dict[str, Any] = {
        "model": TINY,
        "messages": ASK,
        "tools": [WEATHER, TIME],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 400,
        "temperature": temperature,
        "seed": 3,
    }
    if stream:
        with tiny_client.chat.completions.stream(**arguments) as events:
            for _ in events:
                pass
            made = events.get_final_completion().choices[0]
    else:
        made = tiny_client.chat.completions.create(**arguments).choices[0]
    (call,) = made.message.tool_calls or []
    assert call.function.name == "weather" or choice == "required"
    assert known(call.function.arguments).keys() >= {"city"}
    assert not made.message.content


# -- structured output ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_reply_is_what_its_schema_says(tiny_client: openai.OpenAI, temperature: float) -> None:
    reply = tiny_client.chat.completions.parse(
        model=TINY, messages=ASK, response_format=Forecast, max_tokens=200, temperature=temperature
    )
    choice = reply.choices[0]
    assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Forecast)


def test_a_streamed_reply_is_what_its_schema_says(tiny_client: openai.OpenAI) -> None:
    with tiny_client.chat.completions.stream(
        model=TINY, messages=ASK, response_format=Forecast, max_tokens=200
    ) as events:
        for _ in events:
            pass
        choice = events.get_final_completion().choices[0]
    assert isinstance(choice.message.parsed, Forecast)


def test_a_cut_off_schema_is_the_packages_own_error(tiny_client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        tiny_client.chat.completions.parse(model=TINY, messages=ASK, response_format=Forecast, max_tokens=2)


# -- errors and retries -----------------------------------------------------------------------------------------------


def test_what_nobody_may_do_here_is_permission_denied(tiny: Serving, tiny_client: openai.OpenAI) -> None:
    with pytest.raises(openai.PermissionDeniedError, match="administrators"):
        tiny_client.post(f"{tiny.url}/flush_cache", cast_to=object)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server that holds one request, and lets none wait."""
    memory = ("--set", "engine.kv_tokens=20000", "--set", "engine.max_running_requests=1")
    with serving(tmp_path_factory.mktemp("narrow"), *CONSTANT, *memory, "--max-queued", "0") as server:
        yield server


def endless(client: openai.OpenAI) -> Any:
    stream = client.completions.create(
        model=MODEL, prompt="x", max_tokens=19_000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    return stream


@pytest.mark.parametrize("retries", [0, 1])
def test_a_full_server_is_asked_again_as_often_as_the_client_was_told(narrow: Serving, retries: int) -> None:
    told: list[tuple[int, str | None]] = []
    http = openai.DefaultHttpxClient(
        event_hooks={"response": [lambda reply: told.append((reply.status_code, reply.headers.get("retry-after")))]}
    )
    with talking_to(narrow, max_retries=retries, http_client=http) as client:
        stream = endless(client)
        del told[:]
        with pytest.raises(openai.InternalServerError) as raised:
            client.completions.create(model=MODEL, prompt="y", max_tokens=1)
        stream.close()
    assert raised.value.status_code == 503 and raised.value.type == "service_unavailable_error"
    assert told == [(503, "1")] * (1 + retries)
    narrow.comes_to_rest()


def test_a_retry_that_finds_room_is_served(narrow: Serving) -> None:
    statuses: list[int] = []

    def make_room(reply: Any) -> None:
        statuses.append(reply.status_code)
        if reply.status_code == 503:
            holding.close()
            narrow.comes_to_rest()

    with talking_to(narrow) as other:
        holding = endless(other)
        http = openai.DefaultHttpxClient(event_hooks={"response": [make_room]})
        with talking_to(narrow, max_retries=2, http_client=http) as client:
            reply = client.completions.create(model=MODEL, prompt="y", max_tokens=5, extra_body={"ignore_eos": True})
    assert statuses == [503, 200]
    assert reply.usage is not None and reply.usage.completion_tokens == 5


def test_who_runs_out_of_patience_leaves_nothing_behind(client: openai.OpenAI, paced: Serving) -> None:
    before = paced.aborted()
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(
            model=MODEL, prompt="x", max_tokens=19_000, timeout=1, extra_body={"ignore_eos": True}
        )
    paced.comes_to_rest()
    assert paced.aborted() == before + 1


# -- many at once -----------------------------------------------------------------------------------------------------


async def streamed(client: openai.AsyncOpenAI, name: str, tokens: int) -> tuple[str, str | None]:
    """(text, finish_reason) of a chat."""
    text, reason = "", None
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": name}],
        max_tokens=tokens,
        stream=True,
        extra_body={"ignore_eos": True, "rid": name},
    )
    async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason or reason
    return text, reason


def test_fifty_asynchronous_streams_have_their_own_texts(paced: Serving) -> None:
    lengths = {f"async-{number}": 20 + 3 * number for number in range(50)}

    async def all_of_them() -> list[tuple[str, str | None]]:
        async with openai.AsyncOpenAI(base_url=f"{paced.url}/v1", api_key=USER_KEY, max_retries=0) as client:
            return await asyncio.gather(*(streamed(client, name, tokens) for name, tokens in lengths.items()))

    for (name, tokens), (text, reason) in zip(lengths.items(), asyncio.run(all_of_them()), strict=True):
        assert text in oracle_texts(name, tokens, workers=2)
        assert reason == "length"
    paced.comes_to_rest()


def test_a_cancelled_task_ends_its_request(paced: Serving) -> None:
    async def cancelled() -> None:
        async with openai.AsyncOpenAI(base_url=f"{paced.url}/v1", api_key=USER_KEY, max_retries=0) as client:
            tasks = [asyncio.create_task(streamed(client, f"cancelled-{number}", 19_000)) for number in range(5)]
            while (await asyncio.to_thread(paced.state))["running"] < len(tasks):
                await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    before = paced.aborted()
    asyncio.run(cancelled())
    paced.comes_to_rest()
    assert paced.aborted() == before + 5
