"""What is sent: prompts, sessions, users, replayed traces; lazily, and the same in every process."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from testbed.messages import Segment
from testbed.scenario.errors import InputError
from testbed.scenario.workload import WorkloadConfig
from testbed.workload import TimedRequest
from testbed.workload.draw import Uniforms
from testbed.workload.prompts import cut, merged
from testbed.workload.replay import jittered
from testbed.workload.traces import read_trace

from .test_traces import traces
from .world import SECOND_NS, VOCAB, build, oracle, serve

POISSON = {"kind": "poisson", "rate_per_s": 10}
SHORT = {"prompt_tokens": {"kind": "uniform", "low": 5, "high": 50}, "output_tokens": 3}


def ids(timed: TimedRequest) -> np.ndarray:
    return timed.request.prompt.ids(VOCAB)


def sent(config: dict[str, Any], **more: Any) -> list[TimedRequest]:
    return list(build(config, **more).start())


# --- single requests ------------------------------------------------------------------------------------------------


def test_requests_are_numbered_and_their_prompts_differ() -> None:
    requests = sent({"arrivals": POISSON, "lengths": SHORT, "count": 50})
    assert [timed.request.rid for timed in requests] == [f"r{i}" for i in range(50)]
    heads = Counter(tuple(ids(timed)[:5]) for timed in requests)
    assert max(heads.values()) == 1
    assert all(len(ids(timed)) == len(timed.request.prompt) for timed in requests)


@pytest.mark.parametrize(
    ("told", "max_new_tokens", "output_tokens", "ignore_eos"),
    [
        ("output", 10, 10, True),
        (4, 4, 4, False),
        (25, 25, 10, False),
        ({"ratio": 2.5}, 25, 10, False),
        ({"ratio": 0.31}, 4, 4, False),
    ],
)
def test_a_request_ends_at_its_length_or_at_what_was_told(
    told: Any, max_new_tokens: int, output_tokens: int, ignore_eos: bool
) -> None:
    lengths = {"prompt_tokens": 5, "output_tokens": 10}
    (timed,) = sent({"arrivals": POISSON, "lengths": lengths, "count": 1, "max_new_tokens": told})
    assert (timed.request.max_new_tokens, timed.output_tokens) == (max_new_tokens, output_tokens)
    assert timed.request.ignore_eos == ignore_eos


def test_rate_and_lengths_are_independent_draws() -> None:
    slow = sent({"arrivals": POISSON, "lengths": SHORT, "count": 50})
    fast = sent({"arrivals": {**POISSON, "rate_per_s": 99}, "lengths": SHORT, "count": 50})
    assert [timed.request for timed in map(_plain, slow)] == [timed.request for timed in map(_plain, fast)]
    other = sent({"arrivals": POISSON, "lengths": SHORT, "count": 50}, seed=1)
    assert [len(timed.request.prompt) for timed in slow] != [len(timed.request.prompt) for timed in other]


def _plain(timed: TimedRequest) -> Any:
    return timed._replace(request=(timed.request.rid, timed.request.prompt.segments, timed.output_tokens))


def test_what_does_not_fit_the_context_is_cut_and_counted() -> None:
    lengths = {"prompt_tokens": {"kind": "uniform", "low": 50, "high": 150}, "output_tokens": 20}
    workload = build({"arrivals": POISSON, "lengths": lengths, "count": 200}, context_length=100)
    requests = list(workload.start())
    assert max(len(timed.request.prompt) + timed.output_tokens for timed in requests) == 100
    cut_to_fit = sum(len(timed.request.prompt) == 80 for timed in requests)
    assert 100 < cut_to_fit < 180
    (note,) = workload.notes()
    assert abs(int(note.split()[0]) - cut_to_fit) <= 5  # a prompt of exactly 80 was not cut


def test_what_can_never_fit_is_refused() -> None:
    with pytest.raises(InputError, match="exceed the"):
        build(
            {"arrivals": POISSON, "lengths": {"prompt_tokens": 90, "output_tokens": 20}, "count": 2}, context_length=100
        )
    with pytest.raises(InputError, match="no end"):
        build({"arrivals": POISSON, "lengths": SHORT})
    with pytest.raises(InputError, match="give count"):
        build({"arrivals": {"kind": "all_at_once"}, "lengths": SHORT, "duration_s": 3})


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"arrivals": POISSON},
        {"requests": {"trace": "x"}, "lengths": SHORT},
        {"requests": {"trace": "x"}, "sessions": {"turns": 3}},
        {"requests": {"trace": "x", "too_long": "ignore"}},
        {"arrivals": {"kind": "poisson", "rate": 3}, "lengths": SHORT},
        {"arrivals": {"kind": "at_iteration"}, "lengths": SHORT},
        {"arrivals": {"kind": "at_iteration", "iterations": [3, 2]}, "lengths": SHORT},
        {"arrivals": {"kind": "at_iteration", "every": 1}, "lengths": SHORT, "sessions": {"turns": 2}},
        {"arrivals": POISSON, "lengths": SHORT, "max_new_tokens": {}},
        {"arrivals": POISSON, "lengths": {"kind": "pairs", "pairs": []}},
        {"arrivals": POISSON, "lengths": SHORT, "prefix": {"groups": 0, "prefix_tokens": 5}},
    ],
)
def test_contradictions_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        WorkloadConfig.model_validate(config)


SEGMENTS = st.lists(st.builds(Segment, st.integers(0, 2), st.integers(0, 30), st.integers(0, 9)))


@given(SEGMENTS, st.integers(0, 60))
def test_merging_and_cutting_keep_the_tokens(segments: list[Segment], tokens: int) -> None:
    def spelled(parts: list[Segment]) -> list[tuple[int, int]]:
        return [(part.key, part.start + i) for part in parts for i in range(part[2])]

    assert spelled(merged(segments)) == spelled(segments)
    assert spelled(cut(segments, tokens)) == spelled(segments)[:tokens]
    joined = merged(segments)
    assert all(a.key != b.key or a.start + a[2] != b.start for a, b in pairwise(joined))


# --- shared prefixes ------------------------------------------------------------------------------------------------


def test_groups_share_their_prefix_by_popularity() -> None:
    prefix = {"groups": 4, "zipf": 1.0, "prefix_tokens": {"kind": "uniform", "low": 20, "high": 90}, "share": 0.75}
    requests = sent({"arrivals": POISSON, "lengths": SHORT, "prefix": prefix, "count": 4000})
    heads = Counter(timed.request.prompt.segments[0] for timed in requests if len(timed.request.prompt.segments) == 2)
    assert len(heads) == 4
    assert sum(heads.values()) / 4000 == pytest.approx(0.75, abs=0.03)
    shares = np.array(sorted(heads.values(), reverse=True)) / sum(heads.values())
    np.testing.assert_allclose(shares, np.array([12, 6, 4, 3]) / 25, atol=0.03)
    # The prefix comes before the drawn prompt tokens.
    without = sent({"arrivals": POISSON, "lengths": SHORT, "count": 4000})
    for timed, plain in zip(requests, without, strict=True):
        assert timed.request.prompt.segments[-1] == plain.request.prompt.segments[0]


def test_a_second_level_branches_under_each_group() -> None:
    prefix = {"groups": 2, "prefix_tokens": 10, "then": {"groups": 3, "prefix_tokens": 5}}
    requests = sent({"arrivals": POISSON, "lengths": SHORT, "prefix": prefix, "count": 600})
    paths = Counter(tuple(segment.key for segment in timed.request.prompt.segments[:2]) for timed in requests)
    assert len(paths) == 6
    assert len({first for first, _ in paths}) == 2
    assert len({second for _, second in paths}) == 6


# --- sessions and closed loops --------------------------------------------------------------------------------------

SESSIONS = {
    "turns": {"kind": "uniform", "low": 1, "high": 5},
    "think_s": {"kind": "exponential", "mean": 2},
    "user_tokens": 7,
    "system_tokens": 11,
}


def test_a_turn_repeats_all_that_was_said() -> None:
    served = serve(build({"arrivals": POISSON, "lengths": SHORT, "sessions": SESSIONS, "count": 40}))
    turns: dict[str, list[tuple[TimedRequest, int]]] = {}
    for timed, end_ns in served:
        turns.setdefault(timed.session, []).append((timed, end_ns))
    assert len(turns) == 40
    assert 2 < len(served) / 40 < 4
    for name, session in turns.items():
        assert [timed.request.rid for timed, _ in session] == [f"{name}.t{i}" for i in range(len(session))]
        for (before, end_ns), (after, _) in pairwise(session):
            assert after.arrival_ns >= end_ns
            history = np.concatenate([ids(before), oracle(before)])
            np.testing.assert_array_equal(ids(after)[: len(history)], history)
            assert len(ids(after)) == len(history) + 7
    systems = {tuple(ids(session[0][0])[:11]) for session in turns.values()}
    assert len(systems) == 1


def test_a_turn_repeats_what_a_real_model_said() -> None:
    sampled = np.array([5, 6, 7], np.int32)
    config = {"arrivals": POISSON, "lengths": SHORT, "sessions": {"turns": 3}, "count": 1}
    first, second, third = (timed for timed, _ in serve(build(config), output=lambda _: sampled))
    np.testing.assert_array_equal(ids(second)[: len(ids(first)) + 3], np.concatenate([ids(first), sampled]))
    np.testing.assert_array_equal(ids(third)[: len(ids(second)) + 3], np.concatenate([ids(second), sampled]))


def test_what_sessions_ask_does_not_depend_on_how_fast_they_are_served() -> None:
    config = {"arrivals": POISSON, "lengths": SHORT, "sessions": SESSIONS, "count": 30}
    fast = serve(build(config), lambda _: 1)
    slow = serve(build(config), lambda timed: 10**9 + 10**7 * (len(timed.request.prompt) % 17))
    assert {t.request.rid: t.request.prompt.segments for t, _ in fast} == {
        t.request.rid: t.request.prompt.segments for t, _ in slow
    }


def test_sessions_stop_when_the_context_is_full_or_nothing_came() -> None:
    config = {
        "arrivals": POISSON,
        "lengths": {"prompt_tokens": 20, "output_tokens": 10},
        "sessions": {"turns": 5},
        "count": 3,
    }
    full = build(config, context_length=100)
    assert len(serve(full)) == 9  # 30, 60, 90 tokens; 120 would be too many
    assert full.notes() == ["6 turns were not sent: the 100 tokens that engine.context_length allows were used up"]
    assert full.expected_requests() == 15
    broken = build(config)
    assert len(serve(broken, output=lambda _: np.empty(0, np.int32))) == 3
    assert broken.notes() == ["12 turns were not sent: a turn before them produced nothing"]


def test_a_closed_loop_keeps_its_users() -> None:
    law = {"kind": "closed_loop", "users": 5, "think_s": {"kind": "exponential", "mean": 0.5}, "ramp_s": 1}
    workload = build({"arrivals": law, "lengths": SHORT, "count": 200})
    served = serve(workload, lambda timed: 10**8 * len(timed.request.prompt))
    assert len(served) == 200 == workload.expected_requests()
    assert [timed.arrival_ns for timed, _ in served[:5]] == [i * SECOND_NS // 5 for i in range(5)]
    events = sorted([(timed.arrival_ns, 1) for timed, _ in served] + [(end_ns, -1) for _, end_ns in served])
    assert np.cumsum([step for _, step in events]).max() == 5


def test_a_closed_loop_answers_aborted_requests_too_and_ends_with_its_duration() -> None:
    law = {"kind": "closed_loop", "users": 3}
    config = {"arrivals": law, "lengths": SHORT, "duration_s": 10}
    served = serve(build(config), output=lambda _: np.empty(0, np.int32))
    assert len(served) == 30
    assert max(timed.arrival_ns for timed, _ in served) == 9 * SECOND_NS


def test_users_start_a_new_session_after_the_last_turn() -> None:
    law = {"kind": "closed_loop", "users": 2, "think_s": 4}
    served = serve(build({"arrivals": law, "lengths": SHORT, "sessions": {"turns": 2, "think_s": 1}, "count": 4}))
    assert [(timed.arrival_ns // SECOND_NS, timed.request.rid) for timed, _ in served] == [
        (0, "s0.t0"), (0, "s1.t0"), (2, "s0.t1"), (2, "s1.t1"), (7, "s2.t0"), (7, "s3.t0"), (9, "s2.t1"), (9, "s3.t1"),
    ]  # fmt: skip


# --- traces ---------------------------------------------------------------------------------------------------------


def test_mooncake_prompts_share_exactly_their_common_blocks() -> None:
    name = "mooncake_conversation_first30min.jsonl"
    requests = sent({"requests": {"trace": name, "limit": 60}})
    rows = list(islice(read_trace(traces() / name), 60))
    for timed, row in zip(requests, rows, strict=True):
        assert len(timed.request.prompt) == row.prompt_tokens
        assert (timed.arrival_ns, timed.output_tokens) == (row.arrival_ns, row.output_tokens)
    for i in range(0, 60, 7):
        for j in range(i):
            blocks = next(
                (k for k, (a, b) in enumerate(zip(rows[i].hash_ids, rows[j].hash_ids, strict=False)) if a != b),
                min(len(rows[i].hash_ids), len(rows[j].hash_ids)),
            )
            expected = min(blocks * 512, rows[i].prompt_tokens, rows[j].prompt_tokens)
            a, b = ids(requests[i]), ids(requests[j])
            shortest = min(len(a), len(b))
            different = np.flatnonzero(a[:shortest] != b[:shortest])
            assert (different[0] if len(different) else shortest) == expected


def test_agent_turns_wait_for_the_turn_before() -> None:
    config = {"requests": {"trace": "agent_taubench_sessions.jsonl"}}
    rows = {f"s{row.session}.t{row.turn}": row for row in read_trace(traces() / "agent_taubench_sessions.jsonl")}
    for service_ns in (1, 3 * SECOND_NS):
        served = serve(build(config), lambda _, span=service_ns: span)
        assert Counter(timed.request.rid for timed, _ in served) == Counter(rows.keys())
        ended: dict[str, int] = {}
        for timed, end_ns in served:
            recorded_ns = rows[timed.request.rid].arrival_ns
            assert timed.arrival_ns == max(recorded_ns, ended.get(timed.session, 0))
            assert len(timed.request.prompt) == rows[timed.request.rid].prompt_tokens
            ended[timed.session] = end_ns


TURNS = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", "", ""]), st.integers(0, 30), st.integers(0, 5)), min_size=1, max_size=40
)


@given(TURNS, st.integers(1, 20), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_sessions_of_a_trace_whatever_their_order(
    tmp_path: Path, turns: list[tuple[str, int, int]], service_s: int, eager: bool
) -> None:
    rows = [
        {"arrival_s": arrival_s, "prompt_tokens": 5, "output_tokens": 2, "session": session, "think_s": think_s}
        for session, arrival_s, think_s in sorted(turns, key=lambda turn: turn[1])
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    workload = build({"requests": {"trace": "t.jsonl"}}, base_dir=tmp_path)
    if eager:  # A runtime may read everything before it serves anything.
        everything = list(workload.start())
        workload.start = lambda: iter(everything)  # type: ignore[method-assign]
    served = serve(workload, lambda _: service_s * SECOND_NS)
    expected = []
    free: dict[str, int] = {}
    for row in rows:
        alone = not row["session"] or row["session"] not in free
        ready = 0 if alone else free[row["session"]] + row["think_s"]
        at = max(row["arrival_s"], ready)
        free[row["session"]] = at + service_s
        expected.append((row["session"], at * SECOND_NS))
    assert Counter((timed.session[1:], timed.arrival_ns) for timed, _ in served) == Counter(expected)
    assert [t.arrival_ns for t, _ in served] == sorted(t.arrival_ns for t, _ in served)


def test_a_turn_that_is_late_lets_others_pass(tmp_path: Path) -> None:
    # When the second turn of a is read, its first has ended: it waits within start() until a has thought.
    rows = "0,a,0\n1,,0\n2,a,5\n3,,0\n9,,0\n"
    (tmp_path / "t.csv").write_text(
        "arrival_s,session,think_s,prompt_tokens,output_tokens\n" + rows.replace("\n", ",5,2\n")
    )
    served = serve(build({"requests": {"trace": "t.csv"}}, base_dir=tmp_path))
    assert [(timed.arrival_ns // SECOND_NS, timed.request.rid) for timed, _ in served] == [
        (0, "sa.t0"), (1, "r0"), (3, "r1"), (6, "sa.t1"), (9, "r2"),
    ]  # fmt: skip


def test_sessions_of_our_own_format_repeat_what_was_said(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "arrival_s,prompt_tokens,output_tokens,session\n0,10,4,a\n1,20,4,a\n2,6,4,a\n3,10,4,a\n"
    )
    first, second, third, fourth = (
        timed for timed, _ in serve(build({"requests": {"trace": "t.csv"}}, base_dir=tmp_path))
    )
    np.testing.assert_array_equal(ids(second)[:14], np.concatenate([ids(first), oracle(first)]))
    assert not np.array_equal(ids(third), ids(second)[:6])  # shorter than what was said: started afresh
    np.testing.assert_array_equal(ids(fourth), np.concatenate([ids(third), oracle(third)]))


def test_a_window_of_a_trace(tmp_path: Path) -> None:
    rows = "".join(f"{second},{10 + second},5\n" for second in range(20))
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)

    def of(trace: dict[str, Any], **more: Any) -> list[tuple[float, int]]:
        requests = sent({"requests": {"trace": "t.csv", **trace}, **more}, base_dir=tmp_path)
        return [(timed.arrival_ns / SECOND_NS, len(timed.request.prompt)) for timed in requests]

    assert of({"start_s": 5, "duration_s": 3}) == [(0, 15), (1, 16), (2, 17)]
    assert of({"start_s": 5, "limit": 2}, rate_scale=2.0) == [(0, 15), (0.5, 16)]
    assert of({}, duration_s=1.5, rate_scale=2.0) == [(0, 10), (0.5, 11), (1, 12)]
    assert of({}, count=2) == [(0, 10), (1, 11)]
    replaced = of({"limit": 3}, arrivals={"kind": "constant", "rate_per_s": 4})
    assert replaced == [(0, 10), (0.25, 11), (0.5, 12)]
    only_times = {"arrivals": {"kind": "trace", "trace": "t.csv", "start_s": 17}, "lengths": SHORT}
    assert [timed.arrival_ns for timed in sent(only_times, base_dir=tmp_path)] == [0, SECOND_NS, 2 * SECOND_NS]


def test_too_long_and_empty_rows(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,96,5\n2,10,200\n3,10,0\n")

    def of(**trace: Any) -> tuple[list[tuple[int, int]], list[str], int | None]:
        workload = build({"requests": {"trace": "t.csv", **trace}}, context_length=100, base_dir=tmp_path)
        lengths = [(len(timed.request.prompt), timed.output_tokens) for timed in workload.start()]
        return lengths, workload.notes(), workload.expected_requests()

    with pytest.raises(InputError, match=r"t\.csv:3:1: 96 \+ 5 tokens exceed"):
        of()
    with pytest.raises(InputError, match=r"t\.csv:5:1: a request without output"):
        of(too_long="drop")
    lengths, notes, expected = of(too_long="drop", zero_output="drop")
    assert (lengths, expected) == ([(10, 5)], 1)
    assert notes == [
        "1 requests of t.csv have no output and were dropped",
        "2 requests of t.csv were longer than the 100 tokens that engine.context_length allows and were dropped",
    ]
    lengths, notes, _ = of(too_long="truncate", zero_output="drop")
    assert lengths == [(10, 5), (95, 5), (1, 99)]
    assert notes[1].endswith("were cut")


def test_jitter_spreads_groups_and_keeps_their_order() -> None:
    rows = list(islice(read_trace(traces() / "mooncake_conversation_first30min.jsonl"), 400))
    spread = list(jittered(rows, 3 * SECOND_NS, Uniforms(0, "jitter")))
    assert sorted(row.line for row in spread) == [row.line for row in rows]
    assert [row.arrival_ns for row in spread] == sorted(row.arrival_ns for row in spread)
    size = Counter(row.arrival_ns for row in rows)
    assert max(size.values()) > 5
    before = {row.line: row.arrival_ns for row in rows}
    moved = [row.arrival_ns - before[row.line] for row in spread if size[before[row.line]] > 1]
    assert min(moved) >= 0 and max(moved) < 3 * SECOND_NS
    assert np.mean(moved) == pytest.approx(1.5 * SECOND_NS, rel=0.1)
    assert all(before[row.line] == row.arrival_ns for row in spread if size[before[row.line]] == 1)
    for instant in size:
        together = [row.line for row in spread if before[row.line] == instant]
        assert together == sorted(together)


def test_jitter_is_asked_for_in_the_scenario() -> None:
    trace = {"trace": "mooncake_conversation_first30min.jsonl", "limit": 400}
    assert max(Counter(timed.arrival_ns for timed in sent({"requests": trace})).values()) > 5
    spread = sent({"requests": {**trace, "jitter_s": 3.0}})
    assert max(Counter(timed.arrival_ns for timed in spread).values()) == 1


@pytest.mark.parametrize(
    ("text", "config", "words"),
    [
        ("id,prompt_tokens,output_tokens,arrival_s\nx,1,1,0\nx,1,1,0\n", {}, "occurs twice"),
        ("id,prompt_tokens,output_tokens,arrival_s\nx,1,1,0\n,1,1,0\n", {}, "some rows have an id"),
        ("id,prompt_tokens,output_tokens,arrival_s\n,1,1,0\nx,1,1,0\n", {}, "some rows have an id"),
        ("session,prompt_tokens,output_tokens,arrival_s\nx,1,1,0\n", {"arrivals": POISSON}, "has sessions"),
        ("prompt_tokens,output_tokens\n1,1\n", {}, "lengths only"),
        ("prompt_tokens,output_tokens\n1,1\n", {"requests": {"trace": "t", "start_s": 1}}, "lengths only"),
        (
            "session,prompt_tokens,output_tokens,arrival_s\nx,1,1,0\n",
            {"requests": {"trace": "t", "jitter_s": 1}},
            "jitter_s",
        ),
    ],
)
def test_traces_that_cannot_be_used_say_so_before_the_run(
    tmp_path: Path, text: str, config: dict[str, Any], words: str
) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(InputError, match=words):
        build({"requests": {"trace": "t"}, **config}, base_dir=tmp_path)


# --- laziness and determinism ---------------------------------------------------------------------------------------


def test_a_million_requests_are_not_built_up_front() -> None:
    law = {"arrivals": POISSON, "lengths": SHORT, "prefix": {"groups": 5, "prefix_tokens": 9}, "count": 1_000_000}
    workload = build(law)
    list(islice(build(law).start(), 6000))  # warm every cache
    tracemalloc.start()
    stream = workload.start()
    for _ in islice(stream, 20_000):
        pass
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1_000_000
    assert workload.expected_requests() == 1_000_000


SCRIPT = """
from hashlib import sha256
from tests_world import build, serve
digest = sha256()
for config in CONFIGS:
    for timed, end_ns in serve(build(config)):
        request = timed.request
        fields = (timed.arrival_ns, end_ns, timed.output_tokens, timed.session, request.rid, request.prompt.segments)
        digest.update(repr(fields).encode())
print(digest.hexdigest())
"""


def test_every_process_draws_the_same(tmp_path: Path) -> None:
    configs = [
        {"arrivals": "azure-conv-2023", "lengths": "azure-conv-2023", "count": 200},
        {
            "arrivals": {"kind": "closed_loop", "users": 4, "think_s": 1},
            "lengths": SHORT,
            "sessions": SESSIONS,
            "prefix": {"groups": 5, "zipf": 1, "prefix_tokens": {"kind": "exponential", "mean": 50}},
            "count": 50,
        },
        {"requests": {"trace": "agent_taubench_sessions.jsonl"}},
        {"requests": {"trace": "mooncake_conversation_first30min.jsonl", "limit": 50, "jitter_s": 3}},
    ]
    world = Path(__file__).with_name("world.py").read_text()
    (tmp_path / "tests_world.py").write_text(world)
    script = f"CONFIGS = {configs!r}\n{SCRIPT}"
    digests = set()
    for hash_seed in ("0", "1", "4242"):
        environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(tmp_path), "TESTBED_DATA": str(traces().parent)}
        result = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        digests.add(result.stdout)
    assert len(digests) == 1
