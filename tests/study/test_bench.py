"""The client of ``testbed bench`` against a server that does what each test says."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from testbed import simulate
from testbed.deployment import build_engine
from testbed.messages import GenerateRequest, TokenPrompt
from testbed.metrics.laws import violations
from testbed.metrics.run import Run
from testbed.scenario.errors import InputError
from testbed.scenario.load import load_scenario
from testbed.study.bench import Server, bench, client
from testbed.study.bench.exchange import Failure
from testbed.study.compare import compare
from testbed.tokens import stream_key
from testbed.workload import TimedRequest
from tests.study.stand_in import STREAM, Answer, Asked, StandIn, one_by_one

REQUESTS = 12


def scenario(**workload: Any) -> Any:
    """A small open loop, unless ``workload`` says otherwise."""
    drawn = {
        "arrivals": {"kind": "poisson", "rate_per_s": 400},
        "lengths": {
            "prompt_tokens": {"kind": "uniform", "low": 3, "high": 40},
            "output_tokens": {"kind": "uniform", "low": 1, "high": 8},
        },
        "count": REQUESTS,
    }
    content = {
        "name": "bench",
        "model": "qwen3-0.6b",
        "device": {"constant": {"prefill_ns": 1000, "decode_ns": 1000}},
        "host": "none",
        "engine": {"kv_tokens": 10_000},
        "workload": drawn | workload,
    }
    return load_scenario(content).scenario


def timed_requests(chosen: Any) -> list[Any]:
    """What an open loop sends, in order."""
    return list(build_engine(chosen).workload.start())


def run_against(answer: Answer, chosen: Any = None, **asked: Any) -> tuple[Run, StandIn]:
    with StandIn(answer) as server:
        return bench(Server(server.url, **asked), scenario() if chosen is None else chosen), server


async def slowly(asked: Asked) -> None:
    """As ``one_by_one``, with time between the tokens."""
    await asked.raw(STREAM)
    for left in range(asked.body["max_tokens"], 0, -1):
        await asyncio.sleep(0.002)
        await asked.tokens(["x"], finish="length" if left == 1 else None)
    await asked.end(asked.body["max_tokens"])


def notes(run: Run) -> list[str]:
    """What the run says, but for how busy this machine was."""
    return [note for note in run.meta["notes"] if not note.startswith("the driver ")]


class TestSending:
    def test_every_request_of_the_simulation_is_sent_and_ends_once(self) -> None:
        chosen = scenario()
        run, server = run_against(one_by_one, chosen)
        simulated = simulate(chosen)
        vocab = build_engine(chosen).model.vocab
        expected = timed_requests(chosen)
        assert run.records.requests["id"] == simulated.records.requests["id"] == [one.request.rid for one in expected]
        assert sorted(server.asked) == sorted(run.records.requests["id"])  # connections may overtake one another
        for timed in expected:
            body = server.asked[timed.request.rid].body
            assert body["prompt"] == timed.request.prompt.ids(vocab).tolist()
            assert body["max_tokens"] == timed.output_tokens
            assert (body["ignore_eos"], body["stream"], body["model"]) == (True, True, "stand-in")
            assert "seed" not in body and body["temperature"] == 0
            assert server.asked[timed.request.rid].headers["accept-encoding"] == "identity"  # nothing is held back
        for column in ("arrival_ns", "prompt_tokens", "output_tokens", "max_new_tokens", "finish_reason"):
            assert np.array_equal(run.records.requests[column], simulated.records.requests[column]), column
        assert run.records.requests["finish_reason"] == ["length"] * REQUESTS
        assert set(run.records.requests["status"].tolist()) == {200}
        assert violations(run.records) == []

    def test_times_are_those_of_the_wire(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drivers: list[client.Driver] = []
        whole = client.Driver.run

        async def spied(self: client.Driver, model: str) -> Any:
            drivers.append(self)
            return await whole(self, model)

        monkeypatch.setattr(client.Driver, "run", spied)
        run, server = run_against(slowly)
        origin = drivers[0]._origin_ns
        sent = run.records.requests["sent_ns"]
        assert (sent >= run.records.requests["arrival_ns"]).all()
        stamps = []
        for row, rid in enumerate(run.records.requests["id"]):
            asked, times = server.asked[rid], origin + run.token_times(row)
            assert asked.received_ns >= origin + sent[row]
            assert len(times) == len(asked.sent_ns)
            assert (times >= np.array(asked.sent_ns)).all()  # nothing is seen before it was sent
            assert (np.diff(times) >= 0).all()
            stamps += zip(asked.sent_ns, times.tolist(), strict=True)
        # One token seen before another was sent, of whatever requests: their order is known.
        assert all(one[1] <= other[1] for one in stamps for other in stamps if one[1] < other[0])
        assert len({seen for _, seen in stamps}) > REQUESTS  # they did not come all at once

    def test_an_open_loop_does_not_wait_for_answers(self) -> None:
        """The server answers nobody before it has heard of everybody."""
        everybody = asyncio.Event()

        async def answer(asked: Asked) -> None:
            if server.open == REQUESTS:
                everybody.set()
            await everybody.wait()
            await one_by_one(asked)

        with StandIn(answer) as server:
            run = bench(Server(server.url, timeout_s=30), scenario())
        assert run.aggregates()["completed"] == REQUESTS and server.most_open == REQUESTS
        assert run.records.requests["first_token_ns"].min() >= run.records.requests["sent_ns"].max()

    def test_a_late_driver_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        body = client.Asking.body

        written_ns: list[int] = []

        def slow(self: client.Asking, timed: Any) -> bytes:
            time.sleep(0.02)
            written_ns.append(time.perf_counter_ns())
            return body(self, timed)

        monkeypatch.setattr(client.Asking, "body", slow)
        run, server = run_against(one_by_one, scenario(arrivals={"kind": "all_at_once"}))
        late = run.records.requests["sent_ns"] - run.records.requests["arrival_ns"]
        assert set(run.records.requests["arrival_ns"].tolist()) == {0}
        assert (late >= 20e6 * np.arange(1, REQUESTS + 1)).all()
        figures = run.aggregates()
        assert figures["max_send_delay_ms"] == late.max() / 1e6 >= figures["p99_send_delay_ms"] > 200
        assert figures["mean_ttft_ms"] >= figures["mean_send_delay_ms"]  # it counts from when it was due
        assert any(note.startswith("the driver was late") for note in run.meta["notes"])
        assert server.asked["r0"].received_ns < written_ns[-1]  # the first does not wait until all are written out

    def test_it_may_have_as_many_connections_as_the_system_grants(self) -> None:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(500, before[1]), before[1]))
        try:
            run_against(one_by_one)
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)

    def test_connections_are_used_again(self) -> None:
        run, server = run_against(one_by_one, scenario(arrivals={"kind": "closed_loop", "users": 1}))
        assert run.aggregates()["completed"] == REQUESTS
        assert server.connections == 1  # of the list of models, the first token and all requests

    def test_sampling_is_sent_with_the_seed_of_the_engine(self) -> None:
        sampling = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "presence_penalty": 0.5}
        chosen = scenario(sampling=sampling, ignore_eos=False, count=3)
        _, server = run_against(one_by_one, chosen)
        for rid, asked in server.asked.items():
            assert {name: asked.body[name] for name in sampling} == sampling
            assert asked.body["seed"] % 2**64 == stream_key("sampling", chosen.seed, rid)
            assert -(2**63) <= asked.body["seed"] < 2**63
            assert asked.body["ignore_eos"] is False
            assert not {"frequency_penalty", "repetition_penalty", "priority", "return_token_ids"} & set(asked.body)

    def test_a_long_prompt(self) -> None:
        chosen = scenario(lengths={"prompt_tokens": 200_000, "output_tokens": 1}, count=1)
        chosen = chosen.model_copy(
            update={"engine": chosen.engine.model_copy(update={"kv_tokens": 300_000, "context_length": 300_000})}
        )
        run, server = run_against(one_by_one, chosen)
        assert len(server.asked["r0"].body["prompt"]) == 200_000
        assert run.aggregates()["completed"] == 1


class TestReacting:
    def test_a_closed_loop_has_as_many_open_as_users(self) -> None:
        async def answer(asked: Asked) -> None:
            if asked.rid in ("r0", "r1", "r2"):  # nobody is answered before all users are there
                while server.most_open < 3:
                    await asyncio.sleep(0.001)
            await one_by_one(asked)

        with StandIn(answer) as server:
            run = bench(Server(server.url), scenario(arrivals={"kind": "closed_loop", "users": 3}))
        assert server.most_open == 3
        assert run.aggregates()["completed"] == REQUESTS
        table = run.requests
        for row, arrival in enumerate(table.arrival_ns[3:], start=3):  # each waited for an end
            assert (table.finish_ns[:row] <= arrival).sum() >= row - 2

    def test_a_turn_repeats_the_ids_that_the_server_sent(self) -> None:
        async def answer(asked: Asked) -> None:
            total = asked.body["max_tokens"]
            ids = [stream_key(asked.rid, place) % 1000 for place in range(total)]
            made[asked.rid] = ids
            await asked.raw(STREAM)
            await asked.tokens(["x"] * (total - 1), ids=ids[:-1])
            await asked.tokens(["x"], ids=ids[-1:], finish="length")
            await asked.end(total)

        made: dict[str, list[int]] = {}
        run, server = run_against(answer, self._sessions())
        assert len(server.asked) == 9 and run.records.requests["session"][:3].count("s0") <= 3
        for session in range(3):
            for turn in (1, 2):
                before = server.asked[f"s{session}.t{turn - 1}"]
                said = before.body["prompt"] + made[before.rid]
                prompt = server.asked[f"s{session}.t{turn}"].body["prompt"]
                assert prompt[: len(said)] == said and len(prompt) == len(said) + 6
                assert before.body["return_token_ids"] is True
        assert notes(run) == []

    def test_without_ids_a_turn_has_others_in_their_place(self) -> None:
        run, server = run_against(one_by_one, self._sessions())
        assert len(server.asked) == 9
        first, second = (server.asked[f"s0.t{turn}"].body for turn in (0, 1))
        said = len(first["prompt"]) + first["max_tokens"]
        assert second["prompt"][: len(first["prompt"])] == first["prompt"] and len(second["prompt"]) == said + 6
        assert any("9 turns of sessions: the server sent no token ids" in note for note in run.meta["notes"])

    def test_a_broken_turn_ends_its_session(self) -> None:
        async def answer(asked: Asked) -> None:
            await (asked.status("500 No", {}) if asked.rid == "s1.t0" else one_by_one(asked))

        run, server = run_against(answer, self._sessions())
        assert sorted(server.asked) == [f"s{session}.t{turn}" for session, turn in
                                        ((0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2))]  # fmt: skip
        assert any("2 turns were not sent: a turn before" in note for note in run.meta["notes"])

    @staticmethod
    def _sessions() -> Any:
        return scenario(
            sessions={"turns": 3, "user_tokens": 6}, count=3, lengths={"prompt_tokens": 10, "output_tokens": 5}
        )

    @pytest.mark.parametrize(
        ("header", "pause_s"),
        [
            ((), 5000),
            (("Retry-After: 7",), 7),
            (("Retry-After: 99999",), 9000),
            (("Retry-After: Fri, 31 Dec 2999 23:59:59 GMT",), 5000),
        ],
    )
    def test_a_refused_user_pauses_as_long_as_the_server_says(
        self, header: tuple[str, ...], pause_s: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client, "PAUSE_S", 5000.0)
        monkeypatch.setattr(client, "PAUSE_MAX_S", 9000.0)
        heard: dict[str, int] = {}
        built = client.check_bench

        class Deaf:
            """A workload whose users never send again."""

            def __init__(self, workload: Any) -> None:
                self.start, self.notes = workload.start, workload.notes

            def on_finish(self, rid: str, now_ns: int, output_ids: Any) -> tuple[()]:
                heard[rid] = now_ns
                return ()

        monkeypatch.setattr(
            client, "check_bench", lambda chosen: replace(built(chosen), workload=Deaf(built(chosen).workload))
        )

        async def answer(asked: Asked) -> None:
            await (asked.status("503 Busy", {}, *header) if asked.rid == "r0" else one_by_one(asked))

        run, _ = run_against(answer, scenario(count=2))
        pauses = [heard[rid] - end for rid, end in zip(("r0", "r1"), run.records.requests["finish_ns"], strict=True)]
        assert pause_s * 1e9 <= pauses[0] < (pause_s + 1000) * 1e9 and 0 <= pauses[1] < 1000e9


async def _close(asked: Asked) -> None:
    asked.writer.close()


async def _partly(asked: Asked) -> None:
    await asked.raw(STREAM)
    await asked.tokens(["x"])
    await asked.tokens(["x"])


async def _dies(asked: Asked) -> None:
    await _partly(asked)
    await asked.raw(b'40\r\ndata: {"choi')
    asked.writer.close()


async def _ends_early(asked: Asked) -> None:
    await _partly(asked)
    await asked.raw("0\r\n\r\n")


async def _done_without_a_reason(asked: Asked) -> None:
    await _partly(asked)
    await asked.end()


def _says(*parts: str) -> Answer:
    async def answer(asked: Asked) -> None:
        await asked.raw(STREAM)
        for part in parts:
            await asked.part(part)
        await asked.raw("0\r\n\r\n")

    return answer


def _replies(status: str, body: Any, *headers: str) -> Answer:
    return lambda asked: asked.status(status, body, *headers)


def _raw(data: bytes) -> Answer:
    async def answer(asked: Asked) -> None:
        await asked.raw(data)
        asked.writer.close()

    return answer


async def _silent(asked: Asked) -> None:
    await asked.raw(STREAM)
    while True:
        await asyncio.sleep(0.02)
        await asked.part(": still here\n\n")


FAILURES: dict[str, tuple[Answer, Failure, str, int]] = {
    "busy": (_replies("503 Busy", {"error": {"message": "queue is full"}}, "Retry-After: 0"), Failure.REFUSED,
             "HTTP 503: queue is full", 0),
    "too many": (_replies("429 Slow down", "slow down", "Retry-After: 0"), Failure.REFUSED, "HTTP 429: slow down", 0),
    "bad": (_replies("400 Bad", {"object": "error", "message": "no ids"}), Failure.STATUS, "HTTP 400: no ids", 0),
    "crash": (_replies("500 Oops", {"detail": "oh"}), Failure.STATUS, "HTTP 500: oh", 0),
    "moved": (_replies("307 Moved", {}, "Location: http://127.0.0.1:9/"), Failure.STATUS, "HTTP 307: {}", 0),
    "gone": (_close, Failure.CONNECTION, "disconnected", 0),
    "no http": (_raw(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), Failure.GARBAGE, "", 0),
    "dies": (_dies, Failure.BROKEN, "", 2),
    "ends early": (_ends_early, Failure.BROKEN, "the stream ended before the answer", 2),
    "no reason": (_done_without_a_reason, Failure.BROKEN, "the stream ended before the answer", 2),
    "no stream": (_replies("200 OK", {"choices": [{"text": "x"}]}), Failure.GARBAGE, "application/json", 0),
    "no json": (_says('data: {"choices": [{"text": "x"}]}\n\n', "data: {oops\n\n"), Failure.GARBAGE, "", 1),
    "no utf-8": (_raw(STREAM.encode() + b'd\r\ndata: "\xff"\n\n\r\n'), Failure.GARBAGE, "", 0),
    "deep": (_says('data: {"error": ' + "[" * 100_000 + "\n\n"), Failure.GARBAGE, "nested too deeply", 0),
    "no object": (_says("data: [1]\n\n"), Failure.GARBAGE, "", 0),
    "negative count": (_says('data: {"choices": [], "usage": {"completion_tokens": -1}}\n\n'), Failure.GARBAGE, "", 0),
    "huge count": (_says('data: {"choices": [{"text": "x"}], "usage": {"completion_tokens": 99999999999}}\n\n'),
                   Failure.GARBAGE, "", 0),
    "huge id": (_says('data: {"choices": [{"text": "x", "token_ids": [2147483648]}]}\n\n'), Failure.GARBAGE, "", 0),
    "said": (_says('data: {"choices": [{"text": "x"}]}\n\n', 'data: {"error": {"message": "out of memory"}}\n\n'),
             Failure.SERVER, "out of memory", 1),
    "aborted": (_says('data: {"choices": [{"text": "x", "finish_reason": "abort"}]}\n\n', "data: [DONE]\n\n"),
                Failure.ABORTED, "the server aborted it", 1),
    "silent": (_silent, Failure.TIMEOUT, "no end after 2 s", 0),
}  # fmt: skip


class TestFailures:
    @pytest.mark.parametrize("name", FAILURES)
    def test_each_kind_is_counted_and_the_others_go_on(self, name: str) -> None:
        wrong, kind, message, tokens = FAILURES[name]

        async def answer(asked: Asked) -> None:
            await (wrong(asked) if asked.rid in ("r3", "r7") else one_by_one(asked))

        run, server = run_against(answer, timeout_s=2 if name == "silent" else 30)
        table = run.requests
        assert len(server.asked) == len(table) == REQUESTS
        assert (table.finish_ns >= table.sent_ns).all()
        bad = table[table.failure != ""]
        assert list(bad.id) == ["r3", "r7"] and set(bad.failure) == {kind}
        assert set(bad.finish_reason) == {"abort" if kind is Failure.ABORTED else "error"}
        # What came at the same moment as the break is lost with it.
        assert bad.output_tokens.max() <= tokens and (name == "dies" or bad.output_tokens.min() == tokens)
        figures = run.aggregates()
        assert (figures["completed"], figures["failed"]) == (REQUESTS - 2, 2)
        assert run.records.counters == {f"failed_{kind}": 2}
        (note,) = [note for note in run.meta["notes"] if note.startswith("2 requests failed: ")]
        assert kind.replace("_", " ") in note and "the first, r3: " in note and message.lower() in note.lower()
        assert violations(run.records) == []
        table_text = run.table()
        assert f"{('Failed ' + kind.replace('_', ' ')).capitalize() + ':':<40} 2" in table_text
        assert "Event loop" not in table_text

    def test_a_server_that_dies_loses_no_request(self) -> None:
        async def answer(asked: Asked) -> None:
            if asked.rid == "r5":
                server._server.close()
                for other in server.asked.values():
                    other.writer.close()
            else:
                await one_by_one(asked)

        with StandIn(answer) as server:
            run = bench(Server(server.url), scenario(arrivals={"kind": "closed_loop", "users": 1}, count=7))
        assert run.records.requests["finish_reason"] == ["length"] * 5 + ["error"] * 2
        assert run.records.counters == {"failed_connection": 2}
        assert (run.records.requests["finish_ns"] >= 0).all()

    def test_what_comes_after_the_end_changes_nothing(self) -> None:
        async def answer(asked: Asked) -> None:
            await asked.raw(STREAM)
            await asked.tokens(["x"], finish="stop")
            await asked.tokens(["late"])
            await asked.part('data: {"error": "too late"}\n\ndata: [DONE]\n\ndata: {no json\n\n')
            await asked.raw("0\r\n\r\n")

        run, _ = run_against(answer, scenario(lengths={"prompt_tokens": 3, "output_tokens": 1}))
        assert run.records.requests["finish_reason"] == ["stop"] * REQUESTS
        assert set(run.records.requests["output_tokens"].tolist()) == {1}

    @pytest.mark.parametrize("last", ["data: [DONE]\n\n", ": nothing more\n\n"])
    def test_a_stream_that_is_not_closed_ends_with_its_answer(self, last: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(client, "REST_S", 0.1)

        async def answer(asked: Asked) -> None:
            await asked.raw(STREAM)
            await asked.tokens(["x"], finish="stop")
            await asked.part(last)
            await asyncio.sleep(1000)

        run, _ = run_against(answer, scenario(count=2))  # whose timeout is half an hour
        assert run.aggregates()["completed"] == 2


class TestStarting:
    def test_a_first_request_that_fails_ends_it(self) -> None:
        answer = _replies("400 Bad", {"error": {"message": "prompt must be text"}})
        with StandIn(answer, patient=False) as server, pytest.raises(InputError) as raised:
            bench(Server(server.url), scenario())
        assert "http_status" in str(raised.value) and "prompt must be text" in str(raised.value)
        assert "--tokenizer" in raised.value.remedy and server.asked == {}

    def test_it_asks_with_the_last_id_of_the_vocabulary(self) -> None:
        run, server = run_against(one_by_one)
        (tried,) = server.tried
        assert tried.body["prompt"] == [build_engine(scenario()).model.vocab - 1] and tried.body["max_tokens"] == 1
        assert "try-out" not in run.records.requests["id"]

    @pytest.mark.parametrize(
        ("models", "words"),
        [([], "lists no model"), ({"data": []}, "lists no model"), ({"data": [{"name": "x"}]}, "lists no model")],
    )
    def test_a_server_without_models(self, models: Any, words: str) -> None:
        with StandIn(models=models) as server:
            with pytest.raises(InputError, match=words):
                bench(Server(server.url), scenario())
            assert bench(Server(server.url, model="mine"), scenario(count=1)).meta["model"] == "mine"
            assert server.asked["r0"].body["model"] == "mine"

    def test_no_server(self) -> None:
        with StandIn() as server:
            url = server.url
        with pytest.raises(InputError, match="no server answers"):
            bench(Server(url), scenario())

    @pytest.mark.parametrize("url", ["localhost:1", "ftp://x", "http://", "http://a/?b=1", "http://a/#b", ""])
    def test_no_address(self, url: str) -> None:
        with pytest.raises(InputError, match="is no address of a server"):
            bench(Server(url), scenario())

    def test_no_credentials_in_an_address(self) -> None:
        with pytest.raises(InputError, match="may not hold credentials") as raised:
            bench(Server("http://me:hush@127.0.0.1:9"), scenario())
        assert "hush" not in str(raised.value)

    @pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
    def test_an_address_with_and_without_version(self, path: str) -> None:
        with StandIn() as server:
            bench(Server(server.url + path), scenario(count=1))
        assert server.asked["r0"].path == "/v1/completions"

    def test_iterations_of_a_loop_cannot_be_sent(self) -> None:
        with pytest.raises(InputError, match="iterations"):
            bench(Server("http://127.0.0.1:9"), scenario(arrivals={"kind": "at_iteration", "every": 2}))

    def test_the_key_is_sent_and_not_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.argv", ["testbed", "bench", "--api-key", "very-secret"])
        run, server = run_against(one_by_one, api_key="very-secret")
        assert {asked.headers["authorization"] for asked in server.asked.values()} == {"Bearer very-secret"}
        folder = run.save(tmp_path / "run")
        assert all(b"very-secret" not in file.read_bytes() for file in folder.iterdir())
        assert "--api-key ***" in json.loads((folder / "run.json").read_text())["provenance"]["command"]


class TestText:
    @pytest.fixture
    def tokenizer(self) -> Path:
        from testbed.engine.tokenizer import FOLDER

        return FOLDER

    def test_prompts_as_text(self, tokenizer: Path) -> None:
        from testbed.engine.tokenizer import load_tokenizer

        run, server = run_against(one_by_one, tokenizer=tokenizer)
        vocab = build_engine(scenario()).model.vocab
        known = load_tokenizer().get_vocab_size()
        assert vocab > known  # what the tokenizer has no text for has another one's
        for timed in timed_requests(scenario()):
            ids = (timed.request.prompt.ids(vocab) % known).tolist()
            assert server.asked[timed.request.rid].body["prompt"] == load_tokenizer().decode(ids)
        assert server.tried[0].body["prompt"] == "Hello"
        assert run.aggregates()["completed"] == REQUESTS

    def test_special_tokens_of_a_drawn_prompt_are_no_text(self, tokenizer: Path) -> None:
        asking = client.Asking(Server("http://x", tokenizer=tokenizer), "m", 0, 10)
        request = GenerateRequest("r0", TokenPrompt(np.array([0, 1, 99, 5])), 1)
        text = json.loads(asking.body(TimedRequest(0, request, 1)))["prompt"]
        assert text and "<|" not in text

    def test_a_chat(self, tokenizer: Path) -> None:
        async def answer(asked: Asked) -> None:
            await asked.raw(STREAM)
            await asked.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            await asked.event({"choices": [{"delta": {"reasoning_content": "hm"}}]})
            await asked.event({"choices": [{"delta": {"content": "x"}}]})
            await asked.event({"choices": [{"delta": {"content": None}, "finish_reason": "stop"}]})
            await asked.end()

        with StandIn(answer, patient=False) as server:
            run = bench(Server(server.url, tokenizer=tokenizer, chat=True), scenario())
        for asked in server.asked.values():
            assert asked.path == "/v1/chat/completions" and "prompt" not in asked.body
            (message,) = asked.body["messages"]
            assert message["role"] == "user" and isinstance(message["content"], str)
        assert set(run.records.requests["output_tokens"].tolist()) == {2}
        assert any(f"{REQUESTS} answers: the server does not count tokens" in note for note in run.meta["notes"])

    def test_a_turn_repeats_the_text_that_the_server_sent(self, tokenizer: Path) -> None:
        async def answer(asked: Asked) -> None:
            await asked.raw(STREAM)
            await asked.tokens([" the", " answer"], finish="length")
            await asked.end(2, prompt_tokens=1)

        chosen = scenario(sessions={"turns": 2}, count=2, lengths={"prompt_tokens": 10, "output_tokens": 2})
        run, server = run_against(answer, chosen, tokenizer=tokenizer)
        for session in range(2):
            first, second = (server.asked[f"s{session}.t{turn}"].body["prompt"] for turn in (0, 1))
            assert second.startswith(f"{first} the answer")
        assert not any("token ids" in note for note in run.meta["notes"])
        assert any("the server counted 4 prompt tokens where" in note for note in run.meta["notes"])

    def test_what_is_missing_is_told(self, tmp_path: Path) -> None:
        with StandIn() as server:
            with pytest.raises(InputError, match="a chat is made of text"):
                bench(Server(server.url, chat=True), scenario())
            with pytest.raises(InputError, match="cannot be read"):
                bench(Server(server.url, tokenizer=tmp_path), scenario())


class TestRun:
    def test_it_is_saved_and_loaded_as_any_other(self, tmp_path: Path) -> None:
        async def answer(asked: Asked) -> None:
            await (asked.status("503 Busy", {}) if asked.rid == "r2" else one_by_one(asked))

        run, _ = run_against(answer)
        for parquet in (True, False):
            loaded = Run.load(run.save(tmp_path / str(parquet), parquet=parquet))
            assert loaded.requests.equals(run.requests)
            assert np.array_equal(loaded.records.token_times_ns, run.records.token_times_ns)
            assert loaded.aggregates().keys() == run.aggregates().keys()
            assert loaded.table() == run.table()

    def test_the_table_says_nothing_of_the_inside(self) -> None:
        run, server = run_against(one_by_one)
        table = run.table()
        for title in ("Device", "KV cache", "Event loop", "Where requests spend"):
            assert title not in table
        assert "P99 send delay (ms)" in table and f"{server.url}/v1/completions" in table
        assert "send delay" not in simulate(scenario()).table() and "Event loop" in simulate(scenario()).table()
        assert np.isnan(run.aggregates()["cache_hit_rate"]) and np.isnan(run.aggregates()["steps"])

    def test_cached_tokens_where_the_server_tells(self) -> None:
        async def answer(asked: Asked) -> None:
            await asked.raw(STREAM)
            await asked.tokens(["x"], finish="length")
            usage = {"completion_tokens": 1, "prompt_tokens": 8}
            usage |= {"prompt_tokens_details": {"cached_tokens": 2} if asked.rid != "r0" else None}
            await asked.event({"choices": [], "usage": usage})
            await asked.end()

        run, _ = run_against(answer)
        assert run.records.requests["cached_tokens"].tolist() == [-1] + [2] * (REQUESTS - 1)
        assert run.aggregates()["cache_hit_rate"] == 0.25

    def test_it_is_compared_with_a_simulation_in_pairs(self) -> None:
        chosen = scenario()
        run, _ = run_against(one_by_one, chosen)
        found = compare([simulate(chosen), run])
        assert found.paired and found.names == ["bench (simulated)", "bench (bench)"]
        assert "mean_ttft_ms" in found.table()

    def test_progress(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(client, "PROGRESS_EVERY_NS", 0)
        told: list[tuple[int, int, int, int, int | None]] = []
        with StandIn() as server:
            bench(Server(server.url), scenario(), progress=lambda *state: told.append(state))
        assert [state[1] for state in told] == sorted(state[1] for state in told)
        assert told[-1][1:] == (REQUESTS, 0, 0, REQUESTS)
        assert all(ended + running + waiting <= REQUESTS for _, ended, running, waiting, _ in told)

    def test_outputs_of_other_lengths_are_told(self) -> None:
        async def answer(asked: Asked) -> None:
            await asked.raw(STREAM)
            await asked.tokens(["x"], finish="stop")
            await asked.end(1)

        run, _ = run_against(answer, scenario(lengths={"prompt_tokens": 3, "output_tokens": 2}))
        assert notes(run) == [f"{REQUESTS} outputs have other lengths than the workload says"]
