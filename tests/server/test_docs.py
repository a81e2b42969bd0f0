"""The page says what the server does."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import msgspec

from testbed.cli.main import app
from testbed.deployment import build_engine
from testbed.server.forgetful import ForgetfulRecorder
from testbed.server.options import OUTPUT_TOKENS, ServeOptions, Waits, load_serving
from testbed.server.protocol.limits import Limits
from tests.server.test_native import RIGHTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")


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


def test_modelled_servers_that_pages_start_have_room_for_their_model() -> None:
    pages = PAGE + (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^testbed serve --backend paced ([^#\n]+)", pages, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        words = shlex.split(command)
        options = list(zip(words[::2], words[1::2], strict=True))
        given = dict(options)
        settings = [value for name, value in options if name == "--set"]
        settings += [f"device={given['--device']}"] if "--device" in given else []
        assert set(given) <= {"--model", "--device", "--set"}, command
        scenario = load_serving(given["--model"], "paced", settings).scenario
        assert build_engine(scenario, recorder=ForgetfulRecorder()).kv_tokens > 10_000
