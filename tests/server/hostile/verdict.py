"""What a reply to a hostile request may be."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

INSIDE = re.compile(
    r"Traceback|\b\w*(?:Error|Exception|Warning)\b(?<!\berror)|\b0x[0-9a-fA-F]{3,}|\bat line \d+ in\b|File \""
    r"|/(?:home|usr|work|tmp|root|srv|opt|proc|var|dev|etc|mnt)\b|\.py\b|\.so\b|site-packages|ipc:|tcp:"
    r"|\btestbed\b|\bpydantic|\buvicorn|\bstarlette|\btorch\b|\bnumpy\b|\bNone\b|<class|object at"
    r"|\b\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b"
)
"""Text of exceptions, paths, addresses of memory and of machines, names of what the server is made of."""
REPLY = re.compile(rb"HTTP/1\.1 (\d{3})[^\r\n]*\r\n((?:[^\r\n]+\r\n)*)\r\n")


class Reply(NamedTuple):
    """One reply."""

    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes


def replies(data: bytes) -> list[Reply]:
    """What a server said over a connection. 100 (go on) is no reply of its own."""
    heads = list(REPLY.finditer(data))
    ends = [*(head.start() for head in heads), len(data)][1:]
    return [
        Reply(int(head[1]), _headers(head[2]), data[head.end() : end])
        for head, end in zip(heads, ends, strict=True)
        if head[1] != b"100"
    ]


def _headers(lines: bytes) -> dict[str, str]:
    pairs = (line.partition(": ") for line in lines.decode("latin-1").splitlines())
    return {name.lower(): value for name, _, value in pairs}


def objection(reply: Reply, sent: bytes = b"", *, bodiless: bool = False) -> str | None:
    """Why a server must not answer so; None when it may. ``sent``: the request; its own words may be told to a client.
    ``bodiless``: it was a HEAD."""
    status, headers, body = reply
    if status >= 500 and (status != 503 or not headers.get("retry-after", "").isdigit()):
        return f"status {status}: {body[:300]!r}"
    if told := _told("\n".join(f"{name}: {value}" for name, value in headers.items()), sent):
        return f"a header tells of the inside: {told}"
    if status < 400:
        return _in_stream(body, sent) if headers.get("content-type", "").startswith("text/event-stream") else None
    return None if bodiless else _in_error(status, body, sent)


def _told(text: str, sent: bytes) -> str:
    """What ``text`` tells of the inside, where the request has not said it."""
    return ", ".join(found[0] for found in INSIDE.finditer(text) if found[0].encode() not in sent)


def _in_stream(body: bytes, sent: bytes) -> str | None:
    """Of the errors that a stream tells."""
    for line in body.split(b"\n"):
        if line.startswith(b'data: {"error"'):
            return _in_error(200, line[6:].strip(), sent)
    return None


def _in_error(status: int, body: bytes, sent: bytes) -> str | None:
    try:
        error = json.loads(body.decode("utf-8"), parse_constant=_refuse)["error"]
        message, kind = error["message"], error["type"]
        complete = set(error) == {"message", "type", "param", "code"} and message.endswith(".")
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"status {status} with a body that is no error object: {body[:200]!r}"
    if not complete or kind not in KINDS:
        return f"status {status} with an incomplete error: {body[:200]!r}"
    if told := _told(body.decode("utf-8"), sent):
        return f"an error tells of the inside: {told} in {body[:300]!r}"
    return None


KINDS = (
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "rate_limit_error",
    "service_unavailable_error",
)


def _refuse(text: str) -> float:
    raise ValueError(text)
