"""Which recordings there are, and the one that is expected to differ."""

from __future__ import annotations

from pathlib import Path

from testbed.scenario.paths import data_root

EXPECTED_TO_DIFFER = {
    "v053_priority_preempt": "priority preemption (specification B.6) is not part of this version",
}


def recordings() -> list[Path]:
    """The recorded cases by name; empty where the data is not at hand."""
    root = data_root()
    return sorted((root / "sglang_steps").glob("*.json")) if root else []
