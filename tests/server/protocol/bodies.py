"""Bodies for tests, and a server to check them against."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from testbed.engine.tokenizer import FOLDER
from testbed.server.protocol.chat import load_chat_template
from testbed.server.protocol.errors import ApiError
from testbed.server.protocol.generation import Call, Generation, Served
from testbed.server.protocol.limits import Limits
from testbed.server.protocol.native import parse_generate
from testbed.server.protocol.openai import parse_chat, parse_completion

VOCAB = 4096
SERVED = Served(("tiny", "alias"), VOCAB, 8192, load_chat_template(FOLDER), Limits(body_bytes=1 << 20))
PARSERS: dict[str, Callable[[bytes, Served], Call]] = {
    "completion": parse_completion,
    "chat": parse_chat,
    "generate": parse_generate,
}
NEEDED: dict[str, dict[str, Any]] = {
    "completion": {"prompt": "hi"},
    "chat": {"messages": [{"role": "user", "content": "hi"}]},
    "generate": {"text": "hi"},
}
"""The least that each takes."""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}


def call(kind: str, served: Served = SERVED, **fields: Any) -> Call:
    """What the least body with these fields comes to."""
    return PARSERS[kind](json.dumps({**NEEDED[kind], **fields}).encode(), served)


def one(kind: str, **fields: Any) -> Generation:
    """Its only generation."""
    (generation,) = call(kind, **fields).generations
    return generation


def refusal(kind: str, body: bytes | None = None, served: Served = SERVED, **fields: Any) -> ApiError:
    """The error for a body, or for the least one with these fields."""
    data = json.dumps({**NEEDED[kind], **fields}).encode() if body is None else body
    with pytest.raises(ApiError) as raised:
        PARSERS[kind](data, served)
    return raised.value
