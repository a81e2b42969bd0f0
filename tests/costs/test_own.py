"""A user's own cost model needs ``price`` alone; what it lacks is made up for, and said in the report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from testbed import simulate
from testbed.scenario.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def scenario(**fields: Any) -> dict[str, Any]:
    workload = {
        "arrivals": {"kind": "poisson", "rate_per_s": 50},
        "lengths": {"prompt_tokens": 100, "output_tokens": 12},
        "count": 12,
    }
    return {"model": "qwen3-0.6b", "host": "none", "workload": workload, **fields}


def write(folder: Path, text: str) -> str:
    (folder / "own.py").write_text(text)
    return f"{folder / 'own.py'}:Own"


def test_price_is_enough(tmp_path: Path) -> None:
    text = (
        "from testbed.batch import StepCost\n"
        "class Own:\n"
        "    def __init__(self, model, device, engine): pass\n"
        "    def price(self, shape): return StepCost(1000 * (sum(shape.new_tokens) + shape.decodes), 1, True)\n"
    )
    run = simulate(scenario(cost_model=write(tmp_path, text)))
    steps = run.records.steps
    assert (steps["gpu_ns"] == 1000 * (steps["new_tokens"] + steps["decode_rows"])).all()
    assert any("own.py:Own" in note for note in run.meta["notes"])
    assert "Busy (%)" in run.table()


def test_without_price_it_is_refused(tmp_path: Path) -> None:
    text = "class Own:\n    def __init__(self, *parts): pass\n"
    with pytest.raises(InputError, match="price"):
        simulate(scenario(cost_model=write(tmp_path, text)))


def snippets() -> list[str]:
    return re.findall(r"```python\n(.+?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)


@pytest.mark.parametrize(
    ("snippet", "name", "field"),
    [
        (0, "DecodeUntilQueued", "engine.batching"),
        (1, "shortest_prompt_first", "engine.policy"),
        (3, "normal", "engine.loop"),
        (4, "PerToken", "cost_model"),
    ],
)
def test_what_the_guide_shows_runs(snippet: int, name: str, field: str, tmp_path: Path) -> None:
    (tmp_path / "guide.py").write_text(snippets()[snippet])
    named = f"{tmp_path / 'guide.py'}:{name}"
    room, _, part = field.rpartition(".")
    fields: dict[str, Any] = {room: {part: named}} if room else {part: named}
    run = simulate(scenario(**fields))
    assert set(run.records.requests["finish_reason"]) == {"length"}
