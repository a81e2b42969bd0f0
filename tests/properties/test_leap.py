"""Decode leaps against one step at a time: every record to the byte, whatever the engine, host and workload."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.properties.draws import worlds
from tests.properties.world import Job, Outcome, engine, run


def same(one: Outcome, other: Outcome) -> None:
    for column in fields(one.records):
        mine, theirs = getattr(one.records, column.name), getattr(other.records, column.name)
        if column.name == "counters":
            continue
        if column.name == "journal":
            assert [mine.stamps, mine.sent, mine.stopped] == [theirs.stamps, theirs.sent, theirs.stopped]
            continue
        if not isinstance(mine, dict):
            assert np.array_equal(mine, theirs), column.name
            continue
        for name in mine:
            assert np.array_equal(mine[name], theirs[name]), f"{column.name}.{name}"


@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=80)
@given(worlds(), st.sampled_from([0, 700, 4_000]), st.data())
def test_records_are_the_same(world: Any, host: int, data: st.DataObject) -> None:
    longer = data.draw(st.sampled_from([1, 10]))
    jobs = [job._replace(outputs=job.outputs * longer, max_new_tokens=None) for job in world.jobs]
    kv_tokens = data.draw(st.sampled_from([world.kv_tokens, 4096]))
    leapt, stepped = (
        run(world.config, jobs, kv_tokens=kv_tokens, host=host, checks="delta", leap=leap) for leap in (True, False)
    )
    same(leapt, stepped)


def test_leaps_happen() -> None:
    outcomes = [run(engine(), [Job("r", outputs=500)], host=700, checks="delta", leap=leap) for leap in (True, False)]
    assert outcomes[0].iterations < 0.2 * outcomes[1].iterations
    same(*outcomes)
