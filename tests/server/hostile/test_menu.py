"""The rows of the test menu that are seen over HTTP (docs/test_menu.md), on a modelled and on a real device."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import re
import signal
import socket
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from testbed.server.app import Keys
from testbed.server.protocol.errors import ApiError
from tests.server.hostile.campaign import attack_all
from tests.server.hostile.connections import ATTACKS, Attack
from tests.server.hostile.footprint import held, left_behind
from tests.server.hostile.menu import menu
from tests.server.hostile.target import WORKERS, known_attacks
from tests.server.serving import ADMIN_KEY, TOKENIZER, Serving, oracle_ids

ROWS = sorted({attack.name for attack in menu(10, 10)}, key=lambda row: (row[0], int(row[1:])))


@pytest.fixture(params=["modelled", "real"])
def server(request: pytest.FixtureRequest) -> Serving:
    found: Serving = request.getfixturevalue(request.param)
    return found


def survived(server: Serving, attacks: Sequence[Attack]) -> None:
    """All are answered rightly, and the server goes on as before."""
    tally = asyncio.run(attack_all(server.port, iter(attacks), at_once=16))
    assert tally.objections == [] and tally.sent == len(attacks) > 0
    params = {"max_new_tokens": 2, "ignore_eos": True}
    assert len(server.ask("POST", "/generate", {"text": "x", "sampling_params": params})["output_ids"]) == 2
    server.comes_to_rest()
    assert server.errors == ""


@pytest.mark.parametrize("row", ROWS)
def test_the_bodies_of_a_row(server: Serving, row: str) -> None:
    survived(server, [attack for attack in known_attacks(server) if attack.name == row])


def test_every_connection_of_the_menu(server: Serving) -> None:
    """I12, I27, I28."""
    survived(server, ATTACKS)


# -- aborts and ids ----------------------------------------------------------------------------------------------------


def generate(server: Serving, rid: str, tokens: int, **fields: Any) -> Any:
    params = {"max_new_tokens": tokens, "ignore_eos": True}
    return server.ask("POST", "/generate", {"text": "hello", "rid": rid, "sampling_params": params, **fields})


def test_an_id_comes_back_right_after_its_end(modelled: Serving) -> None:
    """B11. A reply says that the id is free."""
    expected = [oracle_ids(f"{worker}:again", 3) for worker in range(WORKERS)]
    for _ in range(300):
        assert generate(modelled, "again", 3)["output_ids"] in expected
    modelled.comes_to_rest()


def test_one_id_many_times_at_once_is_served_once_by_a_worker(modelled: Serving) -> None:
    """B10: others are refused, and not harmed."""
    body = {"text": "x", "rid": "one", "sampling_params": {"max_new_tokens": 1000, "ignore_eos": True}}
    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda _: modelled.request("POST", "/generate", body), range(20)))
    served = [json.loads(data)["output_ids"] for status, _, data in replies if status == 200]
    assert served and {status for status, _, _ in replies} <= {200, 400}
    assert all(ids in [oracle_ids(f"{worker}:one", 1000) for worker in range(WORKERS)] for ids in served)
    modelled.comes_to_rest()


def test_probes_during_a_stall_leave_nothing(modelled: Serving) -> None:
    """B13: the scheduler stands still, fifty ask whether it lives and go away."""
    before = held(modelled, WORKERS)
    (scheduler,) = modelled.parts()["scheduler"]
    os.kill(scheduler, signal.SIGSTOP)
    try:
        with ExitStack() as stack:
            for _ in range(50):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", modelled.port)))
                connection.sendall(b"GET /health_generate HTTP/1.1\r\nAuthorization: Bearer user-key\r\n\r\n")
    finally:
        os.kill(scheduler, signal.SIGCONT)
    assert left_behind(modelled, WORKERS, before) == []
    assert modelled.request("GET", "/health_generate")[0] == 200


# -- text and usage ----------------------------------------------------------------------------------------------------


def native(server: Serving, **params: Any) -> list[tuple[str, list[int], Any, dict[str, int]]]:
    """(text, ids, reason, usage) of one request in one piece, and as a stream."""
    found = []
    for stream in (False, True):
        body = {"text": "hello", "rid": "same", "stream": stream, "sampling_params": {"ignore_eos": True, **params}}
        status, _, data = server.request("POST", "/generate", body)
        assert status == 200, data
        reply = json.loads(data.decode().split("\n\n")[-3][6:] if stream else data)
        info = reply["meta_info"]
        counts = {name: info[name] for name in ("prompt_tokens", "completion_tokens")}
        found.append((reply["text"], reply["output_ids"], info["finish_reason"], counts))
    return found


def test_every_rule_of_stopping_streamed_and_not(single: Serving) -> None:
    """G6: stop string, stop token, end of sequence, length."""
    ids = oracle_ids("0:same", 40)
    whole = TOKENIZER.decode(ids)
    stop, token = whole[20:23], ids[10]
    cut, before = whole[: whole.index(stop)], TOKENIZER.decode(ids[: ids.index(token)])
    for params, text, matched in (
        ({"stop": stop}, cut, stop),
        ({"stop": stop, "no_stop_trim": True}, cut + stop, stop),
        ({"stop_token_ids": [token]}, before, token),
    ):
        one, streamed = native(single, max_new_tokens=40, **params)
        assert one == streamed and one[0] == text and one[2] == {"type": "stop", "matched": matched}
        assert one[3]["completion_tokens"] == len(one[1]) < 40
    one, streamed = native(single, max_new_tokens=40)
    assert one == streamed and one[:3] == (whole, ids, {"type": "length", "length": 40})
    one, streamed = native(single, max_new_tokens=2000, ignore_eos=False)
    assert one == streamed and one[2] == {"type": "stop", "matched": one[1][-1]}


def test_usage_is_the_same_on_every_path(modelled: Serving) -> None:
    """G7, G8: completions, chats and /generate, in one piece and streamed, with usage at the end or all along."""
    for path, prompt in (
        ("/v1/completions", {"prompt": "some words to count"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "some words to count"}]}),
    ):
        found = []
        for stream, options in ((False, None), (True, {}), (True, {"continuous_usage_stats": True})):
            body: dict[str, Any] = {**prompt, "max_tokens": 7, "ignore_eos": True, "n": 2, "stream": stream}
            if options is not None:
                body["stream_options"] = {"include_usage": True, **options}
            status, _, data = modelled.request("POST", path, body)
            assert status == 200, data
            last = json.loads(data.decode().split("\n\n")[-3][6:] if stream else data)
            found.append((last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]))
        assert len(set(found)) == 1 and found[0][1] == 14, (path, found)
        if path == "/v1/completions":
            assert found[0][0] == len(TOKENIZER.encode("some words to count").ids)
    (one, streamed) = native(modelled, max_new_tokens=7)
    assert one[3] == streamed[3] == {"prompt_tokens": len(TOKENIZER.encode("hello").ids), "completion_tokens": 7}


def test_an_abort_in_a_stream_is_told_and_not_a_silent_end(modelled: Serving) -> None:
    """G9: what went wrong behind the head of a reply is an event of it, and the end is an end."""
    body = {"prompt": "x", "max_tokens": 1500, "ignore_eos": True, "stream": True, "rid": "cut"}
    with modelled.streaming("/v1/completions", body) as reply:
        reply.readline()
        assert modelled.request("POST", "/abort_request", {"abort_all": True}, key=ADMIN_KEY)[0] == 200
        events = reply.read().decode().strip().split("\n\n")
    assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "abort" and events[-1] == "data: [DONE]"


def test_the_cache_is_not_shared_across_salts(modelled: Serving) -> None:
    """I17."""
    prompt = [*range(100, 400)]

    def cached(salt: str) -> int:
        params = {"max_new_tokens": 1, "ignore_eos": True}
        body = {"input_ids": prompt, "cache_salt": salt, "sampling_params": params}
        return int(modelled.ask("POST", "/generate", body)["meta_info"]["cached_tokens"])

    assert [cached("a"), cached("b"), cached("")] == [0, 0, 0]
    assert cached("a") > 0 and cached("b") > 0 and cached("") > 0


# -- security ----------------------------------------------------------------------------------------------------------


def test_nothing_is_fetched(modelled: Serving) -> None:
    """I8, I23, H22: of a request that has addresses in every field, none is asked."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        parts = [{"type": kind, kind: {"url": url}} for kind in ("image_url", "input_audio", "file", "video_url")]
        bodies: list[tuple[str, Any]] = [
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": [part]}]}) for part in parts
        ]
        bodies += [("/v1/chat/completions", {"messages": [{"role": "user", "content": url}], "max_tokens": 1})]
        bodies += [("/generate", {"text": url, name: url}) for name in ("image_data", "lora_path", "video_data")]
        bodies += [("/v1/completions", {"prompt": url, "max_tokens": 1, "model": url})]
        bodies += [("/v1/completions", {"prompt": "x", "json_schema": {"$ref": url}})]
        for path, body in bodies:
            assert modelled.request("POST", path, body)[0] in (200, 400, 404)
        modelled.comes_to_rest()
        with pytest.raises(BlockingIOError):
            listener.accept()


def listening(pids: Sequence[int]) -> list[str]:
    """Addresses, ``HEX:PORT``, on which any of the processes listens for TCP or UDP."""
    opened = {str(link.readlink()) for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    inodes = {found[1] for name in opened if (found := re.fullmatch(r"socket:\[(\d+)\]", name))}
    found = []
    for kind, states in (("tcp", ("0A",)), ("tcp6", ("0A",)), ("udp", ("07", "01")), ("udp6", ("07", "01"))):
        for line in Path(f"/proc/net/{kind}").read_text(encoding="ascii").splitlines()[1:]:
            words = line.split()
            if words[9] in inodes and words[3] in states:
                found.append(words[1])
    return found


def test_only_the_http_port_listens_and_only_here(modelled: Serving) -> None:
    """I1, I19: the parts speak over sockets in a folder that nobody else may enter."""
    pids = [pid for pids in modelled.parts().values() for pid in pids] + [modelled.process.pid]
    assert set(listening(pids)) == {f"0100007F:{modelled.port:04X}"}
    (folder,) = modelled.folder.glob("testbed-serve-*")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_other_origins_are_given_nothing(modelled: Serving) -> None:
    """I25: no header allows a page of another origin to read a reply, and no GET changes anything."""
    origin = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for method in ("OPTIONS", "GET", "POST"):
        _, headers, _ = modelled.request(method, "/v1/models", headers=origin)
        assert not [name for name in headers if name.startswith("access-control")]
    for path in ("/flush_cache", "/abort_request", "/generate", "/v1/completions"):
        assert modelled.request("GET", path, key=ADMIN_KEY)[0] == 405


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """I11: always both, as digests of one length, whatever was sent."""
    compared: list[tuple[Any, Any]] = []
    compare: Callable[[Any, Any], bool] = hmac.compare_digest

    def counted(one: Any, other: Any) -> bool:
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    keys = Keys("the user's key", "the administrator's key")
    for sent in ("", "t", "the user's key", "the user's kez", "x" * 10_000, "\udcff"):
        header = f"Bearer {sent}".encode("latin-1", "replace")
        request = Request({"type": "http", "headers": [(b"authorization", header)]})
        if sent == "the user's key":
            keys.check(request, "user")
        else:
            with pytest.raises(ApiError):
                keys.check(request, "user")
        assert len(compared) == 2 and {len(part) for pair in compared for part in pair} == {32}
        compared.clear()


def test_prompts_are_not_logged(single: Serving) -> None:
    """I24: also not of requests that are refused."""
    marked = {"prompt": "a secret \n word", "max_tokens": 3, "ignore_eos": True}
    for body in (marked, {**marked, "n": 0}, {**marked, "logit_bias": {"-1": 1}}, {**marked, "regex": "secret("}):
        single.request("POST", "/v1/completions", body)
    assert "secret" not in single.errors and "secret" not in " ".join(single.said)
