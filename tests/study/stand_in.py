"""A server of OpenAI's API that does exactly what a test says, byte by byte, and stamps what it receives and sends."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

STREAM = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
TRY_OUT = "try-out"


@dataclass
class Asked:
    """A request as the stand-in received it, and the connection to answer on."""

    rid: str
    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]
    received_ns: int
    writer: asyncio.StreamWriter
    sent_ns: list[int] = field(default_factory=list)
    """When each token was about to be sent."""

    async def raw(self, data: bytes | str) -> None:
        """Send bytes as they are."""
        self.writer.write(data.encode() if isinstance(data, str) else data)
        await self.writer.drain()

    async def status(self, status: str, body: Any = None, *headers: str) -> None:
        """A whole answer that is no stream."""
        data = json.dumps(body)
        lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(data)}", *headers]
        await self.raw("\r\n".join([*lines, "", data]))

    async def part(self, data: bytes | str) -> None:
        """Bytes of the stream, as one piece of the transfer."""
        data = data.encode() if isinstance(data, str) else data
        await self.raw(b"%x\r\n%s\r\n" % (len(data), data))

    async def event(self, content: Any) -> None:
        """One event of the stream."""
        await self.part(f"data: {json.dumps(content, ensure_ascii=False)}\n\n")

    async def tokens(
        self, texts: list[str], finish: str | None = None, ids: list[int] | None = None, **fields: Any
    ) -> None:
        """One chunk that holds these tokens."""
        self.sent_ns.extend([time.perf_counter_ns()] * len(texts))
        choice: dict[str, Any] = {"index": 0, "text": "".join(texts), "finish_reason": finish}
        if ids is not None:
            choice["token_ids"] = ids
        await self.event({"choices": [choice], **fields})

    async def end(self, output_tokens: int | None = None, prompt_tokens: int | None = None) -> None:
        """The count, if there is to be one, and the end of the stream."""
        if output_tokens is not None:
            usage = {"prompt_tokens": prompt_tokens or len(self.body["prompt"]), "completion_tokens": output_tokens}
            await self.event({"choices": [], "usage": usage})
        await self.part("data: [DONE]\n\n")
        await self.raw("0\r\n\r\n")


Answer = Callable[[Asked], Awaitable[None]]


async def one_by_one(asked: Asked) -> None:
    """Every token in a chunk of its own, other requests in between, and the count at the end."""
    total = asked.body["max_tokens"]
    await asked.raw(STREAM)
    for number in range(total):
        await asyncio.sleep(0)
        await asked.tokens(["x"], finish="length" if number == total - 1 else None)
    await asked.end(total)


class StandIn:
    """Runs in a thread of its own while its block runs."""

    def __init__(self, answer: Answer = one_by_one, *, models: Any = None, patient: bool = True) -> None:
        """``models``: what it lists; ``patient``: the first request of one token is always answered well."""
        self.answer = answer
        self.models = {"data": [{"id": "stand-in"}]} if models is None else models
        self.patient = patient
        self.asked: dict[str, Asked] = {}
        """By id, in order of arrival; without the first one of one token."""
        self.tried: list[Asked] = []
        self.connections = 0
        self.open = self.most_open = 0
        self.arrived = threading.Semaphore(0)
        """One for each request."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while request := await self._read(reader, writer):
                await self._reply(request)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Asked | None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        rid = headers.get("x-request-id", "")
        return Asked(rid, first.split()[1], headers, json.loads(body) if body else {}, time.perf_counter_ns(), writer)

    async def _reply(self, asked: Asked) -> None:
        if asked.path.endswith("/models"):
            await asked.status("200 OK", self.models)
        elif asked.rid == TRY_OUT:
            self.tried.append(asked)
            await (one_by_one if self.patient else self.answer)(asked)
        else:
            self.asked[asked.rid] = asked
            self.open += 1
            self.most_open = max(self.open, self.most_open)
            self.arrived.release()
            try:
                await self.answer(asked)
            finally:
                self.open -= 1

    def __enter__(self) -> Self:
        self._thread.start()
        opening = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._server = opening.result(10)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
