"""The decision log: what is written is what is read, and broken logs are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from testbed.scheduler.decisions import HEADER, Decision, digest, first_difference, read_decisions
from tests.properties.draws import World, worlds
from tests.properties.world import Job, Outcome, burst, engine, run


@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=40)
@given(worlds())
def test_the_log_says_what_was_launched(world: World) -> None:
    outcome = run(world.config, world.jobs, kv_tokens=world.kv_tokens)
    decisions = list(read_decisions(outcome.records.decisions))
    assert len(decisions) == len(outcome.batches)
    for decision, (batch, _) in zip(decisions, outcome.batches, strict=True):
        assert decision == Decision(
            mode=batch.mode,
            prefills=[(p.request.rank, p.prefix_tokens, p.new_tokens) for p in batch.prefills],
            decodes=[request.rank for request in batch.decodes],
            retracted=[request.rank for request in batch.retracted],
            pages=[page for part in batch.pages for page in part.tolist()],
            evicted_tokens=batch.evicted_tokens,
        )
    assert sum(len(d.retracted) for d in decisions) == outcome.column("retractions").sum()
    assert sum(d.evicted_tokens for d in decisions) == np.asarray(outcome.records.steps["evicted_tokens"]).sum()


def log(jobs: list[Job]) -> bytes:
    outcome: Outcome = run(engine(loop="normal"), jobs)
    return outcome.records.decisions


def test_the_first_difference() -> None:
    one, other = log(burst(3, 8, 6)), log([*burst(2, 8, 6), Job("r2", (("p2", 8),), 4)])
    assert first_difference(one, one) is None and digest(one) == digest(bytes(one))
    found = first_difference(one, other)
    assert found is not None and digest(one) != digest(other)
    step, mine, theirs = found
    assert step == 4 and mine is not None and theirs is not None
    assert (len(mine.decodes), len(theirs.decodes)) == (3, 2)
    shorter = first_difference(one, log(burst(3, 8, 5)))
    assert shorter is not None and shorter[2] is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a decision log"),
        (b"XXXX\1\0", "not a decision log"),
        (b"TBDL\2\0", "version 2"),
        (HEADER + b"\2", "cut off"),
    ],
)
def test_a_broken_log_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_decisions(data))


def test_a_log_cut_anywhere_is_refused_or_ends_at_a_step() -> None:
    whole = log(burst(3, 8, 6))
    steps = len(list(read_decisions(whole)))
    complete = 0
    for end in range(len(HEADER), len(whole)):
        try:
            complete += len(list(read_decisions(whole[:end]))) < steps
        except ValueError as error:
            assert "cut off" in str(error)
    assert complete == steps, "one place before each step"
