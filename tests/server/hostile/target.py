"""The server that is attacked: modelled, two workers, small limits and short waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.server.hostile.connections import ATTACKS, Attack
from tests.server.hostile.menu import menu
from tests.server.serving import ADMIN_KEY, CONSTANT, USER_KEY, Serving, serving

WORKERS = 2
OPTIONS = (
    *("--set", "engine.kv_tokens=20000", "--set", "engine.max_running_requests=64", "--max-queued", "1024"),
    *("--limit", "n=8", "--limit", "body_bytes=100000"),
    *("--header-s", "2", "--body-s", "2", "--idle-s", "2", "--write-s", "1"),
    *("--api-key", USER_KEY, "--admin-key", ADMIN_KEY),
)


@contextmanager
def target(folder: Path, *options: str, modelled: bool = True, workers: int = WORKERS) -> Iterator[Serving]:
    """One that takes requests; gone when the block ends. Not ``modelled``: the tiny model computes, and a request that
    asks for as much as fits is not to take minutes."""
    context = f"engine.context_length={2048 if modelled else 1024}"
    backend = (*(CONSTANT if modelled else ()), "--set", context)
    with serving(folder, *backend, *OPTIONS, "--workers", str(workers), *options) as server:
        yield server


def known_attacks(server: Serving) -> list[Attack]:
    """Every connection and every body of the menu, for this server."""
    schemas = server.ask("GET", "/openapi.json")["components"]["schemas"]
    last_token = schemas["CompletionRequest"]["properties"]["stop_token_ids"]["anyOf"][0]["items"]["maximum"]
    longest = server.ask("GET", "/get_server_info")["max_req_input_len"]
    return [*ATTACKS, *menu(last_token + 1, longest)]
