"""Decisions equal those recorded from SGLang's own scheduler, step by step, with all invariants proved at each."""

from __future__ import annotations

from tests.evidence.evidence import Evidence
from tests.sglang_steps.case import first_difference, launched, replay
from tests.sglang_steps.cases import EXPECTED_TO_DIFFER, recordings

SMOKE_CASES = 6


def check(smoke: bool) -> Evidence:
    """Replay each case and compare; a table of all of them."""
    paths = recordings()
    chosen = paths[:: max(1, len(paths) // SMOKE_CASES)] if smoke else paths
    rows, equal, unexpected = [], 0, []
    for path in chosen:
        case, ours = replay(path)
        difference = first_difference(case, ours.steps)
        equal += difference is None
        if difference is not None and path.stem not in EXPECTED_TO_DIFFER:
            unexpected.append(path.stem)
        named = EXPECTED_TO_DIFFER.get(path.stem, "")
        verdict = "equal" if difference is None else f"differs ({named or difference})"
        rows.append(f"{path.stem:<32}{len(case['requests']):>5} requests{len(launched(case)):>6} steps  {verdict}")
    expected = [path.stem for path in chosen if path.stem in EXPECTED_TO_DIFFER]
    return Evidence(
        figure=f"{equal} of {len(chosen)} cases equal in every step",
        bar=f"{len(chosen) - len(expected)} of {len(chosen)}, all but the named: {', '.join(expected) or 'none'}",
        passed=bool(chosen) and not unexpected,
        details=tuple(rows),
    )
