"""The designs of overlap on a real engine: the same decisions and the model's own tokens, whoever launches."""

from __future__ import annotations

from pathlib import Path

from testbed.api import check_real, execute_on
from testbed.engine.device import open_device
from testbed.scenario.schema import Scenario
from tests.engine.world import tiny_model
from tests.properties.draws import DESIGNS


def scenario(model: Path, loop: str) -> Scenario:
    return Scenario.model_validate(
        {
            "model": str(model),
            "device": "h100-sxm",
            "executor": "real",
            "engine": {
                "loop": loop,
                "kv_tokens": 320,
                "max_running_requests": 6,
                "context_length": 128,
                "dtype": "float32",
                "chunked_prefill_size": 16,
                "init_new_token_ratio": 0.01,
            },
            "workload": {
                "arrivals": {"kind": "all_at_once"},
                "lengths": {"prompt_tokens": 40, "output_tokens": 30},
                "count": 8,
            },
        }
    )


def test_the_designs_give_the_same_tokens(tmp_path: Path) -> None:
    model = tiny_model("qwen2", tmp_path / "tiny")
    with open_device(check_real(scenario(model, "overlap"))) as device:
        runs = [execute_on(device, scenario(model, loop), checks="full") for loop in DESIGNS]
    assert [run.meta["loop"] for run in runs] == list(DESIGNS)
    streams, *others = runs
    assert streams.requests["retractions"].sum() > 0
    for other in others:
        assert other.records.decisions == streams.records.decisions
        journals = (run.records.journal for run in (streams, other))
        mine, theirs = ([tokens.tolist() for tokens in journal.tokens] for journal in journals if journal)
        assert mine == theirs and len(mine) == len(streams.records.steps["step"])
