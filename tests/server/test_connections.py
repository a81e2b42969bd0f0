"""What comes over a connection that is no well-behaved client's: it is answered in words, and others are served."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import uvloop

from testbed.server.connection import OpenTransport
from tests.server.serving import PATIENCE_S, USER_KEY, Serving

HEAD = f"Host: x\r\nAuthorization: Bearer {USER_KEY}\r\nContent-Type: application/json\r\n"
GOOD = b'{"prompt": "x", "max_tokens": 2, "ignore_eos": true}'


@pytest.fixture(autouse=True)
def others_are_served(paced: Serving) -> Iterator[None]:
    yield
    assert paced.request("POST", "/v1/completions", GOOD)[0] == 200
    assert "Traceback" not in paced.errors


def said(server: Serving, *parts: bytes, shut: bool = False) -> bytes:
    """Everything that the server answers before it closes the connection."""
    found = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        try:
            for part in parts:
                connection.sendall(part)
            if shut:
                connection.shutdown(socket.SHUT_WR)
            while data := connection.recv(65536):
                found += data
        except ConnectionError:  # it has closed while we were talking
            pass
    return found


def status_of(reply: bytes) -> int:
    return int(reply.split(None, 2)[1])


def post(body: bytes, more: str = "", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return f"POST /v1/completions HTTP/1.1\r\n{HEAD}Content-Length: {size}\r\n{more}\r\n".encode() + body


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nBad Header\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_and_the_connection_closed(paced: Serving, data: bytes) -> None:
    reply = said(paced, data, shut=True)
    assert status_of(reply) == 400
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 300_000,
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_a_head_too_large_is_refused(paced: Serving, head: bytes) -> None:
    reply = said(paced, head)
    assert not reply or status_of(reply) == 431  # or reset, since we have not read while we wrote


def test_a_large_body_is_no_large_head(paced: Serving) -> None:
    body = json.dumps({"prompt": [11] * 19_000, "max_tokens": 1, "ignore_eos": True}).encode()
    assert 64 << 10 < len(body) < 100_000
    assert status_of(said(paced, post(body, "Connection: close\r\n"))) == 200


def test_a_head_that_does_not_come_is_not_waited_for(paced: Serving) -> None:
    assert status_of(said(paced, b"GET /health HTTP/1.1\r\nHost:")) == 408
    assert status_of(said(paced)) == 408


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (post(b"x" * 200_000, "Connection: close\r\n"), 413),
        (post(b"", length=10**12), 413),
        (post(GOOD, "Content-Encoding: gzip\r\nConnection: close\r\n"), 415),
        (post(GOOD, "Connection: close\r\n").replace(b"application/json", b"text/plain"), 415),
        (post(GOOD, "Connection: close\r\n").replace(b"application/json", b"application/json; charset=utf-8"), 200),
        (post(GOOD, "Connection: close\r\n").replace(b"HTTP/1.1", b"HTTP/1.0"), 200),
        (post(GOOD, "Connection: close\r\nExpect: 100-continue\r\n"), 100),
        (post(b"{", "Connection: close\r\n"), 400),
        (post(b"\xff\xfe{\x00}\x00", "Connection: close\r\n"), 400),
        (post(GOOD, "Connection: close\r\n").replace(b"POST", b"DELETE"), 405),
        (post(GOOD, "Connection: close\r\n").replace(b"/v1/completions", b"/v1/nothing"), 404),
        (post(GOOD, "Connection: close\r\n").replace(b"/v1/completions", b"/../../etc/passwd"), 404),
    ],
)
def test_requests_that_are_refused_by_their_outside(paced: Serving, sent: bytes, status: int) -> None:
    assert status_of(said(paced, sent)) == status


def test_chunks_without_end_are_bounded_like_any_body(paced: Serving) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode()
    reply = said(paced, head, *[b"4000\r\n" + b"x" * 0x4000 + b"\r\n"] * 10)
    assert not reply or status_of(reply) == 413


def test_a_body_behind_its_refusal_is_let_in_and_the_connection_goes_on(paced: Serving) -> None:
    wrong = post(GOOD).replace(USER_KEY.encode(), b"wrong")
    with socket.create_connection(("127.0.0.1", paced.port), timeout=PATIENCE_S) as connection:
        connection.sendall(wrong.removesuffix(GOOD))
        refused = json.loads(read_reply(connection, 401))
        assert refused["error"]["code"] == "invalid_api_key"
        connection.sendall(GOOD[:9])
        connection.sendall(GOOD[9:] + post(GOOD, "Connection: close\r\n"))
        assert json.loads(read_reply(connection, 200))["usage"]["completion_tokens"] == 2
        assert connection.recv(1) == b""


def read_reply(connection: socket.socket, status: int) -> bytes:
    """The body of the next reply, which has this status."""
    with closing(http.client.HTTPResponse(connection)) as reply:
        reply.begin()
        assert reply.status == status
        return reply.read()


def test_who_takes_nothing_is_cut_off_whatever_was_asked(paced: Serving) -> None:
    """Not only generated text: a page that is asked for again and again."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.settimeout(PATIENCE_S)
        connection.connect(("127.0.0.1", paced.port))
        connection.sendall(f"GET /openapi.json HTTP/1.1\r\n{HEAD}\r\n".encode() * 400)
        assert connection.recv(1)
        until = time.monotonic() + PATIENCE_S
        while is_held(paced.port, connection.getsockname()[1]):
            assert time.monotonic() < until
            time.sleep(0.05)


def is_held(server_port: int, client_port: int) -> bool:
    """Whether the server has its end of this connection open still (proc(5): state 01, ESTABLISHED)."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]]
    ends = f":{server_port:04X}", f":{client_port:04X}"
    return any(row[1].endswith(ends[0]) and row[2].endswith(ends[1]) and row[3] == "01" for row in rows)


def test_a_connection_does_not_close_for_ever() -> None:
    """Whoever does not take the end of a reply is dropped with it."""

    class Told(asyncio.Protocol):
        def __init__(self) -> None:
            self.lost = asyncio.Event()

        def connection_lost(self, error: Exception | None) -> None:
            self.lost.set()

    async def close_on_the_deaf() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            loop = asyncio.get_running_loop()
            transport, protocol = await loop.connect_accepted_socket(Told, ours)
            client = OpenTransport(transport, loop, write_s=0.01)
            client.write(bytes(10_000_000))
            client.close()
            assert not protocol.lost.is_set()
            async with asyncio.timeout(PATIENCE_S):
                await protocol.lost.wait()

    uvloop.run(close_on_the_deaf())


def test_a_hundred_requests_in_one_breath_are_answered_in_order(paced: Serving) -> None:
    ask = b"GET /v1/models HTTP/1.1\r\n" + HEAD.encode() + b"\r\n"
    last = b"GET /nothing HTTP/1.1\r\nConnection: close\r\n" + HEAD.encode() + b"\r\n"
    reply = said(paced, ask * 100 + last)
    assert reply.count(b"HTTP/1.1 200 OK") == 100 and reply.rindex(b"HTTP/1.1 404") > reply.rindex(b"HTTP/1.1 200")


def test_half_a_request_and_gone(paced: Serving) -> None:
    for end in range(0, len(post(GOOD)), 7):
        with socket.create_connection(("127.0.0.1", paced.port), timeout=PATIENCE_S) as connection:
            connection.sendall(post(GOOD)[:end])
    paced.comes_to_rest()
