"""Bodies that killed or froze other servers, by row of the test menu (docs/test_menu.md, H and I)."""

from __future__ import annotations

import itertools
import json
from typing import Any

from tests.server.hostile.bodies import CHAT, COMPLETIONS, FEW, GENERATE, TOOL
from tests.server.hostile.connections import Attack, post

NO = (400,)
YES = (200,)
EITHER = (200, 400)
HELLO = [{"role": "user", "content": "hi"}]
NUMBERS = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
MORE_NUMBERS = ("n", "seed", "max_tokens", "min_tokens", "priority", "logprobs", "best_of")
NO_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999")
HALVES = (r"\ud800", r"\udfff", r"a\ud83d", r"\ud83d\u0041")
EVIL = "\r\n2026-01-01 ERROR all is lost\x1b[31m"


def completion(row: str, answers: tuple[int, ...] = NO, **fields: Any) -> Attack:
    """A completion with these fields."""
    return _attack(row, COMPLETIONS, {"prompt": "hello", **FEW, **fields}, answers)


def chat(row: str, answers: tuple[int, ...] = NO, **fields: Any) -> Attack:
    """A chat with these."""
    return _attack(row, CHAT, {"messages": HELLO, **FEW, **fields}, answers)


def native(row: str, answers: tuple[int, ...] = NO, **params: Any) -> Attack:
    """A request of SGLang's with these sampling parameters."""
    params = {"max_new_tokens": 3, "ignore_eos": True, **params}
    return _attack(row, GENERATE, {"text": "hello", "sampling_params": params}, answers)


def literal(row: str, name: str, text: str, answers: tuple[int, ...] = NO) -> Attack:
    """A completion whose field ``name`` is ``text``, which need not be what a JSON writer writes."""
    body = json.dumps({field: value for field, value in {"prompt": "hello", **FEW}.items() if field != name})
    return Attack(row, (post(f'{body[:-1]}, "{name}": {text}}}'.encode()),), answers)


def _attack(row: str, address: str, body: dict[str, Any], answers: tuple[int, ...]) -> Attack:
    return Attack(row, (post(json.dumps(body).encode(), address=address),), answers)


def nested(depth: int) -> dict[str, Any]:
    """A schema with ``2 ** depth`` ways through it."""
    schema: dict[str, Any] = {"type": "string", "maxLength": 50}
    for _ in range(depth):
        schema = {"oneOf": [{"type": "array", "items": schema}, {"type": "object", "properties": {"a": schema}}]}
    return schema


def numbers(vocab_size: int) -> list[Attack]:
    """H1-H8, H11, H24."""
    keys = ("-1", str(vocab_size), str(vocab_size + 1), str(10**18), "x", "", "1.0", "٣")
    ids = ([-1], [vocab_size], [2**31], [2**63], [1.5], [True], ["1"], [None], [[1], 2], [1, [2]])
    extremes = itertools.product((0, 5e-324, 1e-38, 1e-8, 1e-4, 2), (5e-324, 1e-8, 1), (-2, 2), (5e-324, 2))
    return [
        *[completion("H1", logit_bias={key: 1}) for key in keys],
        *[literal("H2", "logit_bias", f'{{"1": {value}}}') for value in ("1e39", '"1"', "null", *NO_NUMBERS)],
        *[completion("H3", stop_token_ids=some, min_tokens=2) for some in ids],
        *[native("H3", stop_token_ids=some, min_new_tokens=2) for some in ids],
        *[completion("H4", logprobs=value) for value in (21, 10**9, 10**30, -1)],
        *[chat("H4", logprobs=True, top_logprobs=value) for value in (21, 10**9, -1)],
        *[completion("H5", n=value) for value in (0, -1, 9, 129, 5_000_000, 10**30)],
        *[completion("H5", best_of=value) for value in (2, 5_000_000)],
        completion("H5", prompt=["a"] * 3000),
        *[completion("H6", prompt=some) for some in ids if some != ["1"]],
        *[_attack("H6", GENERATE, {"input_ids": some}, NO) for some in ids if some != ["1"]],
        *[literal("H7", name, value) for name in (*NUMBERS, *MORE_NUMBERS) for value in NO_NUMBERS],
        *[completion("H8", YES, temperature=value) for value in (0, 5e-324, 1e-38, 1e-8, 1e-4)],
        completion("H11", YES, max_tokens=None),
        *[completion("H11", max_tokens=value) for value in (0, -1, 2**63, 10**30, 1.5, "1")],
        *[native("H11", max_new_tokens=value) for value in (-1, 2**63)],
        *[
            completion("H24", YES, temperature=t, top_p=p, min_p=p, frequency_penalty=f, repetition_penalty=r)
            for t, p, f, r in extremes
        ],
        *[completion("H24", NO, **{name: value}) for name in NUMBERS for value in (1e300, -1e300, 2**64)],
    ]


def texts(longest: int) -> list[Attack]:
    """H9, H10, H21-H23, and I6-I8, I23, I24. ``longest``: a prompt is at most so long."""
    strings = ("prompt", "model", "user", "rid", "cache_salt", "extra_key", "stop", "regex")
    media = ("image_url", "input_image", "input_audio", "audio_url", "video_url", "file", "refusal")
    paths = ("file:///etc/passwd", "../../etc/passwd", "\\\\host\\share", "http://127.0.0.1:9/x")
    kwargs = ({"messages": []}, {"a": [1]}, {"x" * 99: 1}, {"a": "x" * 999}, {f"a{n}": 1 for n in range(99)}, [1])
    special = "<|im_start|>system\n<|im_end|><|endoftext|></s><tool_call>\0\ufffe"
    return [
        *[completion("H9", prompt=value) for value in ("", [], [""], [[]], ["a", ""], None, {}, 5)],
        *[chat("H9", messages=value) for value in ([], None, {}, [{}], [None], [{"role": "user"}])],
        *[
            completion("H10", YES if length + 3 <= longest + 1 else EITHER, prompt=[11] * length)
            for length in range(longest - 4, longest + 1)
        ],
        *[completion("H10", prompt=[11] * length) for length in (longest + 1, longest + 2, longest * 5)],
        completion("H21", YES, prompt=special),
        chat("H21", YES, messages=[{"role": "user", "content": special}]),
        *[
            chat("H22", messages=[{"role": "user", "content": [{"type": kind, kind: {"url": path}}]}])
            for kind in media
            for path in paths
        ],
        *[literal("H23", name, f'"{half}"') for name in (*strings, "anything") for half in HALVES],
        *[literal("H23", half, '"a"') for half in HALVES],
        *[chat("I6", **{name: "{{ 1 }}"}) for name in ("chat_template", "continue_final_message")],
        *[chat("I7", chat_template_kwargs=value) for value in kwargs],
        *[completion("I23", **{name: path}) for name in ("lora_path", "image_data", "audio_data") for path in paths],
        *[completion("I24", **{name: f"a{EVIL}"}) for name in ("user", "rid", "cache_salt", "extra_key")],
        *[completion("I24", (404,), model=name) for name in ("nobody", "../../etc/passwd")],
    ]


def grammars() -> list[Attack]:
    """H12, H14, H16, H17, H20."""
    broken = ("(", "[", "a{2,1}", "*", "(?P<a", "\\", "a{99999999999}", "(?<=a)b")
    schemas = ({"type": "nothing"}, {"$ref": "#/nowhere"}, {"pattern": "("}, {"items": 5}, {"enum": []})
    recursive = {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/a"}}}}}
    itself = {"$ref": "#"}
    pairs = itertools.combinations({"regex": "a", "ebnf": 'root ::= "a"', "json_schema": {}}.items(), 2)
    return [
        *[completion("H12", regex=text) for text in broken],
        *[completion("H12", ebnf=text) for text in ("root ::= (", "root ::= nowhere", "", "::=")],
        *[completion("H12", EITHER, json_schema=schema) for schema in schemas],
        *[completion("H12", json_schema=text) for text in ("{", "[]", "5", '"a"', "NaN")],
        *[completion("H14", (200, 400, 503), json_schema=nested(depth)) for depth in (5, 8)],
        *[completion("H16", EITHER, json_schema=schema) for schema in (recursive, itself)],
        *[completion("H17", stop_regex=text) for text in ("(a+)+$", "a")],
        *[completion("H17", EITHER, regex=text) for text in ("(a+)+b", "(a|a)*b", "a{1000}{1000}", "(.*){50}")],
        *[completion("H20", **dict(pair)) for pair in pairs],
        chat("H20", tools=[TOOL], tool_choice="required", response_format={"type": "json_object"}),
        completion("H20", n=2, best_of=3),
    ]


def menu(vocab_size: int, longest: int) -> list[Attack]:
    """All of them, for a model and a server."""
    return [*numbers(vocab_size), *texts(longest), *grammars()]
