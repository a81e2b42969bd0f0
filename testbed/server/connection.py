"""A connection of a client, with the limits that uvicorn has not: the head's size and time, and how many there are."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from testbed.server.protocol.errors import ApiError

Place = Literal["between", "head", "body"]
"""Where in a request the data has come to."""
CUT = "testbed.cut"
"""In a request's scope: a function that drops the connection, with whatever is not sent yet."""


class HeadTooLarge(Exception):
    """The head of a request is longer than allowed."""


class OpenTransport:
    """A transport to whose other end nothing is sent once it is closing: uvloop's raises then, and uvicorn hears of a
    connection's end only a moment later."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def write(self, data: bytes) -> None:
        """See asyncio.Transport."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class ClientConnection(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *, connections: int, header_s: float, header_bytes: int, **uvicorns: Any) -> None:
        """``connections``: open at a time; more are turned away. ``header_s``, ``header_bytes``: of a request's
        head."""
        super().__init__(**uvicorns)
        self._connections_max = connections
        self._header_s, self._header_bytes = header_s, header_bytes
        self._head_timer: asyncio.TimerHandle | None = None
        """Runs while a head is expected: from the connection's start, or from a request's first byte."""
        self._place: Place = "between"
        self._head_bytes = 0
        self._too_large = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(OpenTransport(transport))  # type: ignore[arg-type]
        if len(self.connections) > self._connections_max:
            error = ApiError("Too many connections; try again later.", status=503, retry_after_s=1)
            self._refuse(b"503 Service Unavailable", error)
            return
        self._expect_head()

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._header_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self._refuse(b"408 Request Timeout", ApiError("The request's head took too long.", status=408))

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._head_has_come()
        super().connection_lost(exc)

    def _head_has_come(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self.transport.is_closing():
            return
        if self._place != "body" and self._head_timer is None:
            self._expect_head()
        before = self._place
        super().data_received(data)
        if self._place == "head" and before != "body":  # a header without end: the parser keeps it to itself
            self._head_bytes += len(data)
            if self._head_bytes > 2 * self._header_bytes:
                self._too_large = True
                self.send_400_response("")

    def on_message_begin(self) -> None:
        """See uvicorn."""
        self._place, self._head_bytes = "head", 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """See uvicorn."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """See uvicorn."""
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._header_bytes:
            self._too_large = True
            raise HeadTooLarge  # the parser gives up, and the reply is 431 (see send_400_response)

    def on_headers_complete(self) -> None:
        """See uvicorn."""
        self._place = "body"
        self._head_has_come()
        self.scope[CUT] = self.transport.abort  # type: ignore[literal-required]
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """See uvicorn."""
        super().on_message_complete()
        self._place = "between"

    def send_400_response(self, msg: str) -> None:
        """See uvicorn: the reply to what is no HTTP."""
        if self._too_large:
            error = ApiError("The request's head is too large.", status=431)
            self._refuse(b"431 Request Header Fields Too Large", error)
        else:
            self._refuse(b"400 Bad Request", ApiError("This is not a valid HTTP request."))

    def _refuse(self, status: bytes, error: ApiError) -> None:
        """Answer without the application, and close."""
        body = error.body()
        headers = [b"content-type: application/json", b"content-length: %d" % len(body), b"connection: close"]
        headers += [f"{name.lower()}: {value}".encode() for name, value in error.headers().items()]
        self.transport.write(b"\r\n".join([b"HTTP/1.1 " + status, *headers, b"", body]))
        self.transport.close()
