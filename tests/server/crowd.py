"""Many clients at once, in a process of their own: ``python -m tests.server.crowd NAME JSON`` prints what they saw."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import aiohttp

from tests.server.hostile.connections import Attack, Leave, Pause, perform, post
from tests.server.hostile.verdict import replies
from tests.server.serving import ADMIN_KEY, USER_KEY, oracle_ids, oracle_texts

HEADERS = {"Authorization": f"Bearer {USER_KEY}"}
KEYS = ("--api-key", USER_KEY, "--admin-key", ADMIN_KEY)


def options(step_ns: int, running: int, queued: int, workers: int) -> tuple[str, ...]:
    """A modelled server whose decode steps take as long as is said, whatever is in them, and prefills 1 ms."""
    device = f"device={{constant: {{prefill_ns: 1000000, decode_ns: {step_ns}}}}}"
    sizes = ("--set", f"engine.max_running_requests={running}", "--set", "engine.kv_tokens=200000")
    limits = ("--max-queued", str(queued), "--workers", str(workers))
    return ("--backend", "paced", "--set", device, *sizes, *limits, *KEYS)


def crowd(name: str, **settings: Any) -> Any:
    """What the clients of that name saw: see the functions below. Raises CalledProcessError."""
    command = [sys.executable, "-m", "tests.server.crowd", name, json.dumps(settings)]
    root = Path(__file__).parents[2]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=root, check=True).stdout)


def session(port: int) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0)
    wait = aiohttp.ClientTimeout(total=None)
    return aiohttp.ClientSession(f"http://127.0.0.1:{port}", headers=HEADERS, connector=connector, timeout=wait)


# -- streams -----------------------------------------------------------------------------------------------------------


class Crowd:
    """How many streams are open."""

    def __init__(self) -> None:
        self.open = self.most = self.chunks = 0

    def begin(self) -> None:
        """One has had its first tokens."""
        self.open += 1
        self.most = max(self.most, self.open)


async def stream(client: aiohttp.ClientSession, seen: Crowd, number: int, tokens: int, workers: int) -> str | None:
    """One stream, of ids or of text; what is wrong with it."""
    name, ids, text, last = f"crowd-{number}", list[int](), "", b""
    params = {"max_new_tokens": tokens, "ignore_eos": True}
    native = {"text": f"client {number}", "rid": name, "stream": True, "sampling_params": params}
    openai = {"prompt": f"client {number}", "rid": name, "stream": True, "max_tokens": tokens, "ignore_eos": True}
    path, body = ("/generate", native) if number % 2 else ("/v1/completions", openai)
    async with client.post(path, json=body) as reply:
        if reply.status != 200:
            return f"{name}: status {reply.status}"
        begun = False
        async for line in reply.content:
            if not line.startswith(b"data: "):
                continue
            last = line[6:].strip()
            if last == b"[DONE]":
                continue
            if not begun:
                begun = True
                seen.begin()
            seen.chunks += 1
            chunk = json.loads(last)
            if "choices" in chunk:
                text += chunk["choices"][0]["text"]
            elif chunk["output_ids"][: len(ids)] != ids or not chunk["text"].startswith(text):
                return f"{name}: a chunk does not go on where the last one ended"
            else:
                ids, text = chunk["output_ids"], chunk["text"]
    seen.open -= 1
    if last != b"[DONE]":
        return f"{name}: it did not end"
    if number % 2 and ids not in [oracle_ids(f"{worker}:{name}", tokens) for worker in range(workers)]:
        return f"{name}: other tokens"
    return None if text in oracle_texts(name, tokens, workers) else f"{name}: another text"


async def streams(port: int, count: int, tokens: int, workers: int) -> dict[str, Any]:
    """``count`` at once: what was wrong, the most that were open at a time, chunks, seconds."""
    seen, begin_s = Crowd(), time.monotonic()
    async with session(port) as client:
        found = await asyncio.gather(*(stream(client, seen, number, tokens, workers) for number in range(count)))
    wrong = [one for one in found if one is not None]
    return {"wrong": wrong, "most": seen.most, "chunks": seen.chunks, "seconds": time.monotonic() - begin_s}


# -- leaving -----------------------------------------------------------------------------------------------------------

WAYS = ("go", "reset", "abort", "abort twice", "abort at once", "abort and go")


@dataclass(frozen=True)
class Leaver:
    """A client that does not want the rest."""

    name: str
    way: str
    stream: bool
    n: int
    patience_s: float
    tokens: int

    def sent(self) -> bytes:
        """Its request."""
        params = {"max_new_tokens": self.tokens, "ignore_eos": True, "n": self.n}
        body = {"text": "x" * 20, "rid": self.name, "stream": self.stream, "sampling_params": params}
        return post(json.dumps(body).encode(), address="/generate")

    async def leave(self, port: int, workers: int) -> tuple[str, str | None]:
        """Do so; returns how it ended and what is wrong with what it heard."""
        aborts = [self._abort(port) for _ in range(self.way.count("abort") + self.way.count("twice"))]
        steps = (self.sent(), Pause(self.patience_s), Leave(self.way == "reset"))
        if self.way in ("go", "reset", "abort and go"):
            await asyncio.gather(perform(port, Attack(self.way, steps)), *aborts)
            return "left", None
        heard, *_ = await asyncio.gather(perform(port, Attack(self.way, steps[:1])), *aborts)
        return self._judged(heard or b"", workers)

    async def _abort(self, port: int) -> None:
        if self.way != "abort at once":
            await asyncio.sleep(self.patience_s)
        body = json.dumps({"rid": self.name}).encode()
        heard = await perform(port, Attack("abort", (post(body, address="/abort_request"),)))
        assert heard is not None and [reply.status for reply in replies(heard)] == [200], heard

    def _judged(self, heard: bytes, workers: int) -> tuple[str, str | None]:
        """All that came must be a beginning of its own tokens, and an end."""
        found = replies(heard)
        if len(found) != 1 or found[0].status != 200:
            return "refused", f"{self}: {heard[:200]!r}"
        lines = found[0].body.splitlines()
        if self.stream:
            chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
            last = {chunk.get("index", 0): chunk for chunk in chunks}
            choices = [last[index] for index in sorted(last)]
        else:
            data = json.loads(found[0].body)
            choices = data if isinstance(data, list) else [data]
        if len(choices) != self.n or self.stream != (b"data: [DONE]" in lines):
            return "cut", f"{self}: {len(choices)} choices, or no end"
        for index, choice in enumerate(choices):
            rids = [f"{worker}:{self.name}" + (f":{index}" if index else "") for worker in range(workers)]
            if choice["output_ids"] not in [oracle_ids(rid, len(choice["output_ids"])) for rid in rids]:
                return "wrong", f"{self}: other tokens"
            if choice["meta_info"]["finish_reason"]["type"] not in ("abort", "length"):
                return "wrong", f"{self}: {choice['meta_info']}"
        return str(choices[0]["meta_info"]["finish_reason"]["type"]), None


async def leavers(
    port: int, count: int, at_once: int, tokens: int, workers: int, seed: int, prefix: str = "leaver"
) -> dict[str, Any]:
    """``count`` clients who disconnect or abort at random moments: what was wrong, how many went which way, and how
    they ended."""
    random, ways, ends, wrong = Random(seed), Counter[str](), Counter[str](), list[str]()
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            patience_s = random.choice((0.0, 0.001, 0.01, 0.05, 0.2))
            n = random.choice((1, 1, 1, 3))
            way = random.choice(WAYS)
            leaver = Leaver(f"{prefix}-{number}", way, random.random() < 0.5, n, patience_s, tokens)
            end, found = await leaver.leave(port, workers)
            ways[way] += 1
            ends[end] += 1
            wrong.extend([found] if found is not None else [])

    await asyncio.gather(*(client() for _ in range(at_once)))
    return {"wrong": wrong, "ways": dict(ways), "ends": dict(ends)}


# -- overload ----------------------------------------------------------------------------------------------------------


async def overload(port: int, phases: list[list[float]], tokens: int) -> list[list[float]]:
    """An open loop: in each of ``phases`` (requests a second, seconds) requests are sent at their times, whatever
    becomes of them. Returns for each (when it was due, how late it was sent, its latency, its status, Retry-After),
    in seconds from the start; -1 for a header that was not there."""
    due_s, at_s = list[float](), 0.0
    for rate, seconds in phases:
        due_s += [at_s + number / rate for number in range(round(rate * seconds))]
        at_s += seconds
    begin_s = time.monotonic()
    async with session(port) as client:

        async def one(due: float, number: int) -> list[float]:
            await asyncio.sleep(max(due - (time.monotonic() - begin_s), 0))
            sent_s = time.monotonic() - begin_s
            body = {"prompt": f"request {number}", "max_tokens": tokens, "ignore_eos": True}
            async with client.post("/v1/completions", json=body) as reply:
                await reply.read()
                ended_s = time.monotonic() - begin_s
                return [due, sent_s - due, ended_s - due, reply.status, float(reply.headers.get("Retry-After", -1))]

        return list(await asyncio.gather(*(one(due, number) for number, due in enumerate(due_s))))


CROWDS: dict[str, Callable[..., Awaitable[Any]]] = {"streams": streams, "leavers": leavers, "overload": overload}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(CROWDS[sys.argv[1]](**json.loads(sys.argv[2])))))  # type: ignore[arg-type]
