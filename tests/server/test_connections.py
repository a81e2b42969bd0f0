"""What comes over a connection that is no well-behaved client's: it is answered in words, and others are served."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

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
