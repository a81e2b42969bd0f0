"""How a server begins and ends: whoever ends it, nothing is left running, and the reason is told."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.server.serving import CONSTANT, PATIENCE_S, Serving, descendants, serving, wait_gone

SLOW = ("--backend", "paced", "--set", "device={constant: {prefill_ns: 1000000, decode_ns: 20000000}}")
"""A device that takes 20 ms for a step: requests last long enough to be interrupted."""
SMALL = ("--set", "engine.kv_tokens=4000")


def body(tokens: int) -> dict[str, Any]:
    return {"prompt": "x", "max_tokens": tokens, "ignore_eos": True, "stream": True}


@pytest.mark.parametrize("part", ["scheduler", "detokenizer", "worker"])
def test_a_killed_part_ends_the_server_with_its_name(tmp_path: Path, part: str) -> None:
    server = Serving((*CONSTANT, *SMALL), tmp_path)
    try:
        server.listening()
        pids = descendants(server.process.pid)
        assert set(server.parts()) == {"scheduler", "detokenizer", "worker"}
        os.kill(server.parts()[part][0], signal.SIGKILL)
        assert server.ended() == 2
        assert part in server.errors and "was killed by SIGKILL" in server.errors
        assert "Traceback" not in server.errors
    finally:
        server.end()
    wait_gone(pids)
    assert not list(tmp_path.glob("testbed-serve-*"))


def test_a_device_that_is_lost_ends_the_server_though_nobody_asks_for_anything(tmp_path: Path) -> None:
    """The engine on a CPU computes in a process of its own, a child of the scheduler's."""
    server = Serving((), tmp_path)
    try:
        server.listening()
        pids = descendants(server.process.pid)
        engines = [pid for pid in pids if b"testbed.engine.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(pids) == 4 and len(engines) == 1
        os.kill(engines[0], signal.SIGKILL)
        assert server.ended() == 2
        assert "the device is lost" in server.errors and "was killed by SIGKILL" in server.errors
        assert "Traceback" not in server.errors
    finally:
        server.end()
    wait_gone(pids)
    assert not list(tmp_path.glob("testbed-serve-*"))


def test_parts_end_with_their_parent(tmp_path: Path) -> None:
    server = Serving((*CONSTANT, *SMALL, "--workers", "2"), tmp_path)
    try:
        server.listening()
        pids = descendants(server.process.pid)
        assert len(pids) == 4
        os.kill(server.process.pid, signal.SIGKILL)
        wait_gone(pids)
        assert server.ended() == -signal.SIGKILL
    finally:
        server.end()
    assert not list(tmp_path.glob("testbed-serve-*"))


def test_running_requests_end_before_the_server_does(tmp_path: Path) -> None:
    with (
        serving(tmp_path, *SLOW, *SMALL) as server,
        server.streaming("/v1/completions", body(100)) as reply,
    ):
        os.kill(server.process.pid, signal.SIGTERM)
        server.wait_for("SIGTERM")
        until = time.monotonic() + PATIENCE_S
        while server.request("GET", "/health")[0] == 200:  # the worker hears of it a moment later
            assert time.monotonic() < until
        status, headers, data = server.request("POST", "/v1/completions", {"prompt": "x"})
        assert status == 503 and headers["retry-after"] and "about to end" in json.loads(data)["error"]["message"]
        events = reply.read().decode().strip().split("\n\n")
        assert len(events) == 101 and events[-1] == "data: [DONE]"
        assert server.ended() == 0
        assert server.errors == ""


def test_a_drain_has_an_end(tmp_path: Path) -> None:
    """A request that would go on for longer is aborted, and its client is told so."""
    with (
        serving(tmp_path, *SLOW, *SMALL, "--drain-s", "0.5") as server,
        server.streaming("/v1/completions", body(3000)) as reply,
    ):
        os.kill(server.process.pid, signal.SIGINT)
        events = reply.read().decode().strip().split("\n\n")
        last = json.loads(events[-2].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "abort" and events[-1] == "data: [DONE]"
        assert server.ended() == 0


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with (
        serving(tmp_path, *SLOW, *SMALL) as server,
        server.streaming("/v1/completions", body(3000)) as reply,
    ):
        os.kill(server.process.pid, signal.SIGTERM)
        server.wait_for("SIGTERM")
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.ended() == 128 + signal.SIGTERM
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            reply.read()


def refused(folder: Path, *options: str) -> str:
    """What a server says that does not start: status 2, and no traceback."""
    command = [sys.executable, "-m", "testbed.cli.main", "serve", *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(folder)}
    ended = subprocess.run(command, capture_output=True, cwd=folder, env=environment, text=True, timeout=PATIENCE_S)
    assert ended.returncode == 2, ended
    assert "Traceback" not in ended.stderr and "listening" not in ended.stdout
    assert not list(folder.glob("testbed-serve-*"))
    return ended.stderr


def test_a_taken_port_is_told_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 cannot be had" in refused(tmp_path, *CONSTANT, *SMALL, "--port", str(port))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "gpt-9"), "no preset, folder or file is called 'gpt-9'"),
        (("--set", "engine.nonsense=1"), "nonsense"),
        (("--limit", "n=0"), "'0' is no limit"),
        (("--limit", "m=1"), "there is no limit 'm'"),
        (("--tokenizer", "/nowhere"), "there is no tokenizer.json"),
        (("--host", "no.such.host.invalid"), "is no address"),
    ],
)
def test_wrong_options_are_refused_in_words(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    assert words in refused(tmp_path, *CONSTANT, *SMALL, *options)


def test_what_only_the_engine_can_refuse_is_told_too(tmp_path: Path) -> None:
    """The device has no room for a single request: that is found in another process."""
    told = refused(tmp_path, "--port", "0", "--set", "engine.kv_tokens=1", "--backend", "paced")
    assert "engine.kv_tokens" in told
