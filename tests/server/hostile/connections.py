"""Clients who do not speak HTTP as one should: what each sends, and which answers are right."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tests.server.hostile.bodies import COMPLETIONS, GENERATE, mutated
from tests.server.serving import PATIENCE_S, USER_KEY

CLOSED = 0
"""Among answers: the connection may also be closed without one."""
DRIP_S = 0.05


@dataclass(frozen=True)
class Pause:
    """Wait before what comes next."""

    seconds: float = DRIP_S


@dataclass(frozen=True)
class HalfClose:
    """Say that nothing more will be sent, and listen."""


@dataclass(frozen=True)
class Leave:
    """Go away, with a FIN or with a RST, without listening to the rest. ``heard``: bytes listened to before."""

    reset: bool = False
    heard: int = 0


Step = bytes | Pause | HalfClose | Leave


@dataclass(frozen=True)
class Attack:
    """What one client does."""

    name: str
    steps: tuple[Step, ...]
    answers: tuple[int, ...] = ()
    """Statuses that are right for its first reply; none: any that is no server error. The reply to a last request
    which asks to close ends the connection, so that all is read to its end."""
    replies: int = 1
    """At most: more would mean that one request was taken for two."""
    deaf: bool = False
    """It reads as little as it can."""


HEAD = f"Host: x\r\nAuthorization: Bearer {USER_KEY}\r\n"
JSON = "Content-Type: application/json\r\n"
END = "Connection: close\r\n"
GOOD = b'{"prompt": "x", "max_tokens": 2, "ignore_eos": true}'
LONG = b'{"text": "x", "stream": true, "sampling_params": {"max_new_tokens": 1000, "ignore_eos": true}}'
WHOLE = LONG.replace(b'"stream": true', b'"stream": false')


def post(body: bytes, more: str = END, *, address: str = COMPLETIONS, length: str | int | None = None) -> bytes:
    """A request with a body; ``length``: another one than it has."""
    size = len(body) if length is None else length
    return f"POST {address} HTTP/1.1\r\n{HEAD}{JSON}Content-Length: {size}\r\n{more}\r\n".encode("latin-1") + body


def get(address: str = "/health", more: str = END, *, method: str = "GET", version: str = "HTTP/1.1") -> bytes:
    """A request without one."""
    return f"{method} {address} {version}\r\n{HEAD}{more}\r\n".encode("latin-1")


def chunked(data: bytes, more: str = END) -> bytes:
    """A request with a body in chunks, which are written as ``data`` says."""
    return f"POST {COMPLETIONS} HTTP/1.1\r\n{HEAD}{JSON}Transfer-Encoding: chunked\r\n{more}\r\n".encode() + data


def _chunk(data: bytes, size: str | None = None) -> bytes:
    return (f"{len(data):x}" if size is None else size).encode() + b"\r\n" + data + b"\r\n"


def _drip(data: bytes, parts: int) -> tuple[Step, ...]:
    size = -(-len(data) // parts)
    return tuple(step for at in range(0, len(data), size) for step in (data[at : at + size], Pause()))


SMUGGLED = get("/v1/models")
ONE = _chunk(GOOD) + b"0\r\n\r\n"
REFUSED = (400, CLOSED)

SMUGGLERS = [  # two readers might see two ends of one request
    Attack("length and chunks", (post(b"0\r\n\r\n" + SMUGGLED, "Transfer-Encoding: chunked\r\n", length=5),), REFUSED),
    Attack("chunks and length", (chunked(b"0\r\n\r\n" + SMUGGLED, "Content-Length: 5\r\n"),), REFUSED),
    Attack("two lengths", (post(GOOD + SMUGGLED, f"Content-Length: {len(GOOD) + 9}\r\n"),), REFUSED),
    Attack("a length twice", (post(GOOD, f"Content-Length: {len(GOOD)}\r\n{END}"), HalfClose()), (200, *REFUSED)),
    Attack("lengths in a list", (post(GOOD + SMUGGLED, length="5, 52"), HalfClose()), REFUSED),
    Attack("length +5", (post(GOOD, length="+5"),), REFUSED),
    Attack("length -1", (post(GOOD, length="-1"),), REFUSED),
    Attack("length 0x5", (post(GOOD, length="0x5"),), REFUSED),
    Attack("length 1e3", (post(GOOD, length="1e3"),), REFUSED),
    Attack("length of 30 digits", (post(GOOD, length="9" * 30),), REFUSED),
    Attack("length 2^63", (post(GOOD, length=2**63),), (413, *REFUSED)),
    Attack("length with a space", (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length : 5\r\n\r\nxxxxx",), REFUSED),
    Attack("chunked, identity", (chunked(ONE).replace(b": chunked", b": chunked, identity"), HalfClose()), REFUSED),
    Attack("xchunked", (chunked(ONE).replace(b": chunked", b": xchunked"), HalfClose()), REFUSED),
    Attack("chunked by tab", (chunked(ONE).replace(b": chunked", b":\tchunked"), HalfClose()), (200, *REFUSED)),
    Attack("chunk size that is no number", (chunked(_chunk(GOOD, "xyz")),), REFUSED),
    Attack("chunk size -5", (chunked(_chunk(GOOD, "-5")),), REFUSED),
    Attack("chunk size 0x34", (chunked(_chunk(GOOD, "0x34")),), REFUSED),
    Attack("chunk size overflow", (chunked(_chunk(GOOD, "f" * 17)),), REFUSED),
    Attack("chunk size wraps to 52", (chunked(_chunk(GOOD, "10000000000000034") + b"0\r\n\r\n"),), REFUSED),
    Attack("chunk longer than said", (chunked(_chunk(GOOD, "5")),), REFUSED),
    Attack("chunk extension without end", (chunked(b"5;" + b"a" * 300_000),), (408, 413, 431, *REFUSED)),
    Attack("trailers without end", (chunked(_chunk(GOOD) + b"0\r\n" + b"X: y\r\n" * 50_000),), (413, 431, *REFUSED)),
    Attack("chunks by bare LF", (chunked(b"%x\n%s\n0\n\n" % (len(GOOD), GOOD)), HalfClose()), REFUSED),
    Attack("head by bare LF", (post(GOOD).replace(b"\r\n", b"\n"), HalfClose()), REFUSED),
    Attack("head by bare CR", (post(GOOD).replace(b"\r\n", b"\r"), HalfClose()), REFUSED),
    Attack("folded header", (get(more="X: a\r\n b\r\n" + END),), (200, *REFUSED)),
    Attack("header without colon", (get(more="Evil\r\n" + END),), REFUSED),
    Attack("header without name", (get(more=": a\r\n" + END),), REFUSED),
    Attack("NUL in a header", (get(more="X: a\0b\r\n" + END),), REFUSED),
    Attack("CR in a header", (get(more="X: a\rb\r\n" + END),), REFUSED),
    Attack("two hosts", (get(more="Host: y\r\n" + END),), (200, *REFUSED)),
    Attack("8-bit header", (get(more="X-Ä: ü\xff\r\n" + END),), (200, *REFUSED)),
]
NO_HTTP = [
    Attack("TLS", (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), HalfClose()), REFUSED),
    Attack("HTTP/2", (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(50), HalfClose()), REFUSED),
    Attack("HTTP/0.9", (b"GET /health\r\n", HalfClose()), REFUSED),
    Attack("HTTP/9.9", (get(version="HTTP/9.9"),), REFUSED),
    Attack("HTTP/1.10", (get(version="HTTP/1.10"),), REFUSED),
    Attack("SSH", (b"SSH-2.0-OpenSSH_9.9\r\n", HalfClose()), REFUSED),
    Attack("Redis", (b"*1\r\n$4\r\nPING\r\n", HalfClose()), REFUSED),
    Attack("pickle", (b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.", HalfClose()), REFUSED),
    Attack("ZMQ", (b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\0NULL" + bytes(47), HalfClose()), REFUSED),
    Attack("nothing", (HalfClose(),), (408, CLOSED)),
    Attack("only ends of lines", (b"\r\n" * 1000, HalfClose()), (408, *REFUSED)),
    Attack("a method without end", (b"A" * 100_000,), (431, *REFUSED)),
]
METHODS = [
    *[Attack(f"method {name}", (get("/health", method=name),), (405,)) for name in ("TRACE", "OPTIONS", "PUT")],
    *[Attack(f"method {name}", (get("/generate", method=name),), (405,)) for name in ("DELETE", "PATCH", "PROPFIND")],
    Attack("method get", (get(method="get"),), REFUSED),
    Attack("method GETT", (get(method="GETT"),), REFUSED),
    Attack("method CONNECT", (get("x:1", method="CONNECT"), HalfClose()), (404, 405, *REFUSED)),
    Attack("a GET that would write", (get("/flush_cache"),), (405,)),
    Attack("a GET with a body", (get(more="Content-Length: 5\r\n" + END) + b"xxxxx",), (200,)),
    Attack("websocket", (get("/generate", "Upgrade: websocket\r\nConnection: upgrade, close\r\n"),), (405, CLOSED)),
    Attack("HTTP/2 by upgrade", (get(more="Upgrade: h2c\r\nConnection: upgrade, close\r\n"),), (200, *REFUSED)),
    Attack("a URL of another host", (get("http://evil.example/health"),), (200, 404, *REFUSED)),
    Attack("a path upwards", (get("/../../etc/passwd"),), (404, *REFUSED)),
    Attack("an escaped path upwards", (get("/%2e%2e/%2e%2e/etc/passwd%00"),), (404, *REFUSED)),
    Attack("a broken escape", (get("/%zz%f"),), (404, *REFUSED)),
    Attack("an 8-bit path", (get("/\xff\xfe"),), (404, *REFUSED)),
    Attack("a model that is a path", (get("/v1/models/..%2f..%2fetc%2fpasswd"),), (404,)),
    Attack("another origin", (get("/v1/models", "Origin: https://evil.example\r\n" + END),), (200,)),
    Attack("expectation", (post(GOOD, "Expect: 100-continue\r\n" + END),), (200,)),
    Attack("an unknown expectation", (post(GOOD, "Expect: the unexpected\r\n" + END),), (200, 417)),
    Attack("HTTP/1.0", (post(GOOD).replace(b"HTTP/1.1", b"HTTP/1.0"),), (200,)),
    Attack("a key in 8 bits", (get("/v1/models").replace(USER_KEY.encode(), b"\xc3\xa4\xff"),), (401, 400)),
    Attack("a long key", (get("/v1/models").replace(USER_KEY.encode(), b"k" * 60_000),), (401,)),
    Attack("no key", (get("/v1/models").replace(b"Bearer " + USER_KEY.encode(), b"Basic eDp5"),), (401,)),
]
TOO_MUCH = [
    Attack("20,000 headers", (get(more="X: y\r\n" * 20_000 + END), HalfClose()), (431, *REFUSED)),
    Attack("1 MB of a header", (get(more=f"X: {'a' * 1_000_000}\r\n{END}"), HalfClose()), (431, *REFUSED)),
    Attack("1 MB of a path", (get("/" + "a" * 1_000_000), HalfClose()), (431, *REFUSED)),
    Attack("a header without end", (get(more="X: ").removesuffix(b"\r\n") + b"a" * 300_000,), (431, *REFUSED)),
    Attack("a body of 10^12 bytes", (post(b"", length=10**12),), (413,)),
    Attack("200 kB of a body", (post(b" " * 200_000), HalfClose()), (413, CLOSED)),
    Attack("200 kB in chunks", (chunked(_chunk(b" " * 4000) * 50 + b"0\r\n\r\n"), HalfClose()), (413, CLOSED)),
    Attack("50,000 chunks of a byte", (chunked(_chunk(b" ") * 50_000 + b"0\r\n\r\n"), HalfClose()), (400, CLOSED)),
    Attack("gzip", (post(gzip.compress(GOOD), "Content-Encoding: gzip\r\n" + END),), (415,)),
    Attack("a bomb", (post(gzip.compress(bytes(10**7)), "Content-Encoding: gzip\r\n" + END),), (415,)),
    Attack("brotli, in chunks", (chunked(ONE, "Content-Encoding: br\r\n" + END),), (415,)),
    Attack("text", (post(GOOD).replace(b"application/json", b"text/plain"),), (415,)),
    Attack("a form", (post(b"prompt=x").replace(b"application/json", b"application/x-www-form-urlencoded"),), (415,)),
    Attack("no content type", (post(GOOD).replace(JSON.encode(), b""),), (415,)),
    Attack("UTF-16", (post('{"prompt": "x"}'.encode("utf-16")),), (400,)),
    Attack("UTF-7", (post(b'+AHs-"prompt": "x"}').replace(b"json\r", b"json; charset=utf-7\r"),), (400,)),
    Attack("depth 40,000", (post(b'{"prompt":' + b"[" * 40_000),), (400,)),
    Attack("a number of 90,000 digits", (post(b'{"prompt": "x", "seed": ' + b"9" * 90_000 + b"}"),), (400,)),
    Attack("20,000 elements", (post(json.dumps({"prompt": ["a"] * 15_000}).encode()),), (400,)),
    Attack("20,000 fields", (post(json.dumps({str(n): 0 for n in range(8_000)}).encode()),), (400,)),
]
UNWANTED = post(GOOD, "").replace(USER_KEY.encode(), b"wrong").removesuffix(GOOD)
"""The head of a request whose reply does not wait for its body."""
SLOW = [
    Attack("a slow head", (*_drip(get(), 60),), (408, CLOSED)),
    Attack("a slow body", (post(GOOD)[: -len(GOOD)], *_drip(GOOD, 60)), (408, CLOSED)),
    Attack("a body that does not come", (post(b"{", length=100),), (408, CLOSED)),
    Attack("a body that ends early", (post(b"{", length=100), HalfClose()), (400, CLOSED)),
    Attack("chunks without end", (chunked(_chunk(b" ")),), (408, CLOSED)),
    Attack("half a head", (get()[:20],), (408, CLOSED)),
    Attack("half a head, half-closed", (get()[:20], HalfClose()), (400, 408, CLOSED)),
    Attack("a slow body that nobody wants", (UNWANTED, Pause(), *_drip(GOOD, 60)), (401, CLOSED)),
    Attack("half a body that nobody wants", (UNWANTED, Pause(), GOOD[:9]), (401,)),
    Attack("a body that nobody wants", (UNWANTED, Pause(), GOOD), (401,)),
    Attack("ends of lines behind a reply", (get(more=""), Pause(), *_drip(b"\r\n" * 30, 60)), (200, CLOSED)),
    Attack("a body longer than said", (post(GOOD + b"GARBAGE\r\n\r\n", "", length=len(GOOD)),), (200, *REFUSED), 2),
    Attack("it does not read", (post(LONG, address=GENERATE), Pause(0.5)), (200,), deaf=True),
    Attack("it does not read and leaves", (post(LONG, address=GENERATE), Pause(0.3), Leave(True)), deaf=True),
]
LEAVING = [
    Attack("connect and go", (Leave(),)),
    Attack("connect and reset", (Leave(reset=True),)),
    Attack("half a head and go", (post(GOOD)[:40], Leave())),
    Attack("half a body and reset", (post(GOOD)[:-10], Leave(reset=True))),
    Attack("ask and go", (post(LONG, address=GENERATE), Leave())),
    Attack("ask and reset", (post(LONG, address=GENERATE), Leave(reset=True))),
    Attack("ask for the whole and go", (post(WHOLE, address=GENERATE), Pause(), Leave())),
    Attack("ask for the whole and reset", (post(WHOLE, address=GENERATE), Pause(0.01), Leave(reset=True))),
    Attack("ask for the whole, half-close", (post(WHOLE, address=GENERATE), HalfClose()), (200, CLOSED)),
    Attack("go in a stream", (post(LONG, address=GENERATE), Leave(heard=2000))),
    Attack("reset in a stream", (post(LONG, address=GENERATE), Leave(True, heard=20_000))),
    Attack("go behind the last token", (post(GOOD), Leave(heard=400))),
    Attack("half-close in a stream", (post(LONG, address=GENERATE), Pause(), HalfClose()), (200, CLOSED)),
    Attack("a hundred requests and go", (post(GOOD, "") * 100, Leave())),
]
ATTACKS = [*SMUGGLERS, *NO_HTTP, *METHODS, *TOO_MUCH, *SLOW, *LEAVING]


def pipelined(random: Random) -> Attack:
    """Some bodies that are nearly right, in one breath."""
    bodies = [mutated(random) for _ in range(random.randrange(2, 8))]
    sent = b"".join(post(body, "", address=address) for address, body in bodies)
    return Attack("in one breath", (sent + get(),), (), len(bodies) + 1)


def cut_anywhere(random: Random) -> Attack:
    """A good request that stops somewhere."""
    whole = post(GOOD)
    end = random.randrange(len(whole))
    return Attack("cut", (whole[:end], random.choice([HalfClose(), Leave(), Leave(reset=True)])), (400, 408, CLOSED))


def broken(random: Random) -> Attack:
    """A good request with some bytes changed."""
    data = bytearray(random.choice([post(GOOD), chunked(ONE), get("/v1/models")]))
    for _ in range(random.randrange(1, 5)):
        data[random.randrange(len(data))] = random.randrange(256)
    return Attack("broken", (bytes(data), HalfClose()), (), 2)


def body_attack(random: Random) -> Attack:
    """A body that is nearly right, as the outside should be."""
    address, body = mutated(random)
    return Attack("a changed body", (post(body, address=address),))


RANDOM: list[Callable[[Random], Attack]] = [pipelined, cut_anywhere, broken]


async def perform(port: int, attack: Attack) -> bytes | None:
    """Do it; returns all that was heard until the server closed the connection, None for who has left before.

    Raises TimeoutError when the server neither goes on nor closes.
    """
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(sock=await _connected(port, attack.deaf), limit=1 << 16)
        heard = bytearray()
        try:
            for step in attack.steps:
                if isinstance(step, bytes):
                    writer.write(step)
                    await writer.drain()
                elif isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                elif isinstance(step, HalfClose):
                    writer.write_eof()
                else:
                    await _hear(reader, heard, step.heard)
                    if step.reset:
                        linger = struct.pack("ii", 1, 0)
                        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    return None
            await _hear(reader, heard, 1 << 40)
        except OSError:  # closed while we were talking
            pass
        finally:
            writer.transport.abort()
        return bytes(heard)


async def _hear(reader: asyncio.StreamReader, heard: bytearray, size: int) -> None:
    while len(heard) < size and (data := await reader.read(1 << 16)):
        heard += data


async def _connected(port: int, deaf: bool) -> socket.socket:
    connection = socket.socket()
    connection.setblocking(False)
    if deaf:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    try:
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    except BaseException:
        connection.close()
        raise
    return connection
