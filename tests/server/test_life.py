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
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from testbed.cli.main import invoke
from testbed.cli.serve import NEEDED
from testbed.engine.models.create import Sizes, create_model
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
    """Also where the signal comes twice at once, as ``timeout`` sends it."""
    with (
        serving(tmp_path, *SLOW, *SMALL) as server,
        server.streaming("/v1/completions", body(100)) as reply,
        half_sent(server, b'{"prompt": "x"}') as late,
    ):
        os.kill(server.process.pid, signal.SIGTERM)
        time.sleep(0.02)
        os.kill(server.process.pid, signal.SIGTERM)
        server.wait_for("SIGTERM")
        until = time.monotonic() + PATIENCE_S
        while server.request("GET", "/health")[0] == 200:  # the worker hears of it a moment later
            assert time.monotonic() < until
        status, headers, data = server.request("POST", "/v1/completions", {"prompt": "x"})
        assert status == 503 and headers["retry-after"] and "about to end" in json.loads(data)["error"]["message"]
        late.send(b"}")
        assert late.getresponse().status == 503
        events = reply.read().decode().strip().split("\n\n")
        assert len(events) == 101 and events[-1] == "data: [DONE]"
        assert server.ended() == 0
        assert server.errors == ""


@contextmanager
def half_sent(server: Serving, body: bytes) -> Iterator[http.client.HTTPConnection]:
    """A connection with a request that lacks its last byte."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    with closing(connection):
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[:-1])
        yield connection


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
        server.wait_for("SIGTERM again")
        assert server.ended() == 128 + signal.SIGTERM
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            reply.read()


def test_health_is_not_told_where_the_engine_turns_away(tmp_path: Path) -> None:
    full = ("--set", "engine.max_running_requests=1", "--set", "engine.max_queued_requests=1")
    with serving(tmp_path, *SLOW, *SMALL, *full) as server:
        assert server.request("GET", "/health_generate")[0] == 200
        with (
            server.streaming("/v1/completions", body(3000)) as running,
            server.streaming("/v1/completions", body(10), wait=False),
        ):
            running.readline()
            while server.state()["waiting"] == 0:
                pass
            status, headers, _ = server.request("GET", "/health_generate")
            assert status == 503 and headers["retry-after"]


def test_a_model_without_a_tokenizer_has_ours_and_that_is_said(tmp_path: Path) -> None:
    """Its own end of sequence is none of ours then: nothing could end what a grammar allows."""
    model = create_model("qwen3-0.6b", tmp_path / "model", Sizes(vocab=9000))
    (model / "tokenizer.json").unlink()
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((model / name).read_text(encoding="utf-8"))
        (model / name).write_text(json.dumps({**settings, "eos_token_id": 8999}), encoding="utf-8")
    settings = ("--set", "engine.dtype=float32", "--set", "engine.context_length=512", *SMALL)
    with serving(tmp_path, "--model", str(model), *settings) as server:
        assert any("no tokenizer.json" in line for line in server.said)
        server.ask("POST", "/v1/completions", {"prompt": "x", "max_tokens": 4, "ignore_eos": True})
        status, _, data = server.request("POST", "/v1/completions", {"prompt": "x", "regex": "a"})
        assert status == 400 and b"compiles no grammars" in data


def refused(folder: Path, *options: str) -> str:
    """What a server says that does not start: status 2, and no traceback."""
    command = [sys.executable, "-m", "testbed.cli.main", "serve", *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(folder)}
    ended = subprocess.run(command, capture_output=True, cwd=folder, env=environment, text=True, timeout=PATIENCE_S)
    assert ended.returncode == 2, ended
    assert "Traceback" not in ended.stderr and "listening" not in ended.stdout
    assert not list(folder.glob("testbed-serve-*"))
    return ended.stderr


@pytest.mark.parametrize("option", [("--device", "h100-sxm"), ("--output-tokens", "5")])
def test_options_that_would_mean_nothing_are_refused(tmp_path: Path, option: tuple[str, str]) -> None:
    assert "is an option of modelled devices" in refused(tmp_path, *option)


def test_a_temporary_folder_with_a_long_path_is_refused(tmp_path: Path) -> None:
    """A socket's address has 107 bytes."""
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    assert "TMPDIR" in refused(folder, *CONSTANT, *SMALL)


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_not_installed_is_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr("testbed.cli.serve.find_spec", lambda one: None if one == name else find_spec(one))
    assert invoke(["serve", "--port", "0"]) == 2
    assert capsys.readouterr().err.startswith(f"error: serve: serving needs {name}, which is not installed")


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
        (("--host-profile", "nobody"), "host_inject: no preset or file is called 'nobody'"),
    ],
)
def test_wrong_options_are_refused_in_words(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    assert words in refused(tmp_path, *CONSTANT, *SMALL, *options)


def test_what_only_the_engine_can_refuse_is_told_too(tmp_path: Path) -> None:
    """The device has no room for a single request: that is found in another process."""
    told = refused(tmp_path, "--port", "0", "--set", "engine.kv_tokens=1", "--backend", "paced")
    assert "engine.kv_tokens" in told
