"""A batching strategy of 40 lines outside the package runs beside the built-in ones on the same requests.

The strategy is that of the experiment ``02_own_strategy``; a policy, an event loop and a cost model of one's own run in
``tests/laws/test_own.py``.
"""

from __future__ import annotations

from testbed import compare, load_scenario, simulate
from testbed.metrics.laws import violations
from testbed.scheduler.batching import STRATEGIES
from tests.evidence.evidence import Evidence
from tests.laws.page import ROOT

EXPERIMENT = ROOT / "experiments" / "02_own_strategy"
LINES_MAX = 40
SHOWN = ("mean_ttft_ms", "mean_tpot_ms", "p99_itl_ms", "mean_e2el_ms", "output_throughput")


def check(smoke: bool) -> Evidence:
    """Run the experiment's scenario and compare its variants."""
    overrides = [f"workload.count={200 if smoke else 2000}"]
    variants = load_scenario(EXPERIMENT / "scenario.yaml", overrides).variants
    runs = {name: simulate(variant) for name, variant in variants.items()}
    own = [name for name, variant in variants.items() if ":" in variant.engine.batching]
    built_in = {variant.engine.batching for variant in variants.values()} & set(STRATEGIES)
    lines = len((EXPERIMENT / "patient.py").read_text(encoding="utf-8").splitlines())
    broken = [f"{name}: {law}" for name, run in runs.items() for law in violations(run.records)]
    unserved = [name for name, run in runs.items() if set(run.records.requests["finish_reason"]) != {"length"}]
    different = len({run.decision_digest for run in runs.values()})
    compared = compare(list(runs.values()))
    return Evidence(
        figure=f"{len(own)} strategies in a file of {lines} lines beside {len(built_in)} built in, "
        f"{sum(len(run.records.requests['id']) for run in runs.values())} requests served",
        bar=f"at least one of its own in at most {LINES_MAX} lines, beside built-in ones, every request served",
        passed=bool(own)
        and len(built_in) >= 3
        and lines <= LINES_MAX
        and not (broken or unserved)
        and compared.paired
        and different >= len(own) + 1,
        details=(*broken, *unserved, *compared.table(SHOWN).splitlines()),
    )
