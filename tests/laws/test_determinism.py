"""The same scenario and seed leave the same bytes behind, whatever process ran them."""

from __future__ import annotations

from pathlib import Path

from testbed import simulate
from tests.laws.determinism import RUNS, VARIANTS, differences


def test_processes_write_the_same_bytes(tmp_path: Path) -> None:
    """Another hash seed, and without garbage collection in another folder; ``simulate.6`` has the others."""
    last = VARIANTS[3]._replace(elsewhere=True)
    found, compared = differences(tmp_path, (VARIANTS[0], VARIANTS[2], last))
    assert found == []
    assert compared == 2 * 5 * len(RUNS)


def test_another_seed_is_another_run() -> None:
    """Or equality above would say nothing."""
    scenario = {"name": "seeds", **RUNS["random policy"]}
    digests = {simulate({**scenario, "seed": seed}).decision_digest for seed in range(3)}
    assert len(digests) == 3
