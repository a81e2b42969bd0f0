"""Host time of one decode step at batch 256: scheduler, batch preparation and launch, without the device.

Medians of the spans of a real run on the CPU backend, whose device is another process.
"""

from __future__ import annotations

from testbed.ports import Stage
from tests.engine.host_path import host_stages
from tests.evidence.evidence import Evidence

ROWS = 256
BAR_US, AIM_US = 300.0, 100.0
JUDGED = (Stage.RECEIVE, Stage.SCHEDULE, Stage.PREPARE, Stage.LAUNCH, Stage.SAMPLE, Stage.PROCESS, Stage.SEND)


def check(smoke: bool) -> Evidence:
    """Best of a few runs: other work on the machine only ever adds."""
    found = [
        (loop, page_size, host_stages(ROWS, 100 if smoke else 400, loop, page_size))
        for loop in ("normal", "overlap")
        for page_size in (1, 16)
        for _ in range(1 if smoke else 3)
    ]
    totals = [sum(stages[stage] for stage in JUDGED) for _, _, stages in found]
    best = min(totals)
    return Evidence(
        figure=f"{best:.0f} us, every stage but the wait",
        bar=f"at most {BAR_US:.0f} us (aim {AIM_US:.0f})",
        passed=best <= BAR_US,
        details=tuple(
            f"{loop}, pages of {page_size}: {total:.0f} us ("
            + ", ".join(f"{stage.name.lower()} {stages[stage]:.1f}" for stage in JUDGED)
            + f"); waking up {stages[Stage.WAIT]:.1f}"
            for (loop, page_size, stages), total in zip(found, totals, strict=True)
        ),
    )
