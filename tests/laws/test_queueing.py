"""Closed forms of queueing theory at a size for continuous integration; ``reports/exactness`` has the full size."""

from __future__ import annotations

import pytest

from tests.laws import queues
from tests.laws.cases import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_simulated_queue_is_that_of_the_textbook(case: Case) -> None:
    checks = case.checks(*case.smoke)
    assert checks
    assert [str(check) for check in checks if not check.holds] == []


def test_closed_forms_agree_with_each_other() -> None:
    """Special cases of the general formulas."""
    assert queues.by_class([0.3, 0.4], [1, 1], [1, 1])[0] < queues.pollaczek_khinchine(0.7, 1, 0.7)
    mean = sum(
        share * wait for share, wait in zip([3 / 7, 4 / 7], queues.by_class([0.3, 0.4], [1, 1], [1, 1]), strict=True)
    )
    assert mean == pytest.approx(queues.pollaczek_khinchine(0.7, 1, 0.7))  # who goes first does not change the average
    assert queues.bulk_wait(0.7, 1.0, 1) == pytest.approx(queues.pollaczek_khinchine(0.7, 1, 0.7), rel=1e-9)
    assert queues.mm1k_blocking(0.5, 1) == pytest.approx(1 / 3)  # Erlang's loss formula for one server
    assert queues.repairman_throughput(1, 2.0, 3.0) == pytest.approx(1 / 5)
    assert queues.che_hit_rate([0.1] * 10, 5) == pytest.approx(0.5)
    assert queues.lru_hits([1, 2, 1, 3, 2, 1], 2) == 1
