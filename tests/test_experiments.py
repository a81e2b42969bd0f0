"""Every experiment gives the figures of its ``expected.json`` at smoke size, and is complete."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from testbed import load_scenario

FOLDER = Path(__file__).parents[1] / "experiments"
EXPERIMENTS = sorted(path.parent for path in FOLDER.glob("*/analysis.py"))


@pytest.fixture(params=EXPERIMENTS, ids=lambda folder: folder.name)
def experiment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment's folder; ``common`` is importable as it is for the notebook."""
    monkeypatch.syspath_prepend(str(FOLDER))
    folder: Path = request.param
    return folder


def test_smoke_figures_are_as_expected(experiment: Path) -> None:
    module: dict[str, Any] = runpy.run_path(str(experiment / "analysis.py"), run_name="smoke")
    _, figures = module["study"](smoke=True)
    from common import unexpected

    assert unexpected(experiment, figures) == []


def test_is_complete(experiment: Path) -> None:
    """Hypothesis before verdict, a scenario that loads, results with their source, a figure, a row in the index."""
    text = (experiment / "README.md").read_text(encoding="utf-8")
    assert 0 < text.index("## Hypothesis") < text.index("## Verdict")
    assert load_scenario(experiment / "scenario.yaml").variants
    source = json.loads((experiment / "results" / "provenance.json").read_text(encoding="utf-8"))
    assert {"command", "commit", "seed", "device", "host profile", "machine", "date"} <= set(source)
    assert list((experiment / "figures").glob("*.png"))
    assert f"({experiment.name}/README.md)" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_there_are_experiments() -> None:
    assert [folder.name[:2] for folder in EXPERIMENTS] == [f"{number:02d}" for number in range(1, len(EXPERIMENTS) + 1)]
    assert len(EXPERIMENTS) >= 5
