"""On a GPU: exactness in bf16, decode, prefill and attention against ceilings, the shared bench, overlap, sanitizer.

The figures and their definitions are on the page ``reports/engine_gpu/README.md``. Without a GPU every section runs at
a tiny size on the CPU, which measures nothing: then the verdict is that of the committed page.
"""

from __future__ import annotations

import torch

from tests.evidence.evidence import Evidence
from tests.gpu import report

FULL_BUDGET_S = 1100
BAR = "every bar of the report, measured on an H100 or better"


def check(smoke: bool) -> Evidence:
    """With a GPU: make the report. Without: see that each section works; in full size, write that on the page."""
    found = report.measure(report.SECTIONS, FULL_BUDGET_S, report.head_commit())
    if torch.cuda.is_available():
        kept = report.keep(found)
        return Evidence(report.verdict(kept), BAR, report.complete(kept), tuple(report.table(kept).splitlines()))
    kept = report.load() if smoke else report.keep(found)
    worked = [section for section in found if section.works]
    figure = f"no GPU: nothing was measured; {len(worked)} of {len(found)} sections ran on the CPU at a tiny size"
    if any(section.on_gpu for section in kept.values()):
        figure += f"; the committed page: {report.verdict(kept)}"
    return Evidence(
        figure=figure,
        bar="every section runs" if smoke else BAR,
        passed=len(worked) == len(found) and (smoke or report.complete(kept)),
        details=tuple(f"{section.name}: {section.error or 'a wrong result'}" for section in found if not section.works),
    )
