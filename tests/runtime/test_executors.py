"""Simulated, paced and real replace each other with one line of a scenario: one loop, one kind of run, one log."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from testbed import execute
from testbed.metrics.run import Run
from tests.engine.machine import write_config

EXECUTORS = ("simulated", "paced", "real")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    model = write_config(tmp_path_factory.mktemp("model"), vocab_size=300)
    scenario: dict[str, Any] = {
        "model": str(model),
        "host": "none",
        "engine": {"dtype": "float32", "kv_tokens": 300, "chunked_prefill_size": 32, "max_running_requests": 8},
        "workload": {
            "arrivals": {"kind": "at_iteration", "every": 2},
            "lengths": {"prompt_tokens": {"kind": "uniform", "low": 5, "high": 60}, "output_tokens": 30},
            "count": 20,
        },
        "tokens": "oracle",
    }
    return {name: execute({**scenario, "executor": name}) for name in EXECUTORS}


def test_each_says_what_it_is(runs: dict[str, Run]) -> None:
    assert [run.meta["label"] for run in runs.values()] == list(EXECUTORS)


def test_one_log_of_decisions(runs: dict[str, Run]) -> None:
    logs = {run.records.decisions for run in runs.values()}
    assert len(logs) == 1
    assert runs["real"].requests["retractions"].sum() > 0


def test_the_same_tables(runs: dict[str, Run]) -> None:
    """Same columns, same spans, same counts: a report cannot tell them apart but by the label."""
    simulated = runs["simulated"]
    for run in runs.values():
        assert list(run.requests.columns) == list(simulated.requests.columns)
        assert list(run.steps.columns) == list(simulated.steps.columns)
        assert np.array_equal(run.steps["decode_rows"], simulated.steps["decode_rows"])
        assert np.array_equal(run.requests["output_tokens"], simulated.requests["output_tokens"])
