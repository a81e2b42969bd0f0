"""A server to test, in processes of its own."""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from testbed.engine.tokenizer import load_tokenizer
from testbed.tokens import oracle_key, token_ids

PATIENCE_S = 60.0
"""Nothing takes so long; a test fails then instead of hanging."""
USER_KEY, ADMIN_KEY = "user-key", "admin-key"
CONSTANT = ("--backend", "paced", "--set", "device={constant: {prefill_ns: 200000, decode_ns: 200000}}")
"""A device of constant step times, fast enough for tests."""
TOKENIZER: Tokenizer = load_tokenizer()


class Serving:
    """A running ``testbed serve``."""

    def __init__(self, options: Sequence[str], folder: Path) -> None:
        self._errors_file = folder / "errors.txt"
        command = [sys.executable, "-m", "testbed.cli.main", "serve", "--port", "0", *options]
        environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[2])}
        with self._errors_file.open("wb") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, cwd=folder, env=environment, text=True
            )
        self.folder = folder
        self.said: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = 0

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.strip())
        self._lines.put("")

    def wait_for(self, words: str) -> str:
        """The first line with these words. Raises AssertionError if the server ends without it."""
        while True:
            line = self._lines.get(timeout=PATIENCE_S)
            self.said.append(line)
            if words in line:
                return line
            assert line, f"it ended without {words!r}: {self.said}; {self.errors}"

    def listening(self) -> Serving:
        """Wait until it takes requests."""
        self.port = int(self.wait_for("listening on").rpartition(":")[2])
        return self

    @property
    def errors(self) -> str:
        """What it wrote to stderr."""
        return self._errors_file.read_text(encoding="utf-8")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def parts(self) -> dict[str, list[int]]:
        """Process ids of its parts, by module."""
        found: dict[str, list[int]] = {}
        for pid in descendants(self.process.pid):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            module = next((word.decode() for word in words if word.startswith(b"testbed.")), "")
            found.setdefault(module.rpartition(".")[2], []).append(pid)
        return found

    def ended(self) -> int:
        """Wait for its exit status."""
        status = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status

    def end(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.ended()

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, key: str = USER_KEY
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of one request; ``body`` becomes JSON unless it is bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        try:
            connection.request(method, path, data, {**sent, **(headers or {})})
            reply = connection.getresponse()
            return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()
        finally:
            connection.close()

    @contextmanager
    def streaming(self, path: str, body: Any, *, wait: bool = True) -> Iterator[Any]:
        """The reply to a POST, still to be read; the connection closes with the block. Without ``wait``: the
        connection, on which nobody waits yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {USER_KEY}"}
        try:
            connection.request("POST", path, json.dumps(body), headers)
            if not wait:
                yield connection
                return
            with connection.getresponse() as reply:
                assert reply.status == 200
                yield reply
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: Any = None, key: str = USER_KEY) -> Any:
        """The JSON of a reply with status 200."""
        status, _, data = self.request(method, path, body, key=key)
        assert status == 200, data
        return json.loads(data)

    def state(self) -> dict[str, Any]:
        """What the scheduler says of itself."""
        state: dict[str, Any] = self.ask("GET", "/get_server_info")["internal_states"][0]
        return state

    def aborted(self) -> int:
        """Requests that were aborted, by its own count."""
        status, _, page = self.request("GET", "/metrics")
        (line,) = re.findall(rb"^sglang:num_aborted_requests_total\{.*\} (\S+)$", page, re.MULTILINE)
        assert status == 200
        return int(float(line))

    def comes_to_rest(self) -> dict[str, Any]:
        """Wait until nothing waits or runs and every page is free or cached; a batch in flight holds others."""
        until = time.monotonic() + PATIENCE_S
        while not at_rest(state := self.state()):
            assert time.monotonic() < until, state
            time.sleep(0.01)
        return state


def at_rest(state: dict[str, Any]) -> bool:
    """Of the scheduler."""
    idle = state["free_tokens"] + state["evictable_tokens"] == state["max_total_num_tokens"]
    return idle and not state["running"] and not state["waiting"]


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Serving]:
    """A server that takes requests; gone when the block ends, whatever happens."""
    server = Serving(options, folder)
    try:
        yield server.listening()
        pids = descendants(server.process.pid)
    finally:
        server.end()
    wait_gone(pids)


def descendants(pid: int) -> list[int]:
    """Children of a process, whichever thread has started them, and theirs."""
    try:
        children = [file.read_text(encoding="ascii") for file in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    return [found for child in map(int, " ".join(children).split()) for found in (child, *descendants(child))]


def wait_gone(pids: Sequence[int]) -> None:
    """Wait until these processes are no more (or zombies that nobody has waited for)."""
    until = time.monotonic() + PATIENCE_S
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < until, f"still there: {alive}"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def oracle_ids(rid: str, count: int) -> list[int]:
    """The first outputs of a modelled request, by its id at the scheduler."""
    ids: list[int] = token_ids(oracle_key(0, rid), 0, count, TOKENIZER.get_vocab_size()).tolist()
    return ids


def oracle_texts(name: str, count: int, workers: int) -> list[str]:
    """The texts that a request may have, by the id that its client knows: one for each worker that may have had it."""
    return [TOKENIZER.decode(oracle_ids(f"{worker}:{name}", count)) for worker in range(workers)]
