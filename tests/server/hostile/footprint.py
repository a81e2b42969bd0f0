"""What a server holds: pages, requests, tasks, file descriptors, memory."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tests.server.serving import PATIENCE_S, Serving

CLOSING_S = 15.0
"""Connections that nobody uses are closed long before."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(server: Serving) -> dict[str, int]:
    """Of each part of the server, by ``NAME PID``."""
    sizes = {}
    for part, pids in server.parts().items():
        for pid in pids:
            pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
            sizes[f"{part} {pid}"] = pages * PAGE_BYTES
    return sizes


def descriptors(server: Serving) -> dict[str, int]:
    """Open files and sockets, ZMQ's among them, of each part, by ``NAME PID``. Grammars are tried in processes that the
    scheduler starts when it needs them: their sockets to it are not counted."""
    parts = server.parts()
    trials = len(parts.pop("trial", []))
    counts = {
        f"{part} {pid}": len(list(Path(f"/proc/{pid}/fd").iterdir())) for part, pids in parts.items() for pid in pids
    }
    (scheduler,) = parts["scheduler"]
    counts[f"scheduler {scheduler}"] -= trials
    return counts


def workers_at_rest(server: Serving, workers: int) -> dict[int, dict[str, int]]:
    """What each worker has open while it answers nothing but this question."""
    until, found = time.monotonic() + PATIENCE_S, dict[int, dict[str, int]]()
    while len(found) < workers or any(state["busy"] or state["open_requests"] for state in found.values()):
        assert time.monotonic() < until, found
        state = server.ask("GET", "/get_server_info")["worker"]
        found[state["number"]] = state
    return found


def held(server: Serving, workers: int) -> dict[str, Any]:
    """All but memory, at rest. Raises AssertionError when it comes to no rest or a page is lost."""
    state = server.comes_to_rest()
    assert state["compiling"] == 0, state
    return {"workers": workers_at_rest(server, workers), "descriptors": descriptors(server)}


def left_behind(server: Serving, workers: int, before: dict[str, Any]) -> list[str]:
    """What is there that was not there before: nothing, as soon as the last connections are closed."""
    until = time.monotonic() + CLOSING_S
    while (now := held(server, workers)) != before and time.monotonic() < until:
        time.sleep(0.1)
    return [f"{name}: {before[name]} before, {now[name]} now" for name in now if now[name] != before[name]]
