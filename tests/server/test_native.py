"""SGLang's addresses, administration, and what everybody may see."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.requests import Request

from testbed.server.app import Keys
from testbed.server.protocol.errors import ApiError
from tests.server.serving import ADMIN_KEY, TOKENIZER, USER_KEY, Serving, oracle_ids

RIGHTS = {
    ("POST", "/v1/completions"): "user",
    ("POST", "/v1/chat/completions"): "user",
    ("POST", "/generate"): "user",
    ("GET", "/v1/models"): "user",
    ("GET", "/v1/models/{name}"): "user",
    ("POST", "/v1/embeddings"): "user",
    ("GET", "/health"): "open",
    ("GET", "/health_generate"): "user",
    ("GET", "/metrics"): "open",
    ("GET", "/get_server_info"): "user",
    ("GET", "/server_info"): "user",
    ("GET", "/get_model_info"): "user",
    ("GET", "/get_load"): "user",
    ("POST", "/abort_request"): "user",
    ("POST", "/flush_cache"): "admin",
}
"""Every address of the server, and who may call it."""
REFUSED = (401, 403)


def generate(server: Serving, **body: Any) -> Any:
    return server.ask("POST", "/generate", body)


def test_generate_gives_the_oracles_tokens(paced: Serving) -> None:
    reply = generate(paced, text="hello", rid="g-1", sampling_params={"max_new_tokens": 10, "ignore_eos": True})
    assert reply["output_ids"] in [oracle_ids(f"{worker}:g-1", 10) for worker in range(2)]
    assert reply["text"] == TOKENIZER.decode(reply["output_ids"])
    assert reply["meta_info"]["id"] == "g-1"
    assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 10}
    assert reply["meta_info"]["completion_tokens"] == 10


def test_a_batch_of_token_ids_with_ids_of_their_own(paced: Serving) -> None:
    params = {"max_new_tokens": 5, "ignore_eos": True}
    replies = generate(paced, input_ids=[[9, 10], [11]], rid=["b-1", "b-2"], sampling_params=params)
    assert [reply["meta_info"]["id"] for reply in replies] == ["b-1", "b-2"]
    assert [reply["meta_info"]["prompt_tokens"] for reply in replies] == [2, 1]
    for reply, rid in zip(replies, ("b-1", "b-2"), strict=True):
        assert reply["output_ids"] in [oracle_ids(f"{worker}:{rid}", 5) for worker in range(2)]


def test_chunks_of_a_stream_have_all_text_so_far(paced: Serving) -> None:
    body = {"text": "x", "stream": True, "rid": "s-1", "sampling_params": {"max_new_tokens": 6, "ignore_eos": True}}
    status, headers, data = paced.request("POST", "/generate", body)
    events = data.decode().strip().split("\n\n")
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert [len(chunk["output_ids"]) for chunk in chunks] == list(range(1, 7))
    for chunk in chunks:
        assert chunk["text"] == TOKENIZER.decode(chunk["output_ids"])
    assert [chunk["meta_info"]["finish_reason"] is None for chunk in chunks] == [True] * 5 + [False]


def test_a_request_that_heeds_the_end_of_sequence_ends_where_its_id_says(paced: Serving) -> None:
    """The same id at the same worker has the same length, drawn from the server's distribution; others differ."""
    params = {"max_new_tokens": 5000}
    lengths: dict[str, set[int]] = {}
    for rid in ("l-1", "l-2", "l-3") * 4:
        reply = generate(paced, text="x", rid=rid, sampling_params=params)
        assert reply["meta_info"]["finish_reason"]["type"] == "stop"
        lengths.setdefault(rid, set()).add(reply["meta_info"]["completion_tokens"])
    assert all(len(found) <= 2 for found in lengths.values())  # two workers, two ids at the scheduler
    assert len(set.union(*lengths.values())) >= 3


def test_an_id_that_is_being_served_is_refused_and_the_first_is_unharmed(tiny: Serving) -> None:
    body = {"text": "x", "stream": True, "rid": "twice", "sampling_params": {"max_new_tokens": 200, "ignore_eos": True}}
    with tiny.streaming("/generate", body) as first:
        first.readline()
        status, _, data = tiny.request("POST", "/generate", {**body, "stream": False})
        assert status == 400 and "being served" in json.loads(data)["error"]["message"]
        events = first.read().decode().strip().split("\n\n")
    last = json.loads(events[-2].removeprefix("data: "))
    assert last["meta_info"]["completion_tokens"] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_abort_ends_exactly_the_request_named(tiny: Serving, stream: bool) -> None:
    """Also while it is known by an id that begins another one's."""
    body = {"text": "x", "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True}}
    with (
        tiny.streaming("/generate", {**body, "rid": "r1", "stream": stream}, wait=stream) as one,
        tiny.streaming("/generate", {**body, "rid": "r10", "stream": True}) as other,
    ):
        other.readline()
        for rid in ("r1", "r1", "r", "nobody"):
            assert tiny.request("POST", "/abort_request", {"rid": rid})[0] == 200
        reply = (one if stream else one.getresponse()).read().decode()
        last = json.loads(reply.strip().split("\n\n")[-2].removeprefix("data: ") if stream else reply)
        assert last["meta_info"]["finish_reason"]["type"] == "abort"
        assert tiny.state()["running"] == 1
    tiny.comes_to_rest()


def test_health_and_load_and_info(paced: Serving) -> None:
    assert paced.request("GET", "/health", key="")[0] == 200
    assert paced.request("HEAD", "/metrics", key="")[0] == 200
    assert paced.request("GET", "/health_generate")[0] == 200
    paced.comes_to_rest()
    assert paced.ask("GET", "/get_load") == [{"dp_rank": 0, "num_reqs": 0, "num_waiting_reqs": 0, "num_tokens": 0}]
    info = paced.ask("GET", "/get_server_info")
    assert info["max_total_num_tokens"] == 20000 and info["limits"]["n"] == 8
    assert ADMIN_KEY not in json.dumps(info) and USER_KEY not in json.dumps(info)
    assert paced.ask("GET", "/get_model_info")["is_generation"]
    (model,) = paced.ask("GET", "/v1/models")["data"]
    assert model["max_model_len"] == 131072 and info["max_req_input_len"] < 20000  # of the model, and of the pool


def sample(server: Serving, name: str) -> float:
    page = server.request("GET", "/metrics", key="")[2].decode()
    return next(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"sglang:{name}"))


def test_metrics_count_what_was_asked_of_all_workers(paced: Serving) -> None:
    paced.comes_to_rest()
    names = ("num_requests_total", "generation_tokens_total", "num_so_requests_total")
    before = [sample(paced, name) for name in names]
    for _ in range(4):
        generate(paced, text="x", sampling_params={"max_new_tokens": 5, "ignore_eos": True})
    generate(paced, text="x", sampling_params={"max_new_tokens": 1, "regex": "[ab]{9}"})
    assert [sample(paced, name) for name in names] == [before[0] + 5, before[1] + 21, before[2] + 1]
    assert sample(paced, "num_running_reqs") == 0


def test_the_cache_is_flushed_by_administrators_when_nothing_runs(paced: Serving) -> None:
    generate(paced, text="some words to remember", sampling_params={"max_new_tokens": 5, "ignore_eos": True})
    assert paced.comes_to_rest()["evictable_tokens"] > 0
    assert paced.request("POST", "/flush_cache", key=ADMIN_KEY)[0] == 200
    assert paced.comes_to_rest()["evictable_tokens"] == 0
    assert paced.request("GET", "/flush_cache", key=ADMIN_KEY)[0] == 405


def test_all_is_aborted_by_administrators_only(paced: Serving) -> None:
    body = {"text": "x", "stream": True, "sampling_params": {"max_new_tokens": 19_000, "ignore_eos": True}}
    with paced.streaming("/generate", body) as reply:
        reply.readline()
        assert paced.request("POST", "/abort_request", {"abort_all": True})[0] == 401
        assert paced.request("POST", "/abort_request", {"abort_all": True}, key=ADMIN_KEY)[0] == 200
        last = json.loads(reply.read().decode().strip().split("\n\n")[-2].removeprefix("data: "))
        assert last["meta_info"]["finish_reason"]["type"] == "abort"
    paced.comes_to_rest()


@pytest.mark.parametrize("path", ["/v1/completions/", "/generate/", "//generate"])
def test_nothing_is_redirected(paced: Serving, path: str) -> None:
    """The place to go to would be the host that the client names."""
    status, headers, _ = paced.request("POST", path, {"prompt": "x"}, {"Host": "evil.example"})
    assert status == 404 and "location" not in headers


@pytest.mark.parametrize("key", ["key", "a b", "Schlüssel", "鍵", "\udcff"])
def test_a_key_is_any_bytes(key: str) -> None:
    sent = b"Bearer " + key.encode("utf-8", "surrogateescape")
    request = Request({"type": "http", "headers": [(b"authorization", sent)]})
    Keys(key, "admin").check(request, "user")
    for other in (key + "x", key[:-1], ""):
        with pytest.raises(ApiError):
            Keys(other or "other", "admin").check(request, "user")


def test_every_address_has_the_rights_of_the_table(paced: Serving, tiny: Serving) -> None:
    page = paced.ask("GET", "/openapi.json")
    found = {(method.upper(), path) for path, methods in page["paths"].items() for method in methods}
    assert found == set(RIGHTS)
    for (method, path), rights in RIGHTS.items():
        address = path.replace("{name}", "llama-3.1-8b")
        for key, allowed in (("", "open"), ("wrong", "open"), (USER_KEY, "user"), (ADMIN_KEY, "admin")):
            status = paced.request(method, address, b"", key=key)[0]
            may = rights == "open" or allowed == "admin" or allowed == rights
            assert (status not in REFUSED) == may, (method, address, key, status)
        status = tiny.request(method, address.replace("llama-3.1-8b", "tiny"), b"", key="")[0]
        assert (status not in REFUSED) == (rights != "admin"), (method, address, status)  # no keys at all


def test_what_a_modelled_server_cannot_compute_is_refused_by_name(paced: Serving) -> None:
    status, _, data = paced.request("POST", "/v1/completions", {"prompt": "x", "logprobs": 1})
    assert status == 400 and json.loads(data)["error"]["param"] == "logprobs"
