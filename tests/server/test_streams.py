"""Many requests at once: every token where it belongs, whoever leaves, and nothing left behind."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
from typing import Any

import aiohttp
import pytest

from tests.server.serving import ADMIN_KEY, PATIENCE_S, TOKENIZER, USER_KEY, Serving, oracle_ids

HEADERS = {"Authorization": f"Bearer {USER_KEY}"}


async def streamed(session: aiohttp.ClientSession, name: str, body: dict[str, Any]) -> tuple[list[int], str]:
    """(ids, text) of a stream of ``/generate``, whose chunks must each go on where the last one ended."""
    ids: list[int] = []
    text = ""
    async with session.post("/generate", json={**body, "rid": name, "stream": True}) as reply:
        assert reply.status == 200
        async for line in reply.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            assert chunk["output_ids"][: len(ids)] == ids and chunk["text"].startswith(text)
            ids, text = chunk["output_ids"], chunk["text"]
    assert line == b"\n"
    return ids, text


async def all_streams(server: Serving, bodies: dict[str, dict[str, Any]]) -> dict[str, tuple[list[int], str]]:
    async with aiohttp.ClientSession(server.url, headers=HEADERS, connector=aiohttp.TCPConnector(limit=0)) as session:
        found = await asyncio.gather(*(streamed(session, name, body) for name, body in bodies.items()))
    return dict(zip(bodies, found, strict=True))


def test_a_hundred_concurrent_streams_have_their_own_tokens(paced: Serving) -> None:
    """More than may run, in a pool that does not hold them all: some wait, some are retracted, some found a prefix."""
    draw = random.Random(5)
    shared = [draw.randrange(10, 4000) for _ in range(200)]
    bodies = {}
    for number in range(100):
        prompt = shared[: draw.randrange(1, 200)] + [draw.randrange(10, 4000) for _ in range(draw.randrange(1, 60))]
        params = {"max_new_tokens": draw.randrange(1, 300), "ignore_eos": True}
        bodies[f"many-{number}"] = {"input_ids": prompt, "sampling_params": params}
    found = asyncio.run(all_streams(paced, bodies))
    for name, (ids, text) in found.items():
        count = bodies[name]["sampling_params"]["max_new_tokens"]
        assert ids in [oracle_ids(f"{worker}:{name}", count) for worker in range(2)]
        assert text == TOKENIZER.decode(ids)
    paced.comes_to_rest()
    assert paced.ask("GET", "/get_load")[0]["num_tokens"] == 0


async def leave(session: aiohttp.ClientSession, draw: random.Random, name: str) -> None:
    """A client that goes away: before it hears anything, or after some chunks; streamed or not."""
    stream = draw.random() < 0.7
    params = {"max_new_tokens": 15_000, "ignore_eos": True, "n": draw.choice((1, 1, 3))}
    body = {"text": "x" * draw.randrange(1, 50), "rid": name, "stream": stream, "sampling_params": params}
    patience = draw.choice((0.0, 0.002, 0.02, 0.2))
    with pytest.raises((TimeoutError, asyncio.TimeoutError)):
        async with asyncio.timeout(patience), session.post("/generate", json=body) as reply:
            async for _ in reply.content:
                pass


def test_nothing_is_left_of_clients_who_leave(paced: Serving) -> None:
    async def all_leave() -> None:
        draw = random.Random(6)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(paced.url, headers=HEADERS, connector=connector) as session:
            await asyncio.gather(*(leave(session, draw, f"gone-{number}") for number in range(60)))

    asyncio.run(all_leave())
    paced.comes_to_rest()
    reply = paced.ask("POST", "/generate", {"text": "x", "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}})
    assert len(reply["output_ids"]) == 3


def test_more_than_the_queue_holds_is_turned_away_at_the_door(paced: Serving) -> None:
    """64 may run; 192 may wait by the door's count, 150 by the scheduler's. Of 400 at once, none of which ends before,
    the others are told to come again."""

    async def flood() -> list[tuple[int, str | None]]:
        params = {"max_new_tokens": 19_000, "ignore_eos": True}
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(paced.url, headers=HEADERS, connector=connector) as session:

            async def one() -> tuple[int, str | None]:
                async with session.post("/generate", json={"text": "x", "sampling_params": params}) as reply:
                    body = await reply.json()
                    assert reply.status == 200 or body["error"]["type"] == "service_unavailable_error"
                    return reply.status, reply.headers.get("Retry-After")

            left = {asyncio.create_task(one()) for _ in range(400)}
            replies: list[tuple[int, str | None]] = []
            while left:
                if replies.count((503, "1")) >= 400 - 64 - 150:
                    admin = {"Authorization": f"Bearer {ADMIN_KEY}"}
                    async with session.post("/abort_request", json={"abort_all": True}, headers=admin):
                        await asyncio.sleep(0.05)
                done, left = await asyncio.wait(left, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
                assert done
                replies += [task.result() for task in done]
            return replies

    replies = asyncio.run(flood())
    assert set(replies) == {(200, None), (503, "1")}
    assert replies.count((503, "1")) >= 400 - 64 - 150
    paced.comes_to_rest()


def test_n_is_refused_before_anything_is_made_of_it(paced: Serving) -> None:
    for n in (9, 5_000_000, 10**30):
        status, _, data = paced.request("POST", "/v1/completions", {"prompt": "x", "n": n})
        assert status == 400 and json.loads(data)["error"]["param"] == "n"


def test_a_client_that_does_not_read_is_cut_off(paced: Serving) -> None:
    """Chunks of ``/generate`` have all text so far: soon they fill whatever lies between the two."""
    body = {"text": "x", "stream": True, "sampling_params": {"max_new_tokens": 19_000, "ignore_eos": True}}
    with paced.streaming("/generate", body) as reply:
        paced.comes_to_rest()
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            reply.read()
