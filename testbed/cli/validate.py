"""``testbed validate``: is the scenario right, and what does it imply?"""

from __future__ import annotations

from testbed.cli import options
from testbed.scenario.load import resolved_yaml


def validate(scenario: options.ScenarioFile, settings: options.Settings = None) -> None:
    """Check a scenario; print it with all values, and the memory and loop it implies."""
    loaded = options.read_scenario(scenario, settings)
    print(resolved_yaml(loaded.scenario), end="")
