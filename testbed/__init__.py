"""testbed: one scheduler and one set of event loops, in virtual time and on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from testbed.api import execute, simulate
    from testbed.metrics.run import Run
    from testbed.scenario.load import load_scenario
    from testbed.study.compare import compare

__all__ = ["Run", "compare", "execute", "load_scenario", "simulate"]

_HOME = {
    "execute": "testbed.api",
    "simulate": "testbed.api",
    "Run": "testbed.metrics.run",
    "load_scenario": "testbed.scenario.load",
    "compare": "testbed.study.compare",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used: ``testbed --help`` needs none of them."""
    if name not in _HOME:
        raise AttributeError(f"module 'testbed' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
