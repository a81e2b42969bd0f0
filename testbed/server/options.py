"""What a server is started with: checked in the parent, told to every part of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

import msgspec

from testbed.scenario.errors import InputError
from testbed.scenario.load import LoadedScenario, load_scenario, resolve
from testbed.scenario.models import find_config
from testbed.scenario.schema import Scenario
from testbed.server.protocol.limits import Limits

Backend = Literal["real", "paced"]

TINY = "tiny"
"""The model of a server that was given none: two layers, random weights, our own tokenizer."""
TINY_PRESET = "qwen3-0.6b"
"""Whose family it is of."""
TINY_ENGINE = {"dtype": "float32", "context_length": 4096, "kv_tokens": 65536}
PACED_MODEL = "llama-3.1-8b"
"""The model of a modelled server that was given none."""
OUTPUT_TOKENS = {"kind": "lognormal", "median": 128, "sigma": 0.8, "max": 4096}
"""How long the outputs of a modelled device are, where a request heeds the end of sequence."""
OWN_TOKENIZER = Path(__file__).parents[1] / "engine" / "tokenizer"


class Waits(msgspec.Struct, frozen=True):
    """How long the server waits for whom, in seconds."""

    header_s: float = 10.0
    """For the head of a request, from the connection's start or the end of the request before."""
    body_s: float = 30.0
    """For its body."""
    idle_s: float = 30.0
    """For the next request on a connection."""
    write_s: float = 30.0
    """For a client to take what is sent to it."""
    answer_s: float = 10.0
    """For the scheduler's answer to a question, and for the token of ``/health_generate``."""
    drain_s: float = 30.0
    """For running requests, once the server is told to end."""


class ServeOptions(msgspec.Struct, frozen=True):
    """A server."""

    scenario: bytes
    """The resolved scenario, JSON. Of its workload, only the output lengths are used, by a modelled device."""
    backend: Backend
    tiny: bool
    """The model is made at the start."""
    tokenizer: str
    """A folder with ``tokenizer.json`` and, for chats, a template."""
    names: tuple[str, ...]
    """By which the model may be called."""
    host: str = "127.0.0.1"
    port: int = 30000
    workers: int = 1
    api_key: str = ""
    """Empty: everybody may ask."""
    admin_key: str = ""
    """Empty: nobody is an administrator."""
    max_queued: int = 1024
    """Requests that may wait beside those that run."""
    connections: int = 4096
    """Open connections, of all workers together."""
    header_bytes: int = 64 << 10
    """Of a request's head."""
    record: str = ""
    """A folder for the run that the server was; empty: nothing is kept."""
    command: str = ""
    """What was typed, without keys."""
    waits: Waits = Waits()
    limits: Limits = Limits()

    def read_scenario(self) -> Scenario:
        """The scenario."""
        return Scenario.model_validate_json(self.scenario, strict=True)

    def max_open(self, running: int) -> int:
        """Requests that one worker may have open where ``running`` may run: its share of all that run and wait."""
        return -(-(running + self.max_queued) // self.workers)


def load_serving(model: str | None, backend: Backend, settings: Sequence[str] = ()) -> LoadedScenario:
    """The scenario of a server: ``settings`` are ``FIELD=VALUE`` of a scenario. Raises InputError."""
    source = {
        "name": "serve",
        "model": model or (PACED_MODEL if backend == "paced" else TINY_PRESET),
        "engine": dict(TINY_ENGINE) if model is None and backend == "real" else {},
        "workload": {
            "lengths": {"prompt_tokens": 1, "output_tokens": dict(OUTPUT_TOKENS)},
            "arrivals": {"kind": "constant", "rate_per_s": 1},
            "count": 1,
        },
    }
    return load_scenario(source, settings)


def encoded(scenario: Scenario) -> bytes:
    """For ``ServeOptions.scenario``."""
    return json.dumps(resolve(scenario)).encode()


def find_tokenizer(model: str, given: str | None) -> Path:
    """The folder of the tokenizer: the one given, the model's own, or ours. Raises InputError for one without."""
    folder = Path(given) if given is not None else find_config(model).parent
    if (folder / "tokenizer.json").is_file():
        return folder
    if given is not None:
        raise InputError(
            f"there is no tokenizer.json in {given}", where="--tokenizer", remedy="a model folder in Hugging Face form"
        )
    return OWN_TOKENIZER


def read_limits(settings: Sequence[str]) -> Limits:
    """``NAME=NUMBER`` over the defaults. Raises InputError."""
    known = {field.name for field in fields(Limits)}
    limits = Limits()
    for text in settings:
        name, _, value = text.partition("=")
        if name not in known:
            remedy = f"one of {', '.join(sorted(known))}"
            raise InputError(f"there is no limit {name!r}", where=f"--limit {text}", remedy=remedy)
        if not (value.isascii() and value.isdigit() and 0 < int(value[:19]) < 1 << 62):
            raise InputError(f"{value!r} is no limit", where=f"--limit {text}", remedy="a whole number from 1")
        limits = replace(limits, **{name: int(value)})
    return limits
