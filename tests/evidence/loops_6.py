"""A decision chart in ``reports``: each cell a simulated result with its interval over seeds, made by one command.

``python -m tests.decision_chart`` makes it. Here the committed table is held to have every cell and seed, and the page
to show them; a small run finds a few small cells twice, a full one a seed of every cell anew, equal to the committed.
"""

from __future__ import annotations

import pandas as pd

from tests.decision_chart.cells import LAYOUTS, SEEDS, WORKLOADS, Cell, capacity, cells
from tests.decision_chart.page import page_of
from tests.decision_chart.table import FOLDER, PLACE, per_device, read
from tests.evidence.evidence import Evidence

FEW = [
    Cell("Qwen3-0.6B, H100", "sglang-0.5", workload, layout)
    for workload, layout in (("chat", "overlap"), ("bursty", "pipeline_async"), ("shared prefixes", "dp 2"))
] + [Cell("Llama-3.1-8B, H100", "sglang-0.5", "long prompts", "disaggregated 1:1")]
FEW_REQUESTS = 20
SAME = 1e-5
"""Relative: the table is kept with six digits."""


def check(smoke: bool) -> Evidence:
    """Look at what is committed, and find cells anew."""
    table = read()
    wanted = {(*cell, seed) for cell in cells() for seed in SEEDS}
    kept = set(table[[*PLACE, "seed"]].itertuples(index=False, name=None))
    lacking = [f"lacks {' | '.join(map(str, place))}" for place in sorted(wanted - kept)]
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    if not lacking:
        lacking = [f"the page lacks {line}" for line in page_of(table) if line.startswith("| `") and line not in page]
    found = _twice() if smoke else _anew(table)
    many = f"{len(LAYOUTS)} loops and layouts, {len(WORKLOADS)} workloads, {len(SEEDS)} seeds"
    return Evidence(
        figure=f"{len(wanted & kept)} of {len(wanted)} results ({many}); {len(found)} found anew are not the same",
        bar="all; 0",
        passed=not lacking and not found,
        details=(*lacking[:5], *found[:5]),
    )


def _twice() -> list[str]:
    """Small cells whose second result is not the first."""
    return [
        f"not the same twice: {' | '.join(cell)}"
        for cell in FEW
        if capacity(cell, 0, FEW_REQUESTS) != capacity(cell, 0, FEW_REQUESTS)
    ]


def _anew(table: pd.DataFrame) -> list[str]:
    """Cells of the first seed that are not as committed."""
    rates = per_device(table)
    different = []
    for cell in cells():
        old = rates[(*cell, SEEDS[0])]
        new = capacity(cell, SEEDS[0]).rate_per_s / LAYOUTS[cell.layout].devices
        if not abs(new - old) <= SAME * old:
            different.append(f"{' | '.join(cell)}: {old:.6g} is kept, {new:.6g} was found")
    return different
