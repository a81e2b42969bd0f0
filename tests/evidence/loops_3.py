"""The dummy first batch is needed, and every pitfall of section N that applies is a test by number, with its mutant.

Each test switches a defect on and asks that it is found, and as what; beside it the same world without the defect. At
smoke size the dummy first batch and the pipeline's pitfalls; the rest is in the test suite, which runs beside it.
"""

from __future__ import annotations

from tests.evidence.evidence import Evidence
from tests.evidence.tested import missing, run_tests

DUMMY = "test_the_dummy_first_batch_is_needed"
PIPELINE = ("n14_", "n30_", "n31_", "n33_", "n34_", "n35_", "n36_")
OVERLAP = (
    *(f"N{number}-" for number in (1, 2, 3, 4, 6, 9, 10, 12)),
    "test_a_loop_that_does_not_wait_for_the_launch_is_found",  # 5
)
DISAGGREGATION = tuple(f"N {number}" for number in (37, 38, 39, 41, 42, 43, 44, 45, 46))
ELSEWHERE = (
    "7 and 11: no counterpart (no idle ranks, no pausing); 8: a group decides alike, which line 2 shows; 13 to 29: of "
    "the scheduler and memory (docs/test_menu.md); 32: no process groups; 40: no health probes between engines"
)


def check(smoke: bool) -> Evidence:
    """Run the tests of the pitfalls in a process of their own."""
    wanted = [DUMMY, *PIPELINE, *([] if smoke else [*OVERLAP, *DISAGGREGATION])]
    places = ["tests/loops/test_overlap_designs.py", "tests/loops/pitfalls/test_pipeline_pitfalls.py"]
    if smoke:
        passed, wrong = run_tests(*places, "-k", "dummy or pitfalls")
    else:
        places += ["tests/loops/pitfalls/test_overlap_pitfalls.py", "tests/disaggregation/test_pitfalls.py"]
        passed, wrong = run_tests(*places)
    lacking = missing(passed, wanted)
    return Evidence(
        figure=f"{len(wanted) - len(lacking)} of {len(wanted)} pitfalls caught by name, in {len(passed)} tests; "
        f"{len(wrong)} failed",
        bar="all, and no test fails",
        passed=not lacking and not wrong,
        details=(*wrong, *(f"no test passed: {name}" for name in lacking), f"not here: {ELSEWHERE}"),
    )
