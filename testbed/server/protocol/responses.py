"""Replies as OpenAI's API gives them, whole and as server-sent events."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from testbed.server.protocol.errors import ApiError
from testbed.server.protocol.tools import ToolCall

DONE = b"data: [DONE]\n\n"
"""Ends every stream."""
LOWEST_LOGPROB = -9999.0
"""For a probability of zero: JSON has no infinity, and clients expect a number (OpenAI's API reference)."""


@dataclass(frozen=True, slots=True)
class Head:
    """What every part of one reply repeats."""

    id: str
    """``cmpl-...`` or ``chatcmpl-...``."""
    created: int
    """Unix time, s."""
    model: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a reply: the prompts once, the outputs of all choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def content(self) -> dict[str, object]:
        """The ``usage`` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class TopToken(NamedTuple):
    """One of the most likely tokens at a place."""

    token_id: int
    data: bytes
    """The token's own bytes, which need not be whole characters."""
    logprob: float


class TokenLogprob(NamedTuple):
    """A token with its log-probability; None for a prompt's first token, which nothing predicts."""

    token_id: int
    data: bytes
    logprob: float | None
    top: tuple[TopToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One continuation, or the next stretch of one in a stream."""

    index: int
    text: str
    reason: str | None = None
    """A ``FinishReason``; None while it goes on."""
    matched: str | int | None = None
    """The stop string or token that ended it."""
    logprobs: Sequence[TokenLogprob] | None = None
    """Of this stretch's tokens; None when nobody asked."""
    token_ids: Sequence[int] | None = None
    """Of this stretch; None when nobody asked."""
    calls: tuple[ToolCall, ...] = ()
    """Chat: the tool calls in it."""
    first_call: int = 0
    """How many calls were told before these."""
    text_offset: int = 0
    """Completions: characters of this choice that were told before."""
    message: str = ""
    """Why it was aborted."""
    status: int = 200


def finish_reason(reason: str | None, called: bool = False) -> str | None:
    """OpenAI's word for a ``FinishReason``. ``abort`` is SGLang's addition; ``error`` has no word: it is an error."""
    if reason == "stop" and called:
        return "tool_calls"
    return "abort" if reason == "error" else reason


def completion(head: Head, choices: Sequence[Choice], usage: Usage, cached_details: bool = False) -> dict[str, object]:
    """The reply of ``/v1/completions``. ``cached_details``: with SGLang's ``sglext``."""
    reply = {**_completion_head(head), "choices": [_text_choice(choice) for choice in choices]}
    return {**reply, "usage": usage.content(), **_extension(usage, cached_details)}


def completion_event(head: Head, choice: Choice, usage: Mapping[str, object] | None = None) -> bytes:
    """A chunk of a completion's stream. ``usage``: from ``usage_field``."""
    return event({**_completion_head(head), "choices": [_text_choice(choice)], **(usage or {})})


def completion_usage_event(head: Head, usage: Usage, cached_details: bool = False) -> bytes:
    """The last chunk before ``DONE``: usage, and no choices."""
    reply = {**_completion_head(head), "choices": [], "usage": usage.content()}
    return event({**reply, **_extension(usage, cached_details)})


def chat(head: Head, choices: Sequence[Choice], usage: Usage, cached_details: bool = False) -> dict[str, object]:
    """The reply of ``/v1/chat/completions``."""
    reply = {**_chat_head(head, "chat.completion"), "choices": [_message_choice(head, choice) for choice in choices]}
    return {**reply, "usage": usage.content(), **_extension(usage, cached_details)}


def chat_first_event(head: Head, index: int, usage: Mapping[str, object] | None = None) -> bytes:
    """A choice's first chunk, which names the role."""
    choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    return event({**_chat_head(head, "chat.completion.chunk"), "choices": [choice], **(usage or {})})


def chat_event(head: Head, choice: Choice, usage: Mapping[str, object] | None = None) -> bytes:
    """A chunk with text, calls, the finish reason, or several of these."""
    delta: dict[str, object] = {"content": choice.text} if choice.text else {}
    if choice.calls:
        calls = _calls(head, choice)
        delta["tool_calls"] = [{"index": choice.first_call + at, **call} for at, call in enumerate(calls)]
    called = bool(choice.calls) or choice.first_call > 0
    made = {"index": choice.index, "delta": delta, "logprobs": _chat_logprobs(choice), **_ids(choice)}
    made |= _end(choice, called)
    return event({**_chat_head(head, "chat.completion.chunk"), "choices": [made], **(usage or {})})


def chat_usage_event(head: Head, usage: Usage, cached_details: bool = False) -> bytes:
    """The last chunk before ``DONE``: usage, and no choices."""
    reply = {**_chat_head(head, "chat.completion.chunk"), "choices": [], "usage": usage.content()}
    return event({**reply, **_extension(usage, cached_details)})


def usage_field(include: bool, so_far: Usage | None = None) -> dict[str, object]:
    """The ``usage`` of a chunk that is not the last: none, null when the stream will end with one
    (``include_usage``), or what it is so far (vLLM's ``continuous_usage_stats``)."""
    if so_far is not None:
        return {"usage": so_far.content()}
    return {"usage": None} if include else {}


def event(content: Mapping[str, object]) -> bytes:
    """One server-sent event. JSON has no line breaks, so one line of data always suffices."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """What a stream says when it fails: the ``openai`` client raises it. ``DONE`` comes behind it."""
    return event(error.content())


def models(names: Sequence[str], created: int, context_length: int) -> dict[str, object]:
    """``/v1/models``."""
    return {"object": "list", "data": [model(name, created, context_length) for name in names]}


def model(name: str, created: int, context_length: int) -> dict[str, object]:
    """``/v1/models/NAME``."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "testbed",
        "root": name,
        "max_model_len": context_length,
    }


def token_text(data: bytes) -> str:
    """A token as a string. One that is not whole characters is written as OpenAI's completions do:
    ``bytes:\\xe2\\x80``."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _completion_head(head: Head) -> dict[str, object]:
    return {"id": head.id, "object": "text_completion", "created": head.created, "model": head.model}


def _chat_head(head: Head, kind: str) -> dict[str, object]:
    return {"id": head.id, "object": kind, "created": head.created, "model": head.model}


def _end(choice: Choice, called: bool = False) -> dict[str, object]:
    """Finish reason and, where there is one, SGLang's ``matched_stop``."""
    end: dict[str, object] = {"finish_reason": finish_reason(choice.reason, called)}
    return end if choice.matched is None else {**end, "matched_stop": choice.matched}


def _extension(usage: Usage, cached_details: bool) -> dict[str, object]:
    details = {"device": usage.cached_tokens, "host": 0}
    return {"sglext": {"cached_tokens_details": details}} if cached_details else {}


def _ids(choice: Choice) -> dict[str, object]:
    """vLLM's ``token_ids``, where they are wanted."""
    return {} if choice.token_ids is None else {"token_ids": list(choice.token_ids)}


def _text_choice(choice: Choice) -> dict[str, object]:
    logprobs = None if choice.logprobs is None else _completion_logprobs(choice.logprobs, choice.text_offset)
    return {"text": choice.text, "index": choice.index, "logprobs": logprobs, **_end(choice), **_ids(choice)}


def _message_choice(head: Head, choice: Choice) -> dict[str, object]:
    message: dict[str, object] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.calls:
        message["content"] = choice.text or None
        message["tool_calls"] = _calls(head, choice)
    made = {"index": choice.index, "message": message, "logprobs": _chat_logprobs(choice)}
    return {**made, **_end(choice, bool(choice.calls)), **_ids(choice)}


def _calls(head: Head, choice: Choice) -> list[dict[str, object]]:
    own = head.id.rpartition("-")[2]
    return [
        {
            "id": f"call_{own}_{choice.index}_{number}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for number, call in enumerate(choice.calls, choice.first_call)
    ]


def _completion_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, object]:
    """The lists of completions. ``text_offset`` counts whole characters of the choice's text before each token."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(decoder.decode(token.data))
    return {
        "text_offset": offsets,
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "tokens": [token_text(token.data) for token in tokens],
        "top_logprobs": [_top_by_text(token) for token in tokens] if any(token.top for token in tokens) else None,
    }


def _top_by_text(token: TokenLogprob) -> dict[str, float] | None:
    """The most likely first; where two tokens are the same text, the likelier stands."""
    ordered = sorted(token.top, key=lambda top: top.logprob)
    found = {token_text(top.data): max(top.logprob, LOWEST_LOGPROB) for top in ordered}
    return dict(reversed(found.items())) or None


def _chat_logprobs(choice: Choice) -> dict[str, object] | None:
    if choice.logprobs is None:
        return None
    return {
        "content": [
            {
                **_chat_token(token.data, token.logprob),
                "top_logprobs": [_chat_token(top.data, top.logprob) for top in token.top],
            }
            for token in choice.logprobs
        ],
        "refusal": None,
    }


def _chat_token(data: bytes, logprob: float | None) -> dict[str, object]:
    return {"token": token_text(data), "logprob": finite(logprob), "bytes": list(data)}


def finite(logprob: float | None) -> float | None:
    """A log-probability as JSON can say it."""
    return None if logprob is None else max(logprob, LOWEST_LOGPROB)
