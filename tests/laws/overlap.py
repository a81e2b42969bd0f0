"""The overlap study: gain by loop over host and device time, in virtual time and on the wall clock; equal tokens."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from testbed import simulate
from tests.laws.exact_laws import SCENARIOS

ROOT = Path(__file__).parents[2]
STREAMS = Path(__file__).parent / "token_streams.py"


def study() -> SimpleNamespace:
    """The functions of the experiment ``01_overlap_gain``."""
    return SimpleNamespace(
        **runpy.run_path(str(ROOT / "experiments" / "01_overlap_gain" / "analysis.py"), run_name="study")
    )


def token_streams(name: str, loop: str) -> dict[str, tuple[int, ...]]:
    """Token ids by request of a lively run under this loop."""
    scenario: dict[str, Any] = {"name": name, **SCENARIOS[name]}
    simulate({**scenario, "engine": {**scenario.get("engine", {}), "loop": f"{STREAMS}:{loop}"}})
    module = next(m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == str(STREAMS))
    return dict(module.SENT)
