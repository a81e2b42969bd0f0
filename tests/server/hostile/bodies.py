"""Bodies that are nearly right: valid ones, changed at random in a few places."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from random import Random
from typing import Any

from testbed.server.protocol.native import AbortBody, GenerateBody, NativeSampling
from testbed.server.protocol.openai import UNSUPPORTED, ChatRequest, CompletionRequest

COMPLETIONS, CHAT, GENERATE, ABORT = "/v1/completions", "/v1/chat/completions", "/generate", "/abort_request"
FEW = {"max_tokens": 3, "ignore_eos": True}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
VALID: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": "hello", **FEW}),
    (COMPLETIONS, {"prompt": [11, 12, 13], "stream": True, "stream_options": {"include_usage": True}, **FEW}),
    (COMPLETIONS, {"prompt": ["a", "b"], "n": 2, "stop": ["x", "yz"], "echo": True, **FEW}),
    (COMPLETIONS, {"prompt": "a", "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, **FEW}),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"5": 1.5}, "stop_token_ids": [1, 2], "min_tokens": 1, **FEW}),
    (COMPLETIONS, {"prompt": "a", "frequency_penalty": 1, "presence_penalty": 1, "repetition_penalty": 1.1, **FEW}),
    (COMPLETIONS, {"prompt": "a", "user": "u", "cache_salt": "s", "extra_key": "k", "priority": 1, **FEW}),
    (CHAT, {"messages": [{"role": "user", "content": "hi"}], **FEW}),
    (CHAT, {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}], "stream": True}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "n": 2, **FEW}),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "tools": [TOOL], "tool_choice": "auto", **FEW}),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"enable_thinking": False}}),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}, **FEW}),
    (GENERATE, {"text": "hello", "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}}),
    (GENERATE, {"input_ids": [[1, 2], [3]], "sampling_params": [{"max_new_tokens": 2}, {"max_new_tokens": 3}]}),
    (GENERATE, {"text": ["a", "b"], "rid": ["p", "q"], "stream": True, "sampling_params": {"n": 2, "stop": "x"}}),
    (GENERATE, {"text": "a", "sampling_params": {"regex": "[ab]+", "max_new_tokens": 3, "sampling_seed": 5}}),
    (ABORT, {"rid": "nobody"}),
]
MODELS = (CompletionRequest, ChatRequest, GenerateBody, NativeSampling, AbortBody)
NAMES = sorted({name for model in MODELS for name in model.model_fields} | set(UNSUPPORTED))
NUMBERS = [0, 1, -1, 2, 3, 127, 2**31 - 1, 2**31, -(2**31) - 1, 2**53, 2**63, 2**64, 10**30, 10**400]
FLOATS = [0.5, -0.0, 5e-324, 1e-38, 1e-8, 1.5, 2.0001, 1e39, 1e300, float("nan"), float("inf"), float("-inf")]
TEXTS = [
    "", " ", "a", "0", "\0", "\ud800", "\udfff\ud800", "\ufeff", "\u2028", "\r\nX-Evil: 1", "\x1b[2J", "a" * 5000,
    "../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1:9/", "{{ 7 * 7 }}", "{% for a in range(10**9) %}",
    "<|im_start|>system", "<|endoftext|>", "<tool_call>", "%s%n", "' or 1=1 --", "((a+)+)+$", "__class__", "١٢",
]  # fmt: skip
OTHERS: list[Any] = [None, True, False, [], {}, [[]], [None], [{}], {"": {}}, {"a": [1]}, [0] * 3000, [["a"]] * 500]


def hostile_value(random: Random) -> Any:
    """Something that no field expects, or only just."""
    value = copy.deepcopy(random.choice(random.choice((NUMBERS, FLOATS, TEXTS, OTHERS))))
    if random.random() < 0.1:
        for _ in range(random.choice((1, 2, 63, 64, 200))):
            value = [value] if random.random() < 0.5 else {random.choice(TEXTS[:4]): value}
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _change(body: dict[str, Any], random: Random) -> None:
    """One place of ``body`` becomes another one."""
    place, key = random.choice(list(_places(body)) or [(body, "prompt")])
    kind = random.randrange(5)
    if kind == 0:
        body[random.choice(NAMES)] = hostile_value(random)
    elif kind == 1 and isinstance(place, dict):
        place.pop(key, None)
    elif kind == 2 and isinstance(place, dict):
        place[random.choice([*TEXTS, *NAMES])] = place.pop(key, None)
    elif kind == 3:
        other = random.choice(VALID)[1]
        place[key] = copy.deepcopy(other[random.choice(list(other))])
    else:
        place[key] = hostile_value(random)


def _damage(data: bytes, random: Random) -> bytes:
    """The text itself is no longer what was written."""
    begin = random.randrange(len(data))
    end = min(begin + random.randrange(1, 9), len(data))
    middle = random.choice([b"", data[begin:end] * 2, random.randbytes(end - begin), b"\xff", b"1e999", b"\\ud800"])
    return random.choice([data[:begin], data[:begin] + middle + data[end:]])


def mutated(random: Random) -> tuple[str, bytes]:
    """(address, body): a valid body with one to three changes, one in ten damaged as text too."""
    address, valid = random.choice(VALID)
    body = copy.deepcopy(valid)
    for _ in range(random.randrange(1, 4)):
        _change(body, random)
    data = json.dumps(body).encode()
    return address, _damage(data, random) if random.random() < 0.1 else data
