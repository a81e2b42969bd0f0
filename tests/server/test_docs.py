"""The page says what the server does."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import msgspec

from testbed.cli.main import app
from testbed.server.options import OUTPUT_TOKENS, ServeOptions, Waits
from testbed.server.protocol.limits import Limits
from tests.server.test_native import RIGHTS

PAGE = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")


def test_every_limit_has_its_row() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", PAGE, re.MULTILINE))
    assert {name: int(value.replace(",", "")) for name, value in rows.items()} == {
        field.name: getattr(Limits(), field.name) for field in fields(Limits)
    }


def test_every_address_is_named() -> None:
    for _, path in RIGHTS:
        assert path.partition("/{")[0] in PAGE, path


def test_options_and_their_defaults_are_the_programs_own() -> None:
    command = next(one for one in app.registered_commands if one.callback and one.callback.__name__ == "serve")
    assert command.callback is not None
    names = {name.replace("_", "-") for name in command.callback.__annotations__} | {"set"}
    assert set(re.findall(r"(?<![\w-])--([a-z]+[a-z-]*)(?!-)\b", PAGE)) <= names | {"help"}
    for name, default in (("max_queued", 1024), ("connections", 4096), ("header_bytes", 65536)):
        option = name.replace("_", "-")
        assert {one.name: one.default for one in msgspec.structs.fields(ServeOptions)}[name] == default
        assert re.search(rf"`--{option}` \(?{default}", PAGE), option
    for name in ("header_s", "body_s", "idle_s", "write_s"):
        assert f"`--{name.replace('_', '-')}` {getattr(Waits(), name):g}" in PAGE
    law = ", ".join(f"{name}: {value}" for name, value in OUTPUT_TOKENS.items())
    assert law in PAGE.replace("\n", " ")
