"""A client that does nothing wrong, in a process of its own.

``python -m tests.server.hostile.steady PORT WORKERS KIND``

It asks until its input closes and says then what it got: every reply must have exactly its own tokens. Those of a
modelled server are the oracle's; a real one must say the same, without chance, whenever it is asked the same.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.server.serving import PATIENCE_S, TOKENIZER, USER_KEY, Serving, oracle_ids

TOKENS = 20
HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {USER_KEY}"}
PAUSE_S = 0.01
QUESTIONS = 4
"""Different ones."""


@dataclass
class Served:
    """What a well-behaved client got."""

    served: int = 0
    wrong: list[str] = field(default_factory=list)
    p50_ms: float = 0.0
    p99_ms: float = 0.0


@contextlib.contextmanager
def steady(server: Serving, workers: int, *, modelled: bool = True) -> Iterator[Served]:
    """Runs beside the block; filled in when it ends."""
    found = Served()
    kind = "modelled" if modelled else "real"
    command = [sys.executable, "-m", "tests.server.hostile.steady", str(server.port), str(workers), kind]
    root = Path(__file__).parents[3]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            yield found
            said, _ = process.communicate(timeout=PATIENCE_S)
            vars(found).update(json.loads(said))
        finally:
            process.kill()


class Client:
    """The well-behaved one."""

    def __init__(self, port: int, workers: int, kind: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        self._workers, self._modelled = workers, kind == "modelled"
        self._first: dict[int, list[int]] = {}
        """What a real server answered to each question at first."""

    def ask(self, number: int) -> str | None:
        """One request; what is wrong with the reply."""
        rid, question, stream = f"steady-{number}", number % QUESTIONS, number % 3 == 0
        params = {"max_new_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
        body = {"text": f"a good request {question}", "rid": rid, "stream": stream, "sampling_params": params}
        try:
            self._connection.request("POST", "/generate", json.dumps(body), HEADERS)
            reply = self._connection.getresponse()
            data = reply.read().decode()
            if reply.status != 200:
                return f"{rid}: status {reply.status}: {data[:200]}"
            last: dict[str, Any] = json.loads(data.split("\n\n")[-3][6:] if stream else data)
        except (OSError, http.client.HTTPException, ValueError, IndexError) as error:
            self._connection.close()
            return f"{rid}: {error!r}"
        if last["output_ids"] not in self._expected(question, rid, last["output_ids"]):
            return f"{rid}: other tokens"
        return None if last["text"] == TOKENIZER.decode(last["output_ids"]) else f"{rid}: another text"

    def _expected(self, question: int, rid: str, ids: list[int]) -> list[list[int]]:
        if self._modelled:
            return [oracle_ids(f"{worker}:{rid}", TOKENS) for worker in range(self._workers)]
        return [self._first.setdefault(question, ids)] if len(ids) == TOKENS else []


def main() -> None:
    """Ask until nobody wants more."""
    client = Client(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    found, latencies_ms = Served(), []
    while not select.select([sys.stdin], [], [], PAUSE_S)[0]:
        begin_s = time.monotonic()
        wrong = client.ask(len(latencies_ms))
        latencies_ms.append((time.monotonic() - begin_s) * 1000)
        if wrong is None:
            found.served += 1
        else:
            found.wrong.append(wrong)
    found.p50_ms, found.p99_ms = (float(value) for value in np.percentile(latencies_ms or [0.0], [50, 99]))
    print(json.dumps(vars(found)))


if __name__ == "__main__":
    main()
