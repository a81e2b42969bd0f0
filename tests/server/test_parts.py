"""Pieces of the server that need no server."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import numpy as np
import pytest

from testbed.deployment import Engine, build_engine
from testbed.engine.tokenizer import FOLDER
from testbed.loops.base import LoopContext
from testbed.messages import GenerateRequest, Message, TokenPrompt
from testbed.runtime.paced import PacedDevice
from testbed.runtime.traffic import Traffic
from testbed.runtime.wall import ScheduledClients, WallClock, WallRuntime, run_to_the_end
from testbed.sampling import SamplingParams
from testbed.scenario.errors import InputError
from testbed.scenario.load import load_scenario
from testbed.server.calls import Calls
from testbed.server.forgetful import ForgetfulLog, ForgetfulRecorder
from testbed.server.logs import OneLine
from testbed.server.modelled import ModelledLengths
from testbed.server.options import find_tokenizer, load_serving, read_limits
from testbed.server.wire import Answer
from tests.server.serving import oracle_ids

CONSTANT = "device={constant: {prefill_ns: 10000, decode_ns: 10000}}"


@pytest.mark.parametrize("text", ["a\nERROR forged", "a\r\x1b[31mred", "\u2028line", "\ud800", "x\x00y"])
def test_no_message_breaks_a_line_of_the_log(text: str) -> None:
    record = logging.LogRecord("x", logging.ERROR, "", 0, "%s", (text,), None)
    line = OneLine("%(levelname)s %(message)s").format(record)
    assert line.isascii() and line.isprintable() and line.startswith("ERROR ")


def test_limits_are_named_and_checked() -> None:
    assert read_limits(["n=3", "stops=1"]).n == 3
    for wrong in ("n", "n=", "n=-1", "n=1.5", "n=0", "N=1", "n=" + "9" * 40, "n=١"):
        with pytest.raises(InputError):
            read_limits([wrong])


def test_the_tokenizer_is_the_given_one_or_the_models_or_ours() -> None:
    assert find_tokenizer("llama-3.1-8b", None) == FOLDER
    assert find_tokenizer("llama-3.1-8b", str(FOLDER)) == FOLDER
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        find_tokenizer("llama-3.1-8b", "/nowhere")


def engine(recorder: ForgetfulRecorder, requests: int = 1) -> Engine:
    lengths = {"prompt_tokens": 20, "output_tokens": 5}
    workload = {"lengths": lengths, "arrivals": {"kind": "all_at_once"}, "count": requests}
    source = {"model": "llama-3.1-8b", "engine": {"kv_tokens": 2000}, "workload": workload}
    return build_engine(load_scenario(source, [CONSTANT]).scenario, recorder=recorder)


def test_a_server_keeps_nothing_of_what_has_ended() -> None:
    recorder = ForgetfulRecorder()
    built = engine(recorder, requests=300)
    built.scheduler.decision_log = ForgetfulLog()
    before = built.scheduler.decision_log.bytes()
    clock = WallClock()
    traffic = Traffic(built.workload, built.oracle)
    clients = ScheduledClients(clock, traffic)
    device = PacedDevice(clock, built.cost_model, built.oracle)
    runtime = WallRuntime(clock=clock, device=device, recorder=recorder, clients=clients)
    run_to_the_end(built.loop(LoopContext(built.scheduler, runtime)))
    times = [recorder.times_of(rid) for rid in traffic.sent]
    assert len(times) == 300 and not recorder._times
    assert all(one is not None and 0 <= one.scheduled_ns < one.first_token_ns < one.ended_ns for one in times)
    assert built.scheduler.decision_log.bytes() == before
    assert not recorder._steps and not recorder._spans and not recorder._ended
    journal = recorder.journal
    assert not (journal.stamps or journal.arrivals or journal.sent or journal.tokens)
    assert not built.scheduler.invariants._ended and not built.scheduler.requests


def test_however_many_want_the_state_the_scheduler_is_asked_once_at_a_time(tmp_path: Path) -> None:
    """And nobody hears of a state before the question."""
    asked: list[int] = []

    class Counting(Calls):
        async def ask(self, message: Message, within_s: float) -> Answer:
            asked.append(len(asked))
            await asyncio.sleep(0.01)
            return Answer(0, asked[-1], True, "", {})

    async def crowd() -> list[list[int]]:
        calls = Counting(0, 1, str(tmp_path), 1)
        crowds = []
        for _ in range(3):  # each comes while the one before waits for its answer
            crowds.append([asyncio.create_task(calls.state(1.0)) for _ in range(50)])
            while len(asked) < len(crowds):
                await asyncio.sleep(0)
        answers = [[answer.number for answer in await asyncio.gather(*wanted)] for wanted in crowds]
        calls.close()
        return answers

    assert asyncio.run(crowd()) == [[number] * 50 for number in range(3)]


def lengths_of(settings: list[str]) -> ModelledLengths:
    scenario = load_serving(None, "paced", [CONSTANT, "engine.kv_tokens=20000", *settings]).scenario
    return ModelledLengths(build_engine(scenario, recorder=ForgetfulRecorder()), str(FOLDER))


def outputs(lengths: ModelledLengths, request: GenerateRequest) -> int | None:
    """After how many tokens the oracle stops the request; None: not before its max_new_tokens."""
    lengths.expect(request)
    stop = lengths.oracle.stop_at.get(request.rid)
    lengths.forget(request.rid)
    assert not lengths.oracle.stop_at
    return None if stop is None else stop + 1


def asked(rid: str, most: int | None, *, ignore_eos: bool = False, **sampling: object) -> GenerateRequest:
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    prompt = TokenPrompt(np.zeros(3, np.int32))
    return GenerateRequest(rid, prompt, most, ignore_eos=ignore_eos, sampling=params)


def test_lengths_follow_the_seed_the_id_and_the_distribution() -> None:
    lengths = lengths_of(["workload.lengths.output_tokens={kind: uniform, low: 10, high: 29}"])
    first = [outputs(lengths, asked(f"0:{number}", None)) for number in range(2000)]
    assert first == [outputs(lengths, asked(f"0:{number}", None)) for number in range(2000)]
    counts = np.bincount(np.array(first, dtype=np.int64), minlength=30)
    assert counts[:10].sum() == 0 and (counts[10:] > 60).all()
    other = lengths_of(["workload.lengths.output_tokens={kind: uniform, low: 10, high: 29}", "seed=1"])
    assert first != [outputs(other, asked(f"0:{number}", None)) for number in range(2000)]


def test_lengths_heed_what_was_asked_for() -> None:
    lengths = lengths_of(["workload.lengths.output_tokens=10"])
    assert outputs(lengths, asked("a", 50)) == 10
    assert outputs(lengths, asked("a", 5)) is None
    assert outputs(lengths, asked("a", 50, ignore_eos=True)) is None
    assert outputs(lengths, asked("a", 50, min_new_tokens=20)) == 20
    ids = oracle_ids("a", 50)
    assert outputs(lengths, asked("a", 50, ignore_eos=True, stop_token_ids=(ids[30], ids[7]))) == 8
    assert outputs(lengths, asked("a", 50, stop_token_ids=(ids[30],))) == 10
    assert outputs(lengths, asked("a", 50, ignore_eos=True, min_new_tokens=9, stop_token_ids=(ids[30], ids[7]))) == 31
