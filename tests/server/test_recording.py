"""A server that was started with ``--record`` leaves a run that is read, and replayed, as any other."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np

from testbed.metrics.run import Run
from testbed.study.replay import replay
from tests.server.serving import CONSTANT, USER_KEY, Serving, oracle_ids


def generate(server: Serving, name: str, prompt_tokens: int, outputs: int) -> list[int]:
    params = {"max_new_tokens": outputs, "ignore_eos": True}
    body = {"rid": name, "input_ids": [7] * prompt_tokens, "sampling_params": params}
    ids: list[int] = server.ask("POST", "/generate", body)["output_ids"]
    return ids


def test_a_recorded_server_is_a_run(tmp_path: Path) -> None:
    options = (*CONSTANT, "--set", "engine.kv_tokens=20000", "--api-key", USER_KEY, "--record", "record")
    server = Serving(options, tmp_path).listening()
    try:
        lengths = {"first": (5, 9), "second": (300, 1), "again": (20, 4)}
        for name, (prompt, outputs) in lengths.items():
            assert generate(server, name, prompt, outputs) == oracle_ids(f"0:{name}", outputs)
        assert len(generate(server, "again", 20, 6)) == 6  # an id that is free again: its last request counts
        endless = {"max_new_tokens": 19_000, "ignore_eos": True}
        body = {"rid": "left", "text": "x", "stream": True, "sampling_params": endless}
        with server.streaming("/generate", body) as reply:
            assert reply.readline()
        server.comes_to_rest()
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 0
        server.wait_for("recorded in")
    finally:
        server.end()
    run = Run.load(tmp_path / "record")
    requests = run.requests.set_index("id")
    assert list(requests.index) == ["0:first", "0:second", "0:again", "0:left"]
    assert requests["prompt_tokens"].tolist()[:3] == [5, 300, 20]
    assert requests["output_tokens"].tolist()[:3] == [9, 1, 6]
    assert requests["finish_reason"].tolist() == ["length"] * 3 + ["abort"]
    assert [len(run.token_times(place)) for place in range(3)] == [9, 1, 6]
    times = run.requests[["arrival_ns", "queued_ns", "first_scheduled_ns", "first_token_ns", "finish_ns"]].to_numpy()
    assert times[0, 0] > 0 and (np.diff(times[:, 0]) > 0).all()
    assert (times[:, 1] > times[:, 0]).all()  # it was sent before the loop read it
    assert (np.diff(times, axis=1) >= 0).all()
    again = replay(run)
    assert again.equal and again.steps == len(run.steps) > 0
    assert run.meta["label"] == "paced"
    assert USER_KEY not in json.dumps(run.meta) and "--api-key ***" in run.meta["provenance"]["command"]


def test_a_folder_that_holds_something_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine", encoding="utf-8")
    server = Serving((*CONSTANT, "--set", "engine.kv_tokens=20000", "--record", "taken"), tmp_path)
    try:
        assert server.ended() == 2
    finally:
        server.end()
    assert "taken" in server.errors and "--record" in server.errors
    assert [file.name for file in (tmp_path / "taken").iterdir()] == ["notes.txt"]
