"""Which loop runs for which flags (specification A.0)."""

from __future__ import annotations

import pytest

from testbed.loops.normal import event_loop_normal
from testbed.loops.overlap import event_loop_overlap
from testbed.loops.overlap_suspended import event_loop_overlap_suspended
from testbed.loops.overlap_thread import event_loop_overlap_thread
from testbed.loops.pipeline import event_loop_pipeline
from testbed.loops.select import find_loop, select_loop
from testbed.scenario.errors import InputError


@pytest.mark.parametrize(
    ("role", "pp_size", "overlap", "name"),
    [
        ("null", 1, True, "overlap"),
        ("null", 1, False, "normal"),
        ("null", 2, True, "pipeline"),
        ("null", 2, False, "pipeline"),
        ("prefill", 1, True, "overlap_prefill"),
        ("prefill", 2, True, "pipeline_prefill"),
        ("prefill", 1, False, "normal_prefill"),
        ("prefill", 2, False, "pipeline_prefill"),
        ("decode", 1, True, "overlap_decode"),
        ("decode", 1, False, "normal_decode"),
    ],
)
def test_selection(role: str, pp_size: int, overlap: bool, name: str) -> None:
    assert select_loop(role, pp_size, overlap) == name  # type: ignore[arg-type]


def test_the_loops_there_are() -> None:
    assert find_loop("auto") == ("overlap", event_loop_overlap)
    assert find_loop("auto", pp_size=2) == ("pipeline", event_loop_pipeline)
    assert find_loop("normal") == ("normal", event_loop_normal)
    assert find_loop("overlap_thread") == ("overlap_thread", event_loop_overlap_thread)
    assert find_loop("overlap_suspended") == ("overlap_suspended", event_loop_overlap_suspended)


@pytest.mark.parametrize(
    ("name", "pp_size"), [("disaggregated", 1), ("overlap", 2), ("overlap_thread", 2), ("overlap_suspended", 2)]
)
def test_a_loop_that_cannot_run_is_refused(name: str, pp_size: int) -> None:
    with pytest.raises(InputError) as caught:
        find_loop(name, pp_size)
    assert caught.value.where == "engine.loop" and caught.value.remedy
