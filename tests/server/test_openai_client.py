"""The ``openai`` package against a running server: what it sends, and what it makes of the replies."""

from __future__ import annotations

import openai
import pytest

from tests.server.serving import TOKENIZER, Serving, oracle_ids, oracle_texts

MODEL = "llama-3.1-8b"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_a_completion_is_the_oracles_text(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL, prompt="once upon a time", max_tokens=20, extra_body={"ignore_eos": True}
    )
    assert reply.choices[0].text in oracle_texts(reply.id.removeprefix("cmpl-"), 20, workers=2)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None and reply.usage.completion_tokens == 20
    assert reply.usage.prompt_tokens == len(TOKENIZER.encode("once upon a time").ids)


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_a_streamed_completion_is_the_oracles_text_and_ends_with_usage(client: openai.OpenAI, tokens: int) -> None:
    stream = client.completions.create(
        model=MODEL,
        prompt="once",
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].text for chunk in chunks[:-1])
    assert text in oracle_texts(chunks[0].id.removeprefix("cmpl-"), tokens, workers=2)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (tokens - 1) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == tokens


def test_a_chat_is_answered_by_the_assistant(client: openai.OpenAI) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    reply = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_completion_tokens=9,
        extra_body={"ignore_eos": True},  # type: ignore[arg-type]
    )
    choice = reply.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content in oracle_texts(reply.id.removeprefix("chatcmpl-"), 9, workers=2)


def test_a_streamed_chat_begins_with_the_role(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=5,
            stream=True,
            extra_body={"ignore_eos": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text in oracle_texts(chunks[0].id.removeprefix("chatcmpl-"), 5, workers=2)


def test_n_choices_of_batched_prompts_are_numbered_as_openai_does(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL, prompt=["one", "two"], n=4, max_tokens=6, extra_body={"ignore_eos": True}
    )
    name = reply.id.removeprefix("cmpl-")
    names = [own if choice == 0 else f"{own}:{choice}" for own in (name, f"{name}-1") for choice in range(4)]
    assert [choice.index for choice in reply.choices] == list(range(8))
    for choice, own in zip(reply.choices, names, strict=True):
        assert choice.text in oracle_texts(own, 6, workers=2)
    assert reply.usage is not None
    prompts = sum(len(TOKENIZER.encode(prompt).ids) for prompt in ("one", "two"))
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (prompts, 48)


def test_streamed_choices_are_told_apart(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="x", n=4, max_tokens=7, stream=True, extra_body={"ignore_eos": True}
    )
    texts, name = [""] * 4, ""
    for chunk in stream:
        name = chunk.id.removeprefix("cmpl-")
        texts[chunk.choices[0].index] += chunk.choices[0].text
    for index, text in enumerate(texts):
        assert text in oracle_texts(name if index == 0 else f"{name}:{index}", 7, workers=2)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text_and_the_request(
    client: openai.OpenAI, paced: Serving, stream: bool, include: bool
) -> None:
    """The client chooses the id, so what the oracle will say is known, and a stop string can be cut from its middle."""
    name = f"stopped-{stream}-{include}"
    texts = oracle_texts(name, 60, workers=2)
    stop = [text[40:44] for text in texts]
    extra = {"ignore_eos": True, "include_stop_str_in_output": include, "rid": name}
    reply = client.completions.create(
        model=MODEL,
        prompt="x",
        max_tokens=60,
        stop=stop,
        stream=stream,
        extra_body=extra,  # type: ignore[call-overload]
    )
    chunks = list(reply) if stream else [reply]
    text = "".join(chunk.choices[0].text for chunk in chunks)
    wanted = []
    for whole in texts:
        at, found = min((whole.find(one), one) for one in stop if one in whole)
        wanted.append(whole[: at + len(found) * include])
    assert text in wanted
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].choices[0].model_extra["matched_stop"] in stop
    paced.comes_to_rest()


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_token_ends_the_request_and_has_no_text(client: openai.OpenAI, stream: bool) -> None:
    name = f"stop-token-{stream}"
    ids = [oracle_ids(f"{worker}:{name}", 30) for worker in range(2)]
    last = [own[12] for own in ids]
    ends = [min(own.index(token) for token in last if token in own) for own in ids]
    wanted = [TOKENIZER.decode(own[:end]) for own, end in zip(ids, ends, strict=True)]
    reply = client.completions.create(
        model=MODEL,
        prompt="x",
        max_tokens=30,
        stream=stream,
        extra_body={"ignore_eos": True, "stop_token_ids": last, "rid": name},
    )  # type: ignore[call-overload]
    chunks = list(reply) if stream else [reply]
    assert "".join(chunk.choices[0].text for chunk in chunks) in wanted
    assert chunks[-1].choices[0].model_extra["matched_stop"] in last


def test_errors_are_the_packages_own_classes(client: openai.OpenAI, paced: Serving) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=MODEL, prompt="x", temperature=3)
    with pytest.raises(openai.NotFoundError, match="model"):
        client.completions.create(model="gpt-9", prompt="x")
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model=MODEL, prompt="x", max_tokens=1_000_000)
    stranger = openai.OpenAI(base_url=f"{paced.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.NotFoundError, match="not supported"):
        client.embeddings.create(model=MODEL, input="x")


def test_closing_a_stream_ends_the_request(client: openai.OpenAI, paced: Serving) -> None:
    before = paced.aborted()
    stream = client.completions.create(
        model=MODEL, prompt="x", max_tokens=19_000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert paced.state()["running"] == 1
    stream.close()
    paced.comes_to_rest()
    assert paced.aborted() == before + 1


def test_the_tiny_model_says_the_same_streamed_or_not(tiny_client: openai.OpenAI) -> None:
    def said(stream: bool) -> str:
        reply = tiny_client.completions.create(
            model="tiny", prompt="hello", max_tokens=24, temperature=0, stream=stream
        )  # type: ignore[call-overload]
        return "".join(chunk.choices[0].text for chunk in (reply if stream else [reply]))

    assert said(False) == said(True) != ""


def test_logprobs_belong_to_the_tokens(tiny_client: openai.OpenAI) -> None:
    def told(stream: bool) -> list[tuple[str, float, list[str]]]:
        reply = tiny_client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=6,
            temperature=0,
            logprobs=True,
            top_logprobs=3,
            stream=stream,
        )  # type: ignore[call-overload]
        found = [chunk.choices[0].logprobs for chunk in (reply if stream else [reply])]
        tokens = [token for part in found if part is not None for token in part.content]
        return [(token.token, token.logprob, [top.token for top in token.top_logprobs]) for token in tokens]

    whole = told(False)
    assert len(whole) == 6
    assert all(token == top[0] and len(top) == 3 and logprob < 0 for token, logprob, top in whole)
    assert [(token, top) for token, _, top in told(True)] == [(token, top) for token, _, top in whole]


def test_an_echo_has_the_prompts_logprobs(tiny_client: openai.OpenAI) -> None:
    reply = tiny_client.completions.create(
        model="tiny", prompt="hello there", max_tokens=3, echo=True, logprobs=1, temperature=0
    )
    choice = reply.choices[0]
    assert choice.text.startswith("hello there") and choice.logprobs is not None
    prompt = len(TOKENIZER.encode("hello there").ids)
    values = choice.logprobs.token_logprobs
    assert values is not None and len(values) == prompt + 3
    assert values[0] is None and all(value is not None and value <= 0 for value in values[1:])


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_come_beside_the_text(client: openai.OpenAI, stream: bool) -> None:
    """vLLM's ``return_token_ids``, in one piece and in a stream, up to what a stop string leaves."""
    stop = [text[20:23] for text in oracle_texts("a", 30, 2)]  # whichever worker has it
    for asked in ({"rid": "a"}, {"rid": "a", "stop": stop}):
        extra = {"ignore_eos": True, "return_token_ids": True, **asked}
        reply = client.completions.create(model=MODEL, prompt="x", max_tokens=30, stream=stream, extra_body=extra)
        choices = [chunk.choices[0] for chunk in reply] if stream else [reply.choices[0]]
        ids = [token for choice in choices for token in (choice.model_extra or {})["token_ids"]]
        text = "".join(choice.text for choice in choices)
        assert ids in [oracle_ids(f"{worker}:a", len(ids)) for worker in range(2)]
        assert (len(ids) == 30) == ("stop" not in asked) and TOKENIZER.decode(ids).startswith(text)
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=9,
        n=2,
        extra_body={"ignore_eos": True, "return_token_ids": True, "rid": "c"},
    )
    for index, one in enumerate(chat.choices):
        name = f"c:{index}" if index else "c"
        assert one.model_extra and one.model_extra["token_ids"] in [oracle_ids(f"{w}:{name}", 9) for w in range(2)]


def test_a_reply_with_many_logprobs_is_as_one_with_few(tiny_client: openai.OpenAI) -> None:
    """It is written in a thread, so that others do not wait."""
    few, many = (
        tiny_client.completions.create(
            model="tiny", prompt="say", max_tokens=tokens, logprobs=20, temperature=0, extra_body={"ignore_eos": True}
        ).choices[0]
        for tokens in (4, 60)
    )
    assert few.logprobs and many.logprobs and few.logprobs.tokens and many.logprobs.tokens
    assert many.logprobs.tokens[:4] == few.logprobs.tokens and len(many.logprobs.tokens) == 60
    assert many.text.startswith(few.text) and "".join(many.logprobs.tokens) == many.text
