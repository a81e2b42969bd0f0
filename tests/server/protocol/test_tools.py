"""Tool calls are found however the text is cut, in linear time, and what is none stays text."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.server.protocol.tools import (
    CLOSE,
    OPEN,
    HermesCalls,
    Parsed,
    ToolCall,
    ToolUse,
    forced_schema,
    parse_calls,
)

HERMES = ToolUse(("f", "g"), "hermes", 100)
FORCED = ToolUse(("f", "g"), "forced", 2)
CALL = '{"name": "f", "arguments": {"a": "é"}}'
MADE = ToolCall("f", '{"a": "é"}')


def stream(use: ToolUse, parts: list[str]) -> Parsed:
    """Contents and calls of a text that comes in parts."""
    parser = use.parser()
    said = [parser.push(part) for part in parts] + [parser.finish()]
    return Parsed("".join(part.content for part in said), tuple(call for part in said for call in part.calls))


def naive(text: str) -> Parsed:
    """The whole text at once by a regular expression; a last tag may be open."""
    calls: list[ToolCall] = []

    def take(found: re.Match[str]) -> str:
        try:
            call = json.loads(found[1])
            calls.append(ToolCall(call["name"], json.dumps(call["arguments"], ensure_ascii=False)))
            assert call["name"] in HERMES.names and isinstance(call["arguments"], dict)
        except Exception:
            del calls[before[0] :]
            return found[0]
        before[0] = len(calls)
        return ""

    before = [0]
    content = re.sub(f"{OPEN}(.*?)(?:{CLOSE}|$)", take, text, flags=re.DOTALL)
    return Parsed(content, tuple(calls))


PIECES = st.sampled_from(
    [
        OPEN,
        CLOSE,
        CALL,
        "<tool_",
        "call>",
        "</",
        "<",
        ">",
        " ",
        "\n",
        "x",
        '{"name": "h", "arguments": {}}',
        "{",
        "[]",
        OPEN + CALL + CLOSE,
    ]
)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(text=st.lists(PIECES, max_size=10).map("".join), data=st.data())
def test_hermes_calls_are_found_however_the_text_is_cut(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    parts = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert stream(HERMES, parts) == stream(HERMES, list(text)) == naive(text)


def test_content_is_not_held_back_longer_than_needed() -> None:
    """G2."""
    parser = HermesCalls(HERMES)
    assert parser.push("a < b <tool") == Parsed("a < b ")
    assert parser.push("s>") == Parsed("<tools>")
    assert parser.push(f"x{OPEN}{CALL}</tool_call") == Parsed("x")
    assert parser.push(">y") == Parsed("y", (MADE,))
    assert parser.finish() == Parsed()


def test_a_whole_reply() -> None:
    assert parse_calls(HERMES, f"Let me see.\n{OPEN}\n{CALL}\n{CLOSE}\n") == Parsed("Let me see.", (MADE,))
    assert parse_calls(HERMES, f"{OPEN}{CALL}") == Parsed("", (MADE,))
    assert parse_calls(HERMES, " plain ") == Parsed(" plain ")
    assert parse_calls(ToolUse(("f",), "hermes", 1), (OPEN + CALL + CLOSE) * 3).calls == (MADE,)


@pytest.mark.parametrize(
    "inside",
    [
        "",
        "{",
        "null",
        "[]",
        '{"name": "f"}',
        '{"name": "f", "arguments": "{}"}',
        '{"name": "nobody", "arguments": {}}',
        '{"name": ["f"], "arguments": {}}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": 1e999}}',
        '{"name": "f", "arguments": {"a": "\\ud800"}}',
        '{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}",
        '{"name": "f", "arguments": ' + '{"a":' * 50_000,
    ],
    ids=range(13),
)
def test_what_is_no_call_stays_text(inside: str) -> None:
    text = f"a{OPEN}{inside}{CLOSE}b"
    assert parse_calls(HERMES, text) == Parsed(text)
    assert parse_calls(FORCED, f"[{inside}]") == Parsed(f"[{inside}]")


def test_forced_calls_come_at_the_end() -> None:
    text = f"[{CALL}, {CALL}, {CALL}]"
    assert stream(FORCED, list(text)) == Parsed("", (MADE, MADE))
    assert FORCED.parser().push(text) == Parsed()
    assert stream(FORCED, [text[:-1]]) == Parsed(text[:-1])
    assert stream(FORCED, ["[]"]) == Parsed("[]")
    mixed = f'[{CALL}, {{"name": "nobody", "arguments": {{}}}}]'
    assert stream(FORCED, [mixed]) == Parsed(mixed)


def test_the_forcing_schema_takes_calls_and_nothing_else() -> None:
    schema = json.loads(forced_schema([{"name": "f", "parameters": {"type": "object", "required": ["a"]}}], 3))
    assert (schema["type"], schema["minItems"], schema["maxItems"]) == ("array", 1, 3)
    (item,) = schema["items"]["anyOf"]
    assert item["properties"] == {"name": {"const": "f"}, "arguments": {"type": "object", "required": ["a"]}}
    assert item["required"] == ["name", "arguments"] and item["additionalProperties"] is False


class Counted(str):
    """A string that counts the characters that are searched, joined and copied."""

    looked = 0

    def find(self, tag: str, begin: int = 0) -> int:  # type: ignore[override]
        at = str.find(self, tag, begin)
        Counted.looked += (len(self) if at < 0 else at + len(tag)) - begin
        return at

    def __radd__(self, other: str) -> Counted:
        Counted.looked += len(other) + len(self)
        return Counted(str(other) + str(self))

    def __getitem__(self, part: slice) -> Counted:  # type: ignore[override]
        made = Counted(str.__getitem__(self, part))
        Counted.looked += len(made)
        return made


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("piece", ["<", "<tool_call", OPEN, OPEN + "<", OPEN + CLOSE, OPEN + CALL + CLOSE])
def test_the_work_grows_with_the_text(piece: str, at_once: bool) -> None:
    """H18, I15: twice the text is twice the work (characters looked at, not time)."""

    def work(times: int) -> int:
        Counted.looked = 0
        stream(HERMES, [Counted(part) for part in ([piece * times] if at_once else piece * times)])
        return Counted.looked

    once = work(300)
    assert once >= 300 * len(piece) and work(600) <= 2.2 * once
