"""Real traces under both loops: every request ends once, the invariants hold, Mooncake's hit rate is near the ideal.

At full size the result is written to ``reports/traces/README.md``. Needs the data folder.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

from tests.evidence.evidence import Evidence, commit_page

TRACES: dict[str, dict[str, Any]] = {
    "azure_llm_2023_conv_first30min.csv": {},
    "mooncake_conversation_first30min.jsonl": {"kv_tokens": 60_000_000, "page_size": 64},
    "servegen_deepseek_r1_10h.csv": {},
    "agent_miniswe_10sessions.jsonl": {},
}
IDEAL_MOONCAKE_HIT = 0.3472
"""Share of prompt tokens seen before as a prefix, with an infinite cache: the trace's README."""
HIT_SHARE = 0.98
MEMORY_BYTES = 4e9
SMALL_POOL = {"kv_tokens": 60_000, "page_size": 16}
"""For the runs with every invariant at every step."""


def scenario(trace: str, loop: str, engine: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """Llama-3.1-8B on one H100, SGLang's host times."""
    requests: dict[str, Any] = {"trace": trace} if limit is None else {"trace": trace, "limit": limit}
    return {
        "model": "llama-3.1-8b",
        "host": "sglang-0.5",
        "engine": {**engine, "loop": loop},
        "workload": {"requests": requests},
    }


def measure(wanted: dict[str, Any], checks: str) -> dict[str, Any]:
    """Run one scenario here. ``simulate`` itself raises when an invariant breaks or a request does not end once."""
    from testbed import load_scenario, simulate
    from testbed.metrics.laws import violations

    run = simulate(load_scenario(wanted).scenario, checks="full" if checks == "full" else "delta")
    figures = run.aggregates()
    ended = [reason for reason in run.records.requests["finish_reason"] if reason]
    return {
        "requests": len(run.records.requests["id"]),
        "ended": len(ended),
        "reasons": sorted(set(ended)),
        "violations": violations(run.records),
        "hit_rate": figures["cache_hit_rate"],
        "checks": {name: n for name, n in run.records.counters.items() if name.startswith("check_")},
        "retractions": run.records.counters.get("retractions", 0),
        "evicted_tokens": run.records.counters["evicted_tokens"],
        "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def in_a_process(wanted: dict[str, Any], checks: str) -> dict[str, Any]:
    """``measure`` in a fresh process, for its memory."""
    command = [sys.executable, "-m", "tests.evidence.simulate_2", json.dumps(wanted), checks]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        last = (ended.stderr.strip() or "no message").splitlines()[-1]
        return {"failure": last}
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


def check(smoke: bool) -> Evidence:
    """All traces whole, and their beginnings in a small pool with every invariant at every step."""
    details: list[str] = []
    failures = 0
    for trace, engine in TRACES.items():
        for loop in ("normal", "overlap"):
            sizes = (("delta", engine, 300 if smoke else None), ("full", SMALL_POOL, 40 if smoke else 150))
            for checks, pool, limit in sizes:
                if checks == "full" and trace.startswith("mooncake"):
                    pool = {**pool, "kv_tokens": 400_000}
                found = in_a_process(scenario(trace, loop, pool, limit), checks)
                problems = _problems(found, trace if checks == "delta" and not smoke else "")
                failures += bool(problems)
                details.append(_line(trace, loop, checks, found, problems))
    evidence = Evidence(
        figure=f"{len(details) - failures} of {len(details)} runs hold",
        bar=f"all: each request ends once, no invariant or law broken; Mooncake hit rate at least {HIT_SHARE} of "
        f"{IDEAL_MOONCAKE_HIT} within {MEMORY_BYTES / 1e9:.0f} GB",
        passed=not failures,
        details=tuple(details),
    )
    if not smoke:
        commit_page("traces", "Real traces under both loops", "simulate.2", evidence)
    return evidence


def _problems(found: dict[str, Any], whole: str) -> list[str]:
    if "failure" in found:
        return [found["failure"]]
    problems = list(found["violations"])
    if found["ended"] != found["requests"]:
        problems.append(f"{found['requests'] - found['ended']} requests did not end")
    if any(count == 0 for name, count in found["checks"].items() if name != "check_idle"):
        problems.append("an invariant was never evaluated")
    if whole.startswith("mooncake"):
        if found["hit_rate"] < HIT_SHARE * IDEAL_MOONCAKE_HIT:
            problems.append("hit rate too low")
        if found["rss_bytes"] > MEMORY_BYTES:
            problems.append("too much memory")
    return problems


def _line(trace: str, loop: str, checks: str, found: dict[str, Any], problems: list[str]) -> str:
    if "failure" in found:
        return f"MISS {trace} {loop} ({checks}): {found['failure']}"
    return (
        f"{'MISS' if problems else 'ok  '} {trace} {loop} ({checks} checks): {found['ended']} of {found['requests']} "
        f"ended ({', '.join(found['reasons'])}), hit rate {found['hit_rate']:.4f}, {found['evicted_tokens']} tokens "
        f"evicted, {found['retractions']} retracted, {found['checks'].get('check_pages', 0)} totals and "
        f"{found['checks'].get('check_full', 0)} full checks, {found['rss_bytes'] / 1e9:.2f} GB"
        + (f": {'; '.join(problems)}" if problems else "")
    )


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]), sys.argv[2])))
