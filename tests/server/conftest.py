"""Servers that are started once for all tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.server.serving import ADMIN_KEY, CONSTANT, USER_KEY, Serving, serving


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short one: servers keep sockets below it, whose addresses have 107 bytes, and pytest's own paths carry the name
    of the test and of the process that runs it."""
    with tempfile.TemporaryDirectory(prefix="test-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A modelled server: two workers, both keys, small limits."""
    options = (*CONSTANT, "--set", "engine.kv_tokens=20000", "--set", "engine.max_running_requests=64")
    options += ("--set", "engine.max_queued_requests=150")
    limits = ("--max-queued", "192", "--limit", "n=8", "--limit", "body_bytes=100000")
    waits = ("--header-s", "2", "--write-s", "1")
    keys = ("--api-key", USER_KEY, "--admin-key", ADMIN_KEY)
    with serving(tmp_path_factory.mktemp("paced"), *options, *limits, *waits, *keys, "--workers", "2") as server:
        yield server


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """What ``testbed serve`` alone starts: the tiny model, on whatever device there is."""
    with serving(tmp_path_factory.mktemp("tiny")) as server:
        yield server


@pytest.fixture
def client(paced: Serving) -> Iterator[openai.OpenAI]:
    """The modelled server's."""
    with openai.OpenAI(base_url=f"{paced.url}/v1", api_key=USER_KEY, max_retries=0) as found:
        yield found


@pytest.fixture
def tiny_client(tiny: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as found:
        yield found
