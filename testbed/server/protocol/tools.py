"""Tool calls: found in a model's text, or forced by a grammar.

With ``tool_choice: auto`` the model writes calls in the form that its chat template taught it. One form is known here:
Hermes' ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` (NousResearch/Hermes-Function-Calling, and Qwen's
templates). What a model of another form writes stays text. With ``required`` or a named function a JSON schema forces
a list of calls, whatever the model knows of tools.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call: the function's name and its arguments as JSON."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How calls are found in the text of a reply."""

    names: tuple[str, ...]
    """Functions that may be called."""
    form: Literal["hermes", "forced"]
    calls_max: int
    """Calls behind this many are dropped (``parallel_tool_calls: false``: 1)."""

    def parser(self) -> HermesCalls | ForcedCalls:
        """A fresh parser, one a choice."""
        return HermesCalls(self) if self.form == "hermes" else ForcedCalls(self)


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a stretch of text comes to: text for the reader, then complete calls."""

    content: str = ""
    calls: tuple[ToolCall, ...] = ()


class HermesCalls:
    """Splits text into content and calls while it comes in. Linear in the text, however it is cut.

    Held back is only what may be the beginning of a tag, and a call until it is complete. What looks like a call but is
    none (broken JSON, a function nobody offered) is content, tags and all.
    """

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._held = ""
        """Outside: perhaps the beginning of a tag. Inside: the end of the call's text, shorter than a tag."""
        self._inside: list[str] | None = None
        """Text of the call so far, without what is held; None outside of a call."""
        self._made = 0

    def push(self, text: str) -> Parsed:
        """The content that is decided, and the calls that are complete."""
        content: list[str] = []
        calls: list[ToolCall] = []
        rest, begin = self._held + text, 0
        while (at := rest.find(self._tag, begin)) >= 0:
            self._keep(content).append(rest[begin:at])
            begin = at + len(self._tag)
            if self._inside is None:
                self._inside = []
            else:
                self._end("".join(self._inside), CLOSE, content, calls)
                self._inside = None
        split = len(rest) - _overlap(rest, self._tag, begin)
        self._keep(content).append(rest[begin:split])
        self._held = rest[split:]
        return Parsed("".join(content), tuple(calls))

    @property
    def _tag(self) -> str:
        return OPEN if self._inside is None else CLOSE

    def _keep(self, content: list[str]) -> list[str]:
        return content if self._inside is None else self._inside

    def finish(self) -> Parsed:
        """The rest. A call without its closing tag counts if it is whole: the tag may have been the stop string."""
        content: list[str] = []
        calls: list[ToolCall] = []
        if self._inside is None:
            content.append(self._held)
        else:
            self._end("".join(self._inside) + self._held, "", content, calls)
        self._inside, self._held = None, ""
        return Parsed("".join(content), tuple(calls))

    def _end(self, text: str, close: str, content: list[str], calls: list[ToolCall]) -> None:
        call = _call(_json(text), self._use.names)
        if call is None:
            content.append(OPEN + text + close)
        elif self._made < self._use.calls_max:
            calls.append(call)
            self._made += 1


class ForcedCalls:
    """A list of calls that a grammar forced: nothing is known before its end. A cut-off list is content."""

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._text: list[str] = []

    def push(self, text: str) -> Parsed:
        """Nothing yet."""
        self._text.append(text)
        return Parsed()

    def finish(self) -> Parsed:
        """The calls, or the text if it is none."""
        text = "".join(self._text)
        found = _json(text)
        calls = [_call(part, self._use.names) for part in found] if isinstance(found, list) else []
        whole = tuple(call for call in calls if call is not None)
        if not whole or len(whole) < len(calls):
            return Parsed(text)
        return Parsed("", whole[: self._use.calls_max])


def parse_calls(use: ToolUse, text: str) -> Parsed:
    """All of a reply at once. Beside calls, white space around the content is dropped."""
    parser = use.parser()
    first, last = parser.push(text), parser.finish()
    calls = first.calls + last.calls
    content = first.content + last.content
    return Parsed(content.strip() if calls else content, calls)


def forced_schema(functions: Sequence[dict[str, Any]], calls_max: int) -> str:
    """The JSON schema of a list of calls. ``functions``: ``{"name", "parameters"}``, as in the request."""
    items = [
        {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "arguments": function["parameters"]},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    return json.dumps({"type": "array", "minItems": 1, "maxItems": calls_max, "items": {"anyOf": items}})


def _overlap(text: str, tag: str, begin: int) -> int:
    """How many characters at the end of ``text``, from ``begin`` on, are a beginning of ``tag``."""
    return next((size for size in range(len(tag) - 1, 0, -1) if text.endswith(tag[:size], begin)), 0)


def _json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _call(found: Any, names: Sequence[str]) -> ToolCall | None:
    if not (isinstance(found, dict) and found.get("name") in names and isinstance(found.get("arguments"), dict)):
        return None
    try:
        arguments = json.dumps(found["arguments"], ensure_ascii=False, allow_nan=False)
        arguments.encode()
    except (ValueError, RecursionError):  # 1e999, or half of a surrogate pair
        return None
    return ToolCall(found["name"], arguments)
