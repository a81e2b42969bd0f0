"""Bodies that killed or froze other servers (docs/test_menu.md, rows H and I): each is refused in words or harmless."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from testbed.server.protocol import errors
from testbed.server.protocol.errors import ApiError
from testbed.server.protocol.fields import Fields, published
from testbed.server.protocol.generation import Call
from testbed.server.protocol.limits import Limits
from testbed.server.protocol.native import AbortBody, GenerateBody
from testbed.server.protocol.openai import UNSUPPORTED, ChatRequest, CompletionRequest
from tests.server.protocol.bodies import NEEDED, PARSERS, SERVED, VOCAB, WEATHER, call, one, refusal

KINDS = list(PARSERS)
MODELS: list[type[Fields]] = [CompletionRequest, ChatRequest, GenerateBody, AbortBody]
NUMBERS = {
    "temperature": (-0.1, 2.1),
    "top_p": (0, 1.01),
    "top_k": (-2, 0, 2**31),
    "min_p": (-0.1, 1.1),
    "frequency_penalty": (-2.1, 2.1),
    "presence_penalty": (-2.1, 2.1),
    "repetition_penalty": (0, -1, 2.1),
    "n": (0, -1, 129, 5_000_000),
    "seed": (2**63, -(2**63) - 1),
    "max_tokens": (0, -1, 2**63, 2**20 + 1),
    "min_tokens": (-1, 17, 2**63),
    "priority": (2**31,),
    "logprobs": (-1, 21, 10**9),
    "best_of": (0, 2, 10**6),
}
"""Fields of a completion, with numbers outside of their bounds."""
WRONG_TYPES = [True, "1", [1], {"a": 1}]


def with_text(kind: str, name: str, literal: str) -> bytes:
    """A body whose field ``name`` is the JSON text ``literal``, which ``json.dumps`` might not write."""
    needed = json.dumps({key: value for key, value in NEEDED[kind].items() if key != name})
    return f'{needed[:-1]}{"," if len(needed) > 2 else ""} "{name}": {literal}}}'.encode()


def told(error: ApiError) -> dict[str, Any]:
    """The error as a client reads it, after checking its form: strict JSON, a sentence, a closed set of characters."""
    body = json.loads(error.body(), parse_constant=lambda text: pytest.fail(text))
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert 400 <= error.status < 500 and body["error"]["type"] == "invalid_request_error"
    message = body["error"]["message"]
    assert re.fullmatch(r"[ -~]{5,400}\.", message), message
    assert "0x" not in message and "Traceback" not in message and "testbed" not in message
    found: dict[str, Any] = body["error"]
    return found


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_outside_their_bounds(name: str) -> None:
    for number in NUMBERS[name]:
        error = refusal("completion", **{name: number})
        assert told(error)["param"] == name and name in error.message


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_no_number_is_infinite_or_none(name: str, literal: str) -> None:
    """H7, also inside of objects that are not looked into."""
    assert "finite" in told(refusal("completion", with_text("completion", name, literal)))["message"]
    for inside in ('{"0": %s}', '{"type": "json_schema", "json_schema": {"schema": {"const": %s}}}'):
        told(refusal("completion", with_text("completion", "response_format", inside % literal)))


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_another_type(name: str) -> None:
    """true is no 1, "1" is no number, and a number of 4,000 digits is not read as one."""
    for value in WRONG_TYPES:
        told(refusal("completion", **{name: value}))
    for literal in ("1" + "0" * 400, "1" * 4000, "9" * 10_000, "-" + "9" * 10_000):
        told(refusal("completion", with_text("completion", name, literal)))


def test_extremes_that_are_allowed() -> None:
    """H8, H24."""
    for temperature in (0, 1e-4, 1e-8, 1e-38, 5e-324, 2):
        sampling = one("completion", temperature=temperature, top_p=5e-324, min_p=1, top_k=2**31 - 1).sampling
        assert sampling.problem(VOCAB) is None


def test_logit_bias() -> None:
    """H1, H2."""
    for key in ("-1", str(VOCAB), str(VOCAB + 1), str(10**18), "x", "", "01", "1.0", " 1", "١", "9" * 5000):
        assert told(refusal("completion", logit_bias={key: 1}))["param"] == "logit_bias"
    for value in (1e39, -101, 100.5, "1", True, None, [1]):
        assert told(refusal("completion", logit_bias={"1": value}))["param"] == "logit_bias"
    told(refusal("completion", logit_bias=[[1, 1]]))
    told(refusal("completion", logit_bias={str(token): 0 for token in range(1025)}))
    assert len(one("completion", logit_bias={str(token): 0 for token in range(1024)}).sampling.logit_bias) == 1024


@pytest.mark.parametrize("name", ["prompt", "stop_token_ids"])
def test_ids_outside_the_vocabulary(name: str) -> None:
    """H3, H6."""
    for ids in ([-1], [VOCAB], [2**31], [2**63], [1.5], [True], ["1", 1], [1, [2]], [[1], 2], [None], {"0": 1}):
        assert told(refusal("completion", **{name: ids}))["param"] == name
    call("completion", **{name: [0, VOCAB - 1]})


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["a", ""], [[1], []], None, 5, True, {}, [None], [{}]])
def test_empty_and_senseless_prompts(prompt: object) -> None:
    """H9."""
    assert told(refusal("completion", prompt=prompt))["param"] == "prompt"


def test_many_choices_are_refused_before_anything_is_made() -> None:
    """H5, I13."""
    assert told(refusal("completion", n=129))["param"] == "n"
    assert told(refusal("completion", n=128, prompt=["a"] * 17))["param"] == "n"
    assert told(refusal("completion", prompt=["a"] * 2049))["param"] == "prompt"
    served = replace(SERVED, context_tokens=2**20)
    assert told(refusal("completion", served=served, n=100, max_tokens=2**20))["param"] == "max_tokens"
    assert told(refusal("chat", served=served, n=100))["param"] == "max_completion_tokens"
    call("completion", served=served, n=16, max_tokens=2**20)


def test_too_long_and_too_many() -> None:
    for name, value in (
        ("stop", ["x"] * 17),
        ("stop", "x" * 257),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop_token_ids", [1] * 65),
        ("user", "x" * 257),
        ("model", "x" * 257),
        ("rid", "x" * 257),
        ("regex", "x" * 65537),
        ("regex", "é" * 32769),
        ("regex", ""),
        ("ebnf", 5),
        ("json_schema", {"description": "x" * 65536}),
        ("json_schema", "{"),
        ("json_schema", "[]"),
        ("json_schema", "NaN"),
        ("json_schema", True),
        ("json_schema", '{"a": "\\ud800"}'),
    ):
        assert told(refusal("completion", **{name: value}))["param"] == name
    limits = Limits(prompt_chars=10, prompt_tokens=3, messages=2, tools=1, tools_bytes=250)
    small = replace(SERVED, limits=limits)
    assert told(refusal("completion", served=small, prompt="x" * 11))["param"] == "prompt"
    assert told(refusal("completion", served=small, prompt=[[1, 2, 3, 4]]))["param"] == "prompt"
    turn = {"role": "user", "content": ""}
    assert told(refusal("chat", served=small, messages=[turn] * 3))["param"] == "messages"
    assert told(refusal("chat", served=small, messages=[{**turn, "content": "x" * 11}]))["param"] == "messages"
    assert told(refusal("chat", served=small, tools=[WEATHER, WEATHER]))["param"] == "tools"
    wordy = {"type": "function", "function": {"name": "f", "description": "x" * 240}}
    assert told(refusal("chat", served=small, tools=[wordy]))["param"] == "tools"


def test_a_large_body_is_413() -> None:
    limits = SERVED.limits
    error = refusal("completion", b" " * (limits.body_bytes + 1))
    assert error.status == 413 and str(limits.body_bytes) in told(error)["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"5",
        b"{",
        b"{}{}",
        b"\xef\xbb\xbf{}",
        '{"prompt": "a"}'.encode("utf-16"),
        b'{"prompt": "\xff"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "\xc0\xaf"}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a", "stream_options": {"x": 1, "x": 2}}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"prompt": "a", "b": ' + b"[" * 64 + b"]" * 64 + b"}",
        b'{"prompt": "a\nb"}',
        b"{'prompt': 'a'}",
        b'{"prompt": "a",}',
    ],
    ids=range(20),
)
def test_what_is_no_json_object(body: bytes) -> None:
    for kind in KINDS:
        assert told(refusal(kind, body))["code"] == "invalid_json"


def test_depth_is_counted_exactly() -> None:
    """Brackets in strings do not count."""
    nested = b"[" * 63 + b"]" * 63
    body = b'{"prompt": "%s", "b": %s}' % (b"[" * 200, nested)
    assert PARSERS["completion"](body, SERVED).generations[0].prompt == "[" * 200
    told(refusal("completion", b'{"prompt": "a", "b": [%s]}' % nested))


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_a_surrogate_pair(kind: str) -> None:
    """H23: in every place of a body, names included."""
    for literal in (r'"\ud800"', r'["\udfff"]', r'{"a": ["\ud83d"]}', r'{"\ud800": 1}'):
        error = told(refusal(kind, with_text(kind, "anything", literal)))
        assert error["param"] == "anything" and "surrogate" in error["message"]
    told(refusal(kind, with_text(kind, r"\ud800", "1")))
    whole = PARSERS["completion"](rb'{"prompt": "\ud83d\ude00\u0000"}', SERVED)
    assert whole.generations[0].prompt == "\U0001f600\0"


def test_names_cannot_break_a_line_of_a_log() -> None:
    """I24."""
    for text in ("a\nb", "a\rb", "\x1b[31m", "a\0", "a\x7f", "\u2028", "\x85"):
        for name in ("model", "rid", "user", "extra_key", "cache_salt"):
            assert told(refusal("completion", **{name: text}))["param"] == name


def test_no_two_keys_of_the_cache_meet() -> None:
    """I17: salt and key are kept apart."""
    pairs = [("a", "b"), ("ab", ""), ("", "ab"), ("a", ""), ("", "a")]
    keys = [one("completion", cache_salt=salt, extra_key=extra).extra_key for salt, extra in pairs]
    assert len(set(keys)) == len(pairs)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url", "thing", 5, None])
def test_media_and_paths_are_refused(kind: object) -> None:
    """H22, I8, I23."""
    part = {"type": kind, kind if isinstance(kind, str) else "x": {"url": "file:///etc/passwd"}}
    error = told(refusal("chat", messages=[{"role": "user", "content": [part]}]))
    assert error["param"] == "messages[0].content" and "passwd" not in error["message"]
    assert (f"type {kind};" in error["message"]) == (kind not in ("thing", 5, None))


@pytest.mark.parametrize(
    "messages",
    [
        [],
        {},
        "hi",
        [5],
        [{}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "alien", "content": "a"}],
        [{"role": "assistant", "content": None, "tool_calls": []}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "user", "content": ["a"]}],
        [{"role": "assistant", "tool_calls": [{"function": {}}]}],
        [{"role": "assistant", "tool_calls": [{"type": "code", "function": {"name": "a"}}]}],
    ],
    ids=range(15),
)
def test_senseless_messages(messages: object) -> None:
    assert str(told(refusal("chat", messages=messages))["param"]).startswith("messages")


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_honoured_is_refused_by_name(name: str) -> None:
    """H20, I6: among it a chat template from the request. Empty values ask for nothing."""
    for kind in KINDS:
        if name != "input_ids" or kind == "chat":
            assert told(refusal(kind, **{name: "x"}))["param"] == name
            for nothing in (None, False, "", [], {}):
                call(kind, **{name: nothing})


def test_options_of_a_template() -> None:
    """I7."""
    call("chat", chat_template_kwargs={"enable_thinking": False, "level": "low", "budget": 5})
    for options in (
        {"messages": "x"},
        {"turns": 1},
        {"a b": 1},
        {"a": [1]},
        {"a": {"b": 1}},
        {"a": "x" * 257},
        {f"a{number}": 1 for number in range(17)},
        [1],
    ):
        assert told(refusal("chat", chat_template_kwargs=options))["param"] == "chat_template_kwargs"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def known_names() -> list[str]:
    """Every field of every body, and those that are refused."""
    names = [alias for model in MODELS for name, field in model.model_fields.items() for alias in [field.alias or name]]
    return sorted({*names, *UNSUPPORTED})


def plausible() -> st.SearchStrategy[Any]:
    """Values that come close to what fields take."""
    text = st.sampled_from(["a", "", "auto", "json_object", "\ud800", "user", "function", "{}"])
    number = st.sampled_from([0, 1, -1, 2, 0.5, 1e300, 2**31, 2**63, 2**64, 10**30, -0.0, float("nan"), True])
    flat = st.none() | text | number
    parts = st.fixed_dictionaries({"type": text, "text": flat})
    content = flat | st.lists(parts, max_size=2)
    function = st.fixed_dictionaries({"name": flat}, optional={"arguments": flat, "parameters": JSON})
    calls = st.lists(st.fixed_dictionaries({"type": text, "function": function | flat}), max_size=2)
    role = st.sampled_from(["user", "system", "assistant", "tool", "x"])
    message = st.fixed_dictionaries({"role": role, "content": content}, optional={"tool_calls": calls, "name": flat})
    return st.one_of(
        flat,
        st.lists(flat, max_size=3),
        st.lists(st.lists(flat, max_size=2), max_size=2),
        st.dictionaries(st.sampled_from(["1", "4096", "type", "schema", "json_schema", "include_usage"]), flat | JSON),
        st.lists(message, max_size=3),
        calls,
        JSON,
    )


NAMES = known_names()


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    needed=st.booleans(),
    body=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), plausible(), max_size=5),
)
@example(kind="chat", needed=True, body={"tools": [{"type": "function", "function": {"name": "a"}}], "tool_choice": 5})
def test_any_json_is_a_call_or_a_client_error(kind: str, needed: bool, body: dict[str, Any]) -> None:
    data = json.dumps({**(NEEDED[kind] if needed else {}), **body}).encode()
    try:
        made = PARSERS[kind](data, SERVED)
    except ApiError as error:
        told(error) if error.status != 404 else error.body()
        return
    assert isinstance(made, Call)
    for generation in made.generations:
        assert generation.sampling.problem(VOCAB, generation.max_new_tokens) is None
        assert len(generation.prompt) and 1 <= generation.n <= SERVED.limits.n
        if isinstance(generation.prompt, str):
            generation.prompt.encode()
        for text in (*generation.text.stop, generation.extra_key, *made.rids, made.model):
            text.encode()


@settings(max_examples=500, deadline=None, derandomize=True)
@given(kind=st.sampled_from(KINDS), body=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_call_or_a_client_error(kind: str, body: bytes) -> None:
    try:
        PARSERS[kind](body, SERVED)
    except ApiError as error:
        told(error)


def test_a_body_cut_anywhere_is_refused() -> None:
    body = json.dumps({**NEEDED["chat"], "tools": [WEATHER], "stop": ["é"]}, ensure_ascii=False).encode()
    assert PARSERS["chat"](body, SERVED)
    for end in range(len(body)):
        assert told(refusal("chat", body[:end]))["code"] == "invalid_json"


def unbounded(node: Any, path: str = "") -> Iterator[str]:
    """Places of a JSON schema where a number, list, string or object may be of any size."""
    if isinstance(node, list):
        for part in node:
            yield from unbounded(part, path)
    if not isinstance(node, dict):
        return
    kind = node.get("type")
    needs = {
        "integer": ({"minimum", "exclusiveMinimum"}, {"maximum"}),
        "number": ({"minimum", "exclusiveMinimum"}, {"maximum"}),
        "string": ({"maxLength", "enum", "const", "pattern"},),
        "array": ({"maxItems"},),
        "object": ({"maxProperties", "properties"},),
    }
    if isinstance(kind, str):
        yield from (f"{path} {kind}" for group in needs.get(kind, ()) if not group & set(node))
    for name, part in node.items():
        if name not in ("default", "enum", "const"):
            yield from unbounded(part, f"{path}/{name}")


@pytest.mark.parametrize("model", MODELS)
def test_every_field_has_its_bounds_in_the_schema(model: type[Fields]) -> None:
    """H25; and the bounds are those in force."""
    schema = published(model, SERVED)
    assert list(unbounded(schema)) == []
    assert "limits." not in json.dumps(schema) and "last token" not in json.dumps(schema)
    if model is CompletionRequest:
        other = published(model, replace(SERVED, limits=Limits(n=5)))
        assert other["properties"]["n"]["anyOf"][0]["maximum"] == 5 != schema["properties"]["n"]["anyOf"][0]["maximum"]
        assert schema["properties"]["stop_token_ids"]["anyOf"][0]["items"]["maximum"] == VOCAB - 1


def test_the_walk_over_schemas_sees_what_is_missing() -> None:
    bare = {"properties": {"a": {"type": "integer", "minimum": 0}, "b": {"anyOf": [{"type": "string"}]}}}
    assert len(list(unbounded(bare))) == 2


@pytest.mark.parametrize("name", [field.name for field in fields(Limits)])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Limits(**{name: 0})


def test_errors_of_the_server_say_nothing_of_its_inside() -> None:
    """I10, B15: each way in which a request can end has its error."""
    assert errors.of_end(500, "CUDA error at 0x7f00 in /srv/engine.py", 1).message == errors.internal().message
    full = errors.of_end(503, "The request queue is full.", 7)
    assert full.status == 503 and full.headers() == {"Retry-After": "7"} and "7 s" in full.message
    refused = errors.of_end(400, "the prompt is empty", 1)
    assert (refused.status, refused.message, refused.type) == (400, "The prompt is empty.", "invalid_request_error")
    aborted = errors.of_end(499, "aborted", 1)
    assert aborted.status == 499 and json.loads(aborted.body())["error"]["message"] == "Aborted."
    kinds = [errors.wrong_key(), errors.no_route(), errors.not_supported("/v1/embeddings"), errors.internal()]
    assert [error.status for error in kinds] == [401, 404, 404, 500]
    assert kinds[0].type == "authentication_error" and kinds[3].type == "server_error"
