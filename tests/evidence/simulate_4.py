"""Overlap against normal: the gain in steps per second is (c + g) / max(c, g), simulated and on the wall clock.

A sweep of host time c and device time g at saturation; the hosts of known engines on the map; the same sweep paced,
where c is what the host's spans say it took (more than what was asked for on a machine with other work); token streams
equal between the loops. At full size the result is written as a page, ``reports/overlap``.
"""

from __future__ import annotations

from tests.evidence.evidence import Evidence
from tests.laws.exact_laws import SCENARIOS
from tests.laws.overlap import study, token_streams
from tests.laws.overlap_page import write_page
from tests.laws.page import ROOT

SIMULATED_PERCENT = 2.0
PACED_PERCENT = 10.0
PACED_POINTS = ((2, 8), (4, 8), (6, 6), (8, 4), (8, 2))
"""(c, g) in ms: several ms, so that this program's own time is a small part of c."""


def check(smoke: bool) -> Evidence:
    """Sweep in virtual time, then on the wall clock; compare tokens."""
    experiment = study()
    table, _ = experiment.study(smoke)
    swept, known = table[table["kind"] == "sweep"], table[table["kind"] == "engine"]
    paced = experiment.paced(PACED_POINTS[1:4] if smoke else PACED_POINTS, 40 if smoke else 100, 3 if smoke else 5)
    simulated_off = experiment.off_percent(swept, "simulated")
    engines_off = experiment.off_percent(known, "simulated", "exposed")
    paced_off = experiment.off_percent(paced, "paced", "measured")
    unequal = [name for name in SCENARIOS if token_streams(name, "normal") != token_streams(name, "overlap")]
    if not smoke:
        write_page(ROOT / "reports" / "overlap", table, paced, experiment)
    return Evidence(
        figure=f"simulated within {simulated_off:.2g} %, engines within {engines_off:.2g} %, paced {paced_off:.1f} %; "
        f"{len(SCENARIOS) - len(unequal)} of {len(SCENARIOS)} scenarios with equal tokens",
        bar=f"simulated within {SIMULATED_PERCENT:g} %, paced within {PACED_PERCENT:g} %, all tokens equal",
        passed=max(simulated_off, engines_off) <= SIMULATED_PERCENT and paced_off <= PACED_PERCENT and not unequal,
        details=(
            *(f"tokens differ between the loops: {name}" for name in unequal),
            *(
                f"paced, c {row.c_ms:g} ms, g {row.g_ms:g} ms: {row.paced:.1%}, formula {row.formula:.1%}; with c as "
                f"measured, {row.c_normal_ms:.2f} and {row.c_overlap_ms:.2f} ms: {row.measured:.1%}; "
                f"repeats differ by {row.noise:.1%}"
                for row in paced.itertuples()
            ),
        ),
    )
