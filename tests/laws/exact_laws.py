"""Laws that hold to the nanosecond on every run: Little's for requests and for pages, timing closure, utilisation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from testbed import simulate
from testbed.metrics.laws import little, stays, violations

LEDGER = Path(__file__).parent / "page_ledger.py"

CHAT: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "host": "sglang-0.5",
    "workload": {"arrivals": "azure-conv-2023", "lengths": "azure-conv-2023", "count": 150, "rate_scale": 4.0},
}
BURST: dict[str, Any] = {
    "model": "qwen3-0.6b",
    "host": "vllm-v1",
    "workload": {
        "arrivals": {"kind": "bursts", "on_rate_per_s": 60, "on_s": 1, "off_s": 1},
        "prefix": {"groups": 5, "prefix_tokens": 90, "zipf": 1.0},
        "lengths": {
            "prompt_tokens": {"kind": "uniform", "low": 10, "high": 300},
            "output_tokens": {"kind": "uniform", "low": 1, "high": 200},
        },
        "count": 150,
        "max_new_tokens": {"ratio": 1.5},
    },
}
TALK: dict[str, Any] = {
    "model": "qwen3-0.6b",
    "host": "testbed",
    "workload": {
        "arrivals": {"kind": "poisson", "rate_per_s": 8},
        "sessions": {"turns": 4, "think_s": 0.3, "system_tokens": 50},
        "lengths": {"prompt_tokens": 60, "output_tokens": {"kind": "exponential", "mean": 60}},
        "count": 40,
    },
}

SCENARIOS: dict[str, dict[str, Any]] = {
    "chat": CHAT,
    "tiny pool with retraction": BURST | {"engine": {"kv_tokens": 3000, "mem_fraction_static": 0.88}},
    "pages of 16": BURST | {"engine": {"kv_tokens": 4000, "page_size": 16, "batching": "stall_free"}},
    "SGLang's rules": BURST | {"engine": {"kv_tokens": 3000, "preset": "sglang-0.5.1"}},
    "sessions": TALK | {"engine": {"kv_tokens": 5000, "policy": "lpm"}},
    "no prefix cache": BURST | {"engine": {"kv_tokens": 3000, "prefix_cache": "none", "batching": "mixed_chunk"}},
}


def broken_laws(name: str, loop: str) -> tuple[list[str], dict[str, int]]:
    """What the run of a scenario breaks, in words, and what was compared: sides of the laws in ns, and counts."""
    scenario = {"name": name, **SCENARIOS[name]}
    run = simulate({**scenario, "engine": {**scenario.get("engine", {}), "loop": f"{LEDGER}:{loop}"}})
    ledger = _ledger()
    found = violations(run.records)
    owned = sum(ledger.held_ns.values())
    if ledger.area_ns != owned:
        found.append(f"Little's law, pages: area {ledger.area_ns} ns, page-times of requests {owned} ns")
    sides = {place: little(*stay).area_ns for place, stay in stays(run.records).items()}
    counts = {"requests": len(run.records.requests["id"]), "retractions": int(sum(run.records.steps["retracted"]))}
    return found, sides | {"pages": ledger.area_ns} | counts


def _ledger() -> Any:
    """The ledger of the last run, in the module that the scenario's file name made."""
    module = next(m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == str(LEDGER))
    return module.LAST[0]
