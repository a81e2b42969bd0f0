"""The same scenario and seed give byte-identical records in other processes and under other hash seeds.

Also without garbage collection and from another working directory. Compared are requests, steps, spans, tokens and the
decision log.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.evidence.evidence import Evidence
from tests.laws.determinism import RUNS, VARIANTS, differences


def check(smoke: bool) -> Evidence:
    """Start the processes and compare their files."""
    variants = (VARIANTS[0], VARIANTS[2], VARIANTS[3]) if smoke else VARIANTS
    with tempfile.TemporaryDirectory() as folder:
        found, compared = differences(Path(folder), variants)
    equal = compared - len(found)
    return Evidence(
        figure=f"{equal} of {compared} files identical: {len(RUNS)} scenarios, {len(variants)} processes",
        bar="all",
        passed=not found and compared == 5 * len(RUNS) * (len(variants) - 1),
        details=(*(f"differs: {file}" for file in found), *(variant.name for variant in variants)),
    )
