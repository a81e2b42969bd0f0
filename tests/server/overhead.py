"""What the way through the server costs: the same requests over HTTP, and in an engine without a server.

``python -m tests.server.overhead in-process|driven JSON`` prints the times of each request, from a process of its own.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed import execute, load_scenario
from testbed.deployment import build_engine
from testbed.metrics.columns import NS_PER_MS, NS_PER_S
from testbed.scenario.schema import Scenario
from tests.server.serving import TOKENIZER, Serving, serving

RATE_PER_S, PROMPT_TOKENS, OUTPUT_TOKENS = 200, 32, 8
MODEL, KV_TOKENS = "llama-3.1-8b", 1 << 18
STEP_NS = 1_000_000
"""What the modelled device takes for a step, prefill or decode: an output takes 8 ms, so two requests run at a time."""
DEVICE = f"{{constant: {{prefill_ns: {STEP_NS}, decode_ns: {STEP_NS}}}}}"
SERVER = ("--backend", "paced", "--model", MODEL, "--set", f"engine.kv_tokens={KV_TOKENS}", "--set", f"device={DEVICE}")
"""Options of a server with the engine of ``scenario``."""
WARM_S = 1.0
"""Requests that arrive before are sent and not counted."""
CONNECTIONS = 32
"""More are opened when these do not suffice."""
LEAD_NS = 100_000_000
"""The driver's first request is due so long after it is ready."""
PATIENCE_S = 30.0
ROOT = Path(__file__).parents[2]

Numbers = NDArray[np.float64]


def scenario(seconds: float, seed: int) -> Scenario:
    """Independent requests at random times (Poisson), and the engine that is asked."""
    return load_scenario(
        {
            "name": "overhead",
            "model": MODEL,
            "engine": {"kv_tokens": KV_TOKENS},
            "device": {"constant": {"prefill_ns": STEP_NS, "decode_ns": STEP_NS}},
            "seed": seed,
            "workload": {
                "lengths": {"prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS},
                "arrivals": {"kind": "poisson", "rate_per_s": RATE_PER_S},
                "count": round(RATE_PER_S * seconds),
            },
        }
    ).scenario


# -- two ways ----------------------------------------------------------------------------------------------------------


def in_process(seconds: float, seed: int) -> dict[str, Any]:
    """``arrival_ns`` and ``end_ns`` of each request, in a paced run: the loop takes requests from a list."""
    requests = execute(scenario(seconds, seed), paced=True).records.requests
    return {"arrival_ns": list(map(int, requests["arrival_ns"])), "end_ns": list(map(int, requests["finish_ns"]))}


def driven(port: int, seconds: float, seed: int) -> dict[str, Any]:
    """The same requests over HTTP; also ``sent_ns``, when each was sent, and ``cpu_s``, the processor time of sending
    and hearing. Raises AssertionError for a reply that is not what was asked for."""
    arrivals_ns = [timed.arrival_ns for timed in build_engine(scenario(seconds, seed)).workload.start()]
    driver = Driver(port, arrivals_ns, list(requests_of(len(arrivals_ns), seed)))
    cpu_s = time.process_time()
    driver.run()
    cpu_s = time.process_time() - cpu_s
    for reply in driver.replies:
        check_reply(reply)
    return {"arrival_ns": arrivals_ns, "sent_ns": driver.sent_ns, "end_ns": driver.end_ns, "cpu_s": cpu_s}


def requests_of(count: int, seed: int) -> Iterator[bytes]:
    """Completions of texts, as they go over the wire."""
    random = Random(seed)
    for _ in range(count):
        fields = {"prompt": text(random), "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
        body = json.dumps(fields).encode()
        head = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        yield "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body


def text(random: Random) -> str:
    """A text of ``PROMPT_TOKENS`` tokens."""
    while True:
        drawn = [random.randrange(TOKENIZER.get_vocab_size()) for _ in range(2 * PROMPT_TOKENS)]
        cut: str = TOKENIZER.decode(TOKENIZER.encode(TOKENIZER.decode(drawn)).ids[:PROMPT_TOKENS])
        if len(TOKENIZER.encode(cut).ids) == PROMPT_TOKENS:
            return cut


def check_reply(reply: bytes) -> None:
    """Raises AssertionError for a reply that is not what was asked for."""
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), reply
    usage = json.loads(body)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (PROMPT_TOKENS, OUTPUT_TOKENS), usage


class Driver:
    """A client as light as can be: requests are written out before, connections kept; one thread, no event loop. Times
    are ns since the first request could be due."""

    def __init__(self, port: int, arrivals_ns: list[int], requests: list[bytes]) -> None:
        self._port, self._arrivals_ns, self._requests = port, arrivals_ns, requests
        self._idle: deque[socket.socket] = deque()
        """Used in turn, so that none waits until the server closes it."""
        self._asked: dict[socket.socket, int] = {}
        """Connections on which a reply is awaited: the number of its request."""
        self._origin_ns = 0
        self.sent_ns, self.end_ns = [0] * len(requests), [0] * len(requests)
        self.replies = [b""] * len(requests)

    def run(self) -> None:
        """Send each at its time, whatever became of the others; returns when all have their replies."""
        self._idle.extend(self._connection() for _ in range(CONNECTIONS))
        self._origin_ns = time.perf_counter_ns() + LEAD_NS
        for number, arrival_ns in enumerate(self._arrivals_ns):
            while (ahead_ns := arrival_ns - self._now_ns()) > 0:
                self._hear(ahead_ns / NS_PER_S)
            connection = self._idle.popleft() if self._idle else self._connection()
            self._asked[connection] = number
            self.sent_ns[number] = self._now_ns()
            connection.sendall(self._requests[number])
        while self._asked:
            assert self._hear(PATIENCE_S), "no reply comes"
        for connection in self._idle:
            connection.close()

    def _now_ns(self) -> int:
        return time.perf_counter_ns() - self._origin_ns

    def _connection(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self._port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _hear(self, within_s: float) -> bool:
        """Read what comes; False when nothing did."""
        readable, _, _ = select.select(list(self._asked), [], [], within_s)
        for connection in readable:
            number = self._asked[connection]
            data = connection.recv(1 << 16)
            assert data, "the server closed a connection"
            self.replies[number] += data
            if is_whole(self.replies[number]):
                self.end_ns[number] = self._now_ns()
                self._idle.append(connection)
                del self._asked[connection]
        return bool(readable)


def is_whole(reply: bytes) -> bool:
    """Has all of it come?"""
    head, end, body = reply.partition(b"\r\n\r\n")
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return bool(end) and len(body) >= int(length)


# -- the difference ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overhead:
    """Of one pair of runs. Times in ms, of the requests that count."""

    engine: Numbers
    """From when a request is due to its end, without a server."""
    served: Numbers
    """From when it is due to its reply."""
    late: Numbers
    """From when it was due until the driver sent it: part of ``served``."""
    driver_cpu: float
    """Share of a core."""
    parts_cpu: dict[str, float]
    """The same of the server's processes."""

    def at(self, percent: float) -> float:
        """The difference of the percentiles."""
        return float(np.percentile(self.served, percent) - np.percentile(self.engine, percent))

    def since_sent_at(self, percent: float) -> float:
        """The same, without the driver's lateness."""
        return float(np.percentile(self.served - self.late, percent) - np.percentile(self.engine, percent))


def overhead(seconds: float, seed: int) -> Overhead:
    """Run both ways, one after the other, each in processes of its own; ``seconds`` of requests are counted."""
    settings = {"seconds": WARM_S + seconds, "seed": seed}
    alone = _measured("in-process", **settings)
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), *SERVER) as server:
        before_s = parts_cpu_s(server)
        found = _measured("driven", port=server.port, **settings)
        parts_cpu = {name: (cpu_s - before_s[name]) / (WARM_S + seconds) for name, cpu_s in parts_cpu_s(server).items()}
    due, sent, end = (np.array(found[name]) for name in ("arrival_ns", "sent_ns", "end_ns"))
    assert alone["arrival_ns"] == found["arrival_ns"]
    counts = due >= WARM_S * NS_PER_S
    engine, served, late = (
        times[counts] / NS_PER_MS for times in (np.array(alone["end_ns"]) - due, end - due, sent - due)
    )
    return Overhead(engine, served, late, found["cpu_s"] / (WARM_S + seconds), parts_cpu)


def _measured(way: str, **settings: Any) -> dict[str, Any]:
    """What a way's process found. Raises CalledProcessError."""
    command = [sys.executable, "-m", "tests.server.overhead", way, json.dumps(settings)]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, check=True).stdout)
    return found


def parts_cpu_s(server: Serving) -> dict[str, float]:
    """Processor time that each part has used, in seconds."""
    return {name: sum(map(cpu_s, pids)) for name, pids in server.parts().items()}


def cpu_s(pid: int) -> float:
    """Processor time of all threads of a process (proc(5), ``stat``), in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def two_cores() -> Iterator[None]:
    """This process, and those that it starts, share two cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:2])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


WAYS: dict[str, Callable[..., dict[str, Any]]] = {"in-process": in_process, "driven": driven}

if __name__ == "__main__":
    print(json.dumps(WAYS[sys.argv[1]](**json.loads(sys.argv[2]))))
