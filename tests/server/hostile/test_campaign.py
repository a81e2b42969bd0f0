"""Some hundreds of hostile clients; the full size, and Schemathesis beside them, is the evidence of serve.3."""

from __future__ import annotations

import asyncio
import json
from itertools import islice

import pytest

from tests.server.hostile.campaign import Tally, assortment, attack_all
from tests.server.hostile.connections import END, SMUGGLED, Attack, get
from tests.server.hostile.footprint import held, left_behind, resident_bytes
from tests.server.hostile.steady import steady
from tests.server.hostile.target import WORKERS, known_attacks
from tests.server.hostile.verdict import Reply, objection, replies
from tests.server.serving import Serving

LIMIT_BYTES = 64 << 20
"""More than any part may grow while it is attacked; leaks of hostile sizes are larger."""


def test_hostile_clients_harm_nobody_and_leave_nothing(modelled: Serving) -> None:
    """Every connection and body of the menu, and as many changed at random, while others are served."""
    known = known_attacks(modelled)
    asyncio.run(attack_all(modelled.port, assortment(known, 300, seed=0), at_once=32))  # what is made once is there now
    before, memory = held(modelled, WORKERS), resident_bytes(modelled)
    with steady(modelled, WORKERS) as others:
        tally = asyncio.run(attack_all(modelled.port, assortment(known, 2 * len(known), seed=1), at_once=32))
    assert tally.objections == []
    assert tally.sent == 2 * len(known) and tally.statuses[400] > 500 and tally.statuses[200] > 50
    assert others.wrong == [] and others.served > 10
    assert left_behind(modelled, WORKERS, before) == []
    now = resident_bytes(modelled)  # a second compiler of grammars may have been started since
    grown = {part: now[part] - size for part, size in memory.items()}
    assert max(grown.values()) < LIMIT_BYTES, grown
    assert modelled.errors == ""


def test_more_connections_than_allowed_are_turned_away(single: Serving) -> None:
    before = held(single, 1)

    async def crowd() -> list[bytes]:
        streams = [await asyncio.open_connection("127.0.0.1", single.port) for _ in range(150)]
        told = await asyncio.gather(*(reader.read() for reader, _ in streams[100:]))
        for _, writer in streams:
            writer.transport.abort()
        return list(told)

    for told in asyncio.run(crowd()):
        (reply,) = replies(told)
        assert reply.status == 503 and objection(reply) is None
    assert left_behind(single, 1, before) == []


# -- the judge itself --------------------------------------------------------------------------------------------------

GOOD = Reply(200, {"content-type": "application/json"}, b"{}")


def error(message: str, status: int = 400, **headers: str) -> Reply:
    content = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return Reply(status, headers, json.dumps({"error": content}).encode())


@pytest.mark.parametrize(
    "reply",
    [
        error("All is well.", 500),
        error("All is well.", 502),
        error("All is well.", 503),
        error("ValueError: no.", 400),
        error("No such file: /home/me/model.", 400),
        error("The object at 0x7f3a12 is gone.", 400),
        error("Connect to 10.0.0.7.", 400),
        error("Traceback (most recent call last).", 400),
        error("See service.py for more.", 400),
        error("no sentence", 400),
        Reply(400, {}, b"Bad Request"),
        Reply(400, {}, b'{"error": {"message": NaN}}'),
        Reply(400, {}, b'{"detail": []}'),
        Reply(200, {"server": "uvicorn"}, b"{}"),
        Reply(200, {"content-type": "text/event-stream"}, b'data: {"error": {"message": "KeyError"}}\n\n'),
    ],
)
def test_the_judge_objects(reply: Reply) -> None:
    assert objection(reply) is not None


def test_the_judge_accepts() -> None:
    assert objection(error("Expected ::= behind /etc/passwd."), b'{"ebnf": "/etc/passwd"}') is None
    busy = error("Come again.", 503, **{"retry-after": "1"})._replace(body=b"")
    assert objection(GOOD) is None and objection(error("prompt is required.")) is None
    assert objection(busy, bodiless=True) is None


def test_replies_are_told_apart() -> None:
    one, two = b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n{}", b"HTTP/1.1 404 Not Found\r\n\r\n"
    assert replies(b"HTTP/1.1 100 Continue\r\n\r\n" + one + two) == [Reply(200, {"a": "b"}, b"{}"), Reply(404, {}, b"")]
    assert replies(b"") == []


def test_the_tally_objects_to_what_was_not_asked() -> None:
    said = b"HTTP/1.1 200 OK\r\n\r\n"
    for attack, heard in (
        (Attack("status", (), (400,)), said),
        (Attack("two for one", ()), said + said),
        (Attack("silence", (), (400,)), b""),
        (Attack("noise", ()), b"hello"),
    ):
        tally = Tally()
        tally.add(attack, heard)
        assert len(tally.objections) == 1, attack


def test_the_same_seed_makes_the_same_attacks() -> None:
    known = [Attack("one", (get(),)), Attack("two", (SMUGGLED + END.encode(),))]
    made = [list(islice(assortment(known, 200, seed), 200)) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2] and len(made[0]) == 200
    assert sum(attack in known for attack in made[0]) == 100
