"""A connection of a client, with the limits that uvicorn has not: the head's size and time, the time of a body that
nobody wants, what a client takes of what it is sent, and how many connections there are."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from testbed.server.protocol.errors import ApiError

Place = Literal["between", "head", "body"]
"""Where in a request the data has come to."""


class HeadTooLarge(Exception):
    """The head of a request is longer than allowed."""


class OpenTransport:
    """A transport to whose other end nothing is sent once it is closing: uvloop's raises then, and uvicorn hears of a
    connection's end only a moment later. And it does not close for ever."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, write_s: float) -> None:
        """``write_s``: what has not been taken so long after the closing is dropped."""
        self._transport, self._loop, self._write_s = transport, loop, write_s

    def write(self, data: bytes) -> None:
        """See asyncio.Transport."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """See asyncio.Transport."""
        if not self._transport.is_closing():
            self._transport.close()
            if self._transport.get_write_buffer_size():
                self._loop.call_later(self._write_s, self._transport.abort)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class ClientConnection(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        *,
        connections: int,
        header_s: float,
        body_s: float,
        write_s: float,
        header_bytes: int,
        **uvicorns: Any,
    ) -> None:
        """``connections``: open at a time; more are turned away. ``header_s``, ``header_bytes``: of a request's head.
        ``body_s``: of a body that is still on its way when its request has been answered. ``write_s``: for the client
        to take what is sent."""
        super().__init__(**uvicorns)
        self._connections_max = connections
        self._header_s, self._body_s, self._write_s = header_s, body_s, write_s
        self._header_bytes = header_bytes
        self._due: asyncio.TimerHandle | None = None
        """Runs while a head is expected, from the connection's start or from a request's first byte; and while a body
        is whose request has been answered."""
        self._unread: asyncio.TimerHandle | None = None
        """Runs while the client takes too little of what is sent."""
        self._place: Place = "between"
        self._head_bytes = 0
        self._too_large = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(OpenTransport(transport, self.loop, self._write_s))  # type: ignore[arg-type]
        if len(self.connections) > self._connections_max:
            error = ApiError("Too many connections; try again later.", status=503, retry_after_s=1)
            self._refuse(b"503 Service Unavailable", error)
            return
        self._expect(self._header_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._has_come()
        self._has_read()
        super().connection_lost(exc)

    # -- what comes ---------------------------------------------------------------------------------------------------

    def _expect(self, within_s: float) -> None:
        self._due = self.loop.call_later(within_s, self._is_late)

    def _has_come(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _is_late(self) -> None:
        self._due = None
        if self.cycle is None or (self._place == "head" and self.cycle.response_complete):
            self._refuse(b"408 Request Timeout", ApiError("The request's head took too long.", status=408))
        else:  # its request has been answered, or a reply is on its way that nothing may come into
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self.transport.is_closing():
            return
        before = self._place
        super().data_received(data)
        if self._place == "head" and before != "body":  # a header without end: the parser keeps it to itself
            self._head_bytes += len(data)
            if self._head_bytes > 2 * self._header_bytes:
                self._too_large = True
                self.send_400_response("")
        if self._due is None and self._is_waiting():
            self._expect(self._header_s)

    def _is_waiting(self) -> bool:
        """Whether more must come: the rest of a head; or, after bytes that began none, a whole one."""
        return self._place == "head" or (self._place == "between" and self.cycle.response_complete)

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
        self._has_come()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """See uvicorn, whose time for an idle connection ends with the next byte of a body that nobody wants."""
        super().on_response_complete()
        if self._place == "body" and self.cycle.response_complete and not self.transport.is_closing():
            self._expect(self._body_s)

    def on_message_complete(self) -> None:
        """See uvicorn."""
        super().on_message_complete()
        self._place = "between"
        if self._due is not None:  # the body of an answered request has come: now the next one may
            self._has_come()
            self._expect(self._header_s)

    # -- what is sent -------------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        self._unread = self.loop.call_later(self._write_s, self.transport.abort)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._has_read()
        super().resume_writing()

    def _has_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

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
