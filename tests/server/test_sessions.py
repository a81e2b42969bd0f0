"""``testbed bench`` against ``testbed serve``: what one says the other takes."""

from __future__ import annotations

from testbed.scenario.load import load_scenario
from testbed.study.bench import Server, bench
from tests.server.serving import USER_KEY, Serving

SCENARIO = {
    "name": "sessions",
    "model": "llama-3.1-8b",
    "device": {"constant": {"prefill_ns": 1000, "decode_ns": 1000}},
    "engine": {"kv_tokens": 20_000},
    "workload": {
        "arrivals": {"kind": "closed_loop", "users": 2},
        "lengths": {"prompt_tokens": 40, "output_tokens": 30},
        "sessions": {"turns": 3, "user_tokens": 6},
        "count": 4,
    },
}


def test_the_next_turn_of_a_session_holds_what_the_server_said(paced: Serving) -> None:
    """So the server finds all of the turn before in its prefix cache, but for the last token, whose KV nobody has
    computed."""
    run = bench(Server(paced.url, api_key=USER_KEY), load_scenario(SCENARIO).scenario)
    assert not [note for note in run.meta["notes"] if "token ids" in note]
    turns = run.requests.sort_values("arrival_ns")
    assert len(turns) == 12 and not turns["failure"].any()
    for _, session in turns.groupby("session"):
        before = session.iloc[:-1]
        said = before["prompt_tokens"].to_numpy() + before["output_tokens"].to_numpy()
        assert (session["cached_tokens"].to_numpy()[1:] == said - 1).all()
