"""Confirm names what it is for: a wrong profile, a changed scheduler and a faulty executor, each put in by itself.

Paced runs of a small scenario that presses on memory. Beside the three of the issue, other constants and other faults;
and nothing at all, where no executor, scheduler or device may be blamed.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from tests.evidence.evidence import Evidence
from tests.study.mutants import MUTANTS, called, confirmed

BLAMELESS = ("host profile", "noise", "few requests")
"""What a busy machine can add to a sound run."""


def check(smoke: bool) -> Evidence:
    """Confirm every mutant; smoke size has fewer requests."""
    told, wrong = [], 0
    with TemporaryDirectory() as folder:
        for name, mutant in MUTANTS.items():
            found = confirmed(mutant, Path(folder), count=16 if smoke else 48)
            findings = found.findings["one"]
            named = called(mutant, findings)
            right = named is not None if mutant.cause else all(finding.cause in BLAMELESS for finding in findings)
            wrong += not right
            told.append(f"{'right' if right else 'WRONG'}: {name}: {named or [*map(str, findings)] or 'nothing found'}")
    return Evidence(
        figure=f"{len(MUTANTS) - wrong} of {len(MUTANTS)} called by their name",
        bar="all",
        passed=not wrong,
        details=tuple(told),
    )
