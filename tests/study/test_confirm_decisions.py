"""The first different decision, and why: from what both schedulers had received and finished."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from testbed import load_scenario, simulate
from testbed.batch import ForwardMode
from testbed.metrics.run import Run
from testbed.scenario.errors import InputError
from testbed.scheduler.decisions import Decision, first_difference, read_decisions
from testbed.study.confirm.decisions import Difference, compare_decisions, ids_by_rank, in_words

DEVICE = {"constant": {"prefill_ns": 2_000_000, "decode_ns": 1_000_000}}


def made(arrivals: dict[str, Any], host_us: int = 0, loop: str = "normal", output: int = 20, **engine: Any) -> Run:
    return simulate(
        load_scenario(
            {
                "model": "qwen3-0.6b",
                "device": DEVICE,
                "host": {"constant": {"iteration_ns": 1000 * host_us}},
                "engine": {"kv_tokens": 2_000, "loop": loop, **engine},
                "workload": {
                    "arrivals": arrivals,
                    "lengths": {"prompt_tokens": {"kind": "uniform", "low": 50, "high": 90}, "output_tokens": output},
                    "count": 30,
                    "max_new_tokens": 40,
                },
            }
        ).scenario
    )


TIMED = {"kind": "poisson", "rate_per_s": 90}
TIED = {"kind": "at_iteration", "every": 3}


def found(one: Run, other: Run) -> Difference:
    difference = compare_decisions(one, other)
    assert difference is not None
    return difference


def received_by(run: Run, step: int) -> set[str]:
    """Who had been received when ``step`` was decided: its launch comes after the stamp of its iteration."""
    table = run.records.requests
    launch = run.records.steps["launch_ns"][step]
    return {rid for rid, queued in zip(table["id"], table["queued_ns"], strict=True) if queued <= launch}


def ended_by(run: Run, step: int) -> set[str]:
    table = run.records.requests
    launch = run.records.steps["launch_ns"][step]
    return {rid for rid, finish in zip(table["id"], table["finish_ns"], strict=True) if finish <= launch}


def test_equal_runs_have_no_difference() -> None:
    assert compare_decisions(made(TIMED), made(TIMED)) is None


@pytest.mark.parametrize("loop", ["normal", "overlap"])
@pytest.mark.parametrize("host_us", [100, 400, 900])
def test_a_slower_host_hears_of_requests_earlier_or_later(loop: str, host_us: int) -> None:
    one, other = made(TIMED, loop=loop), made(TIMED, host_us, loop)
    difference = found(one, other)
    step, *_ = first_difference(one.records.decisions, other.records.decisions) or (None,)
    assert difference.step == step
    sets = received_by(one, difference.step), received_by(other, difference.step)
    assert difference.cause == "arrival" and sets[0] != sets[1], "the cause is told by the tables too"
    assert difference.by_timing
    early, late = ("simulation", "run") if sets[0] - sets[1] else ("run", "simulation")
    has, lacks = (one, other) if sets[0] - sets[1] else (other, one)
    rid = sorted(sets[0] ^ sets[1], key=one.records.requests["id"].index)[0]
    queued = has.records.requests["queued_ns"][has.records.requests["id"].index(rid)]
    ago_us = (has.records.steps["launch_ns"][difference.step] - queued) / 1e3
    assert difference.why.startswith(f"the {early} had received {rid}")
    assert f" {ago_us:,.1f} us before it decided" in difference.why
    arrival = lacks.records.requests["arrival_ns"][lacks.records.requests["id"].index(rid)]
    gap_us = (arrival - lacks.records.steps["launch_ns"][difference.step]) / 1e3
    if gap_us > 0:
        assert f"in the {late} it came {gap_us:,.1f} us after that decision" in difference.why


def test_ends_that_only_one_had_sent() -> None:
    """All requests at once, other output lengths: what differs first is who has ended."""
    first, longer = (made({"kind": "all_at_once"}, output=tokens) for tokens in (20, 19))
    difference = found(first, longer)
    assert difference.cause == "end" and difference.by_timing
    assert received_by(first, difference.step) == received_by(longer, difference.step)
    ended = ended_by(longer, difference.step) - ended_by(first, difference.step)
    assert ended and not ended_by(first, difference.step) - ended_by(longer, difference.step)
    assert difference.why.startswith("the run had sent the end of ") and "the simulation had not" in difference.why


def test_tied_to_iterations_nothing_is_timing() -> None:
    assert compare_decisions(made(TIED), made(TIED, 500)) is None
    difference = found(made(TIED), made({**TIED, "every": 4}))
    assert (difference.cause, difference.by_timing) == ("arrival", False)


def test_another_scheduler_knows_the_same_and_decides_otherwise() -> None:
    one, other = made(TIED), made(TIED, max_running_requests=4)
    difference = found(one, other)
    assert (difference.cause, difference.by_timing) == ("scheduler", False)
    assert received_by(one, difference.step) == received_by(other, difference.step)
    assert ended_by(one, difference.step) == ended_by(other, difference.step)
    assert difference.one != difference.other
    assert "the estimate of output is the same" in difference.why


def test_another_estimate_of_output_is_the_schedulers_too() -> None:
    one, other = made(TIED, kv_tokens=400), made(TIED, kv_tokens=400, new_token_ratio_decay_steps=20)
    difference = found(one, other)
    assert difference.cause == "scheduler"
    ratios = (run.records.steps["new_token_ratio"][: difference.step] for run in (one, other))
    first = int(np.flatnonzero(np.not_equal(*ratios))[0])
    assert f"from step {first:,} on the estimate of output differs" in difference.why


def test_an_idle_loop_starts_the_estimate_afresh(tmp_path: Path) -> None:
    """r1 comes 50 us behind the end of r0, or before it where the host is 5 us slower at each step: the decisions are
    the same, the estimate of output is not, and that tells when a burst makes memory short."""
    times_us = [0, 21_050, *([30_600] * 12)]
    rows = [f"{1_000 * time_us},60,{20 if time_us < 30_000 else 18}" for time_us in times_us]
    (tmp_path / "trace.csv").write_text("\n".join(["arrival_ns,prompt_tokens,output_tokens", *rows]))
    base = made(TIMED, kv_tokens=500, new_token_ratio_decay_steps=25, init_new_token_ratio=1.0).scenario
    workload = {"requests": {"trace": str(tmp_path / "trace.csv")}, "max_new_tokens": 40}
    hosts = [{"constant": {"iteration_ns": time_ns}} for time_ns in (0, 5_000)]
    one, other = (simulate({**base, "host": host, "workload": workload}) for host in hosts)
    difference = found(one, other)
    assert (difference.cause, difference.by_timing) == ("idle", True)
    assert "the loop of the simulation had found nothing to do" in difference.why
    step = int(re.findall(r"before step (\d+)", difference.why)[0])
    assert in_words(list(read_decisions(one.records.decisions))[step], ids_by_rank(one)).startswith("prefill of r1")
    assert found(other, one).why.replace("run", "simulation") == difference.why


def test_other_memory_is_named() -> None:
    difference = found(made(TIED, kv_tokens=400), made(TIED, kv_tokens=700))
    assert (difference.cause, difference.by_timing) == ("pool", False)
    assert "400 KV tokens" in difference.why and "700 KV tokens" in difference.why


def test_a_run_that_ends_early() -> None:
    one = made(TIED)
    log = list(read_decisions(one.records.decisions))
    other = made(TIED)
    other.records.decisions = other.records.decisions[:6]
    difference = found(one, other)
    assert difference.step == 0 and difference.cause == "end of run" and "the run launches no more" in difference.why
    assert difference.other == "nothing: it launches no more" and difference.one == in_words(log[0], ids_by_rank(one))


def test_ranks_are_named_without_the_refused() -> None:
    run = made({"kind": "all_at_once"}, max_queued_requests=7)
    refused = [rid for rid, why in zip(run.records.requests["id"], run.records.requests["finish_reason"], strict=True)
               if why == "error"]  # fmt: skip
    ids = ids_by_rank(run)
    accepted = [rid for rid in run.records.requests["id"] if rid not in refused]
    assert ids == accepted
    prompts = dict(zip(run.records.requests["id"], run.records.requests["prompt_tokens"], strict=True))
    for decision in read_decisions(run.records.decisions):
        for rank, prefix, new in decision.prefills:
            assert prefix + new == prompts[ids[rank]], "one prefill each: its length is the prompt's"


def test_decisions_in_words() -> None:
    decision = Decision(ForwardMode.MIXED, [(0, 16, 100), (9, 0, 8)], [1, 2, 3, 0], [2], [5, 6], 32)
    assert in_words(decision, ["a", "b", "c", "d"]) == (
        "prefill of a, #9: 108 tokens behind 16; decode of 4 (b, c, d and 1 more); retraction of c; 32 tokens evicted; "
        "2 new pages"
    )


def test_a_run_without_a_journal_is_refused() -> None:
    one, other = made(TIED), made(TIED, max_running_requests=4)
    other.records.journal = None
    with pytest.raises(InputError, match="no journal"):
        compare_decisions(one, other)
