"""Faults during disaggregation, rows X5 to X11 of the test menu, for every pair of loops.

Each test proves at every iteration of every loop that no page is lost or used early (its contents are watched), that
every request ends once, that survivors have the tokens of the twin without faults, and that its fault has happened. At
smoke size two rows; the others are in the test suite, which runs beside it.
"""

from __future__ import annotations

from collections import Counter

from tests.disaggregation.test_faults import PAIRS
from tests.evidence.evidence import Evidence
from tests.evidence.tested import run_tests

ROWS = ("x5", "x6", "x7", "x8", "x9", "x10", "x11")


def check(smoke: bool) -> Evidence:
    """Run the tests of the faults in a process of their own."""
    rows = ("x7", "x10") if smoke else ROWS
    chosen = ("-k", " or ".join(f"{row}_" for row in rows)) if smoke else ()
    passed, wrong = run_tests("tests/disaggregation/test_faults.py", *chosen)
    cells: Counter[str] = Counter()
    for row in rows:
        for prefill, decode in PAIRS:
            name = f"{row}, {prefill} prefill, {decode} decode"
            cells[name] = sum(f"::test_{row}_" in test and f"{prefill}-{decode}" in test for test in passed)
    empty = [f"no test passed: {cell}" for cell, count in cells.items() if not count]
    return Evidence(
        figure=f"{len(cells) - len(empty)} of {len(cells)} cells of fault x loops passed, in {len(passed)} tests; "
        f"{len(wrong)} failed",
        bar="all, and no test fails",
        passed=not empty and not wrong,
        details=(*wrong, *empty),
    )
