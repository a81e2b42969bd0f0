"""Little's law for waiting, running and pages, timing closure and utilisation, to the nanosecond, on lively runs."""

from __future__ import annotations

import pytest

from tests.laws.exact_laws import SCENARIOS, broken_laws


@pytest.mark.parametrize("loop", ["normal", "overlap"])
@pytest.mark.parametrize("name", list(SCENARIOS))
def test_laws_hold_to_the_nanosecond(name: str, loop: str) -> None:
    found, sides = broken_laws(name, loop)
    assert found == []
    assert sides["running"] > 0 and sides["pages"] > 0 and sides["requests"] >= 150


def test_the_runs_are_lively() -> None:
    """Somewhere requests wait and are retracted, or the laws above would be tested on empty queues."""
    _, sides = broken_laws("tiny pool with retraction", "overlap")
    assert sides["waiting"] > 0 and sides["retractions"] > 0
