"""Exactness: Little's law to the nanosecond, and the closed forms that one replica can express, within 99 % intervals.

Waiting, running and pages are integrated over time and compared with the sums over requests, in integers, on runs
with retraction, eviction and sessions. Queues of the textbook are compared with theory. At full size the result is
written as a page, ``reports/exactness`` (twenty minutes of one core).
"""

from __future__ import annotations

import sys

from tests.evidence.evidence import Evidence
from tests.laws.cases import CASES
from tests.laws.exact_laws import SCENARIOS, broken_laws
from tests.laws.page import ROOT, write_page


def check(smoke: bool) -> Evidence:
    """Run every law and every case."""
    broken, exact = [], []
    for name in SCENARIOS:
        for loop in ("normal", "overlap"):
            found, sides = broken_laws(name, loop)
            broken += [f"{name}, {loop}: {law}" for law in found]
            exact.append(f"{name}, {loop}: " + ", ".join(f"{key} {value:,}" for key, value in sides.items()))
    checks = []
    for case in CASES:
        found_here = case.checks(*(case.smoke if smoke else case.full))
        checks += found_here
        if not smoke:
            print("\n".join(map(str, found_here)), file=sys.stderr, flush=True)
    outside = [str(each) for each in checks if not each.holds]
    inside = len(checks) - len(outside)
    if not smoke:
        sizes = [(case.name, *case.full) for case in CASES]
        lines = broken or [f"{line}: both sides equal" for line in exact]
        write_page(ROOT / "reports" / "exactness", checks, sizes, lines)
    return Evidence(
        figure=f"{inside} of {len(checks)} closed forms; {len(broken)} laws broken in {len(exact)} runs",
        bar="all within their 99 % intervals, and no law of conservation broken by a nanosecond",
        passed=not outside and not broken,
        details=tuple(broken + outside),
    )
