"""Step for step what SGLang decided, in every recorded case: kind, order, lengths, prefixes, retractions, memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from tests.sglang_steps.case import first_difference, replay
from tests.sglang_steps.cases import EXPECTED_TO_DIFFER, recordings

CASES = [
    pytest.param(
        path,
        id=path.stem,
        marks=[pytest.mark.xfail(reason=EXPECTED_TO_DIFFER[path.stem])] if path.stem in EXPECTED_TO_DIFFER else [],
    )
    for path in recordings()
]


@pytest.mark.skipif(not CASES, reason="the recordings are not at hand (TESTBED_DATA)")
@pytest.mark.parametrize("path", CASES or [Path()])
def test_decisions_equal_the_recorded_ones(path: Path) -> None:
    case, ours = replay(path)
    assert first_difference(case, ours.steps) is None


@pytest.mark.skipif(not CASES, reason="the recordings are not at hand (TESTBED_DATA)")
def test_all_recordings_are_there() -> None:
    assert len(CASES) == 66
    assert set(EXPECTED_TO_DIFFER) <= {path.stem for path in recordings()}


@pytest.mark.skipif(not CASES, reason="the recordings are not at hand (TESTBED_DATA)")
@pytest.mark.parametrize("field", ["kind", "reqs", "seq_lens", "retracted", "available", "new_token_ratio", "prefix"])
def test_the_comparison_sees_a_changed_field(field: str) -> None:
    """A comparer that overlooks a field would pass anything."""
    path = next(path for path in recordings() if path.stem == "page16_retract")
    case, ours = replay(path)
    changed = copy.deepcopy(ours.steps)
    step = next(step for step in changed if step.get(field))
    value = step[field]
    step[field] = [*value, "x"] if isinstance(value, list) else value + "x" if isinstance(value, str) else value + 1
    difference = first_difference(case, changed)
    assert difference is not None and field in difference


@pytest.mark.skipif(not CASES, reason="the recordings are not at hand (TESTBED_DATA)")
def test_the_recorded_stall_is_reproduced_as_a_deadlock() -> None:
    """SGLang's queue can block for ever behind a retracted request; its rules block ours, and the run says so."""
    path = next(path for path in recordings() if path.stem == "stuck_after_retract")
    assert replay(path)[1].deadlock
