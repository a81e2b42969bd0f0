"""``testbed calibrate`` as a user meets it, on this machine, within seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from testbed import simulate
from testbed.cli.calibrate import _weather
from testbed.cli.main import INTERRUPTED, OK, WRONG_INPUT, invoke
from testbed.costs import load_host
from testbed.ports import Stage

QUICK = ("--paced", "--minutes", "0.02", "--set", "device={constant: {prefill_ns: 60000, decode_ns: 40000}}")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_host_is_calibrated_and_a_scenario_can_name_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["calibrate", *QUICK, "--out", "out"]) == OK
    shown = capsys.readouterr()
    assert "  host: out/host.yaml" in shown.out and "sum_error_%" in shown.out
    assert "device:" not in shown.out, "a paced calibration has no device"
    written = json.loads(Path("out/calibration.json").read_text(encoding="utf-8"))
    assert written["format"] == 1 and "device" not in written
    rows = {(row["stage"], row["kind"]): row for row in written["host"]["errors"]}
    assert {(stage.name.lower(), "decode") for stage in Stage} < set(rows)
    host = load_host("out/host.yaml")
    assert host.fit["held_out"]["all"]["charges"] == rows["all", ""]["charges"] > 100
    assert host.price(Stage.SCHEDULE, 8) > 0
    page = Path("out/calibration.html").read_text(encoding="utf-8")
    assert "host: host.yaml" in page and "schedule, decode" in page and "http" not in page.replace("http://www.w3", "")
    assert Path("out/figures/host.svg").is_file()
    scenario = {
        "model": "qwen3-0.6b",
        "host": "out/host.yaml",
        "workload": {"arrivals": {"kind": "all_at_once"}, "lengths": {"prompt_tokens": 9, "output_tokens": 4},
                     "count": 3},
    }  # fmt: skip
    assert simulate(scenario).meta["host"] == "calibrated"


def test_without_a_folder_the_next_free_one_is_made(folder: Path) -> None:
    assert invoke(["calibrate", *QUICK]) == OK
    assert (folder / "runs/calibration-1/host.yaml").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--paced", "--minutes", "0"], "--minutes: 0 minutes"),
        (["--paced", "--minutes", "-1"], "--minutes: -1 minutes"),
        (["--paced", "--minutes", "nan"], "--minutes: nan minutes"),
        (["--paced", "--minutes", "soon"], "--minutes"),
        (["--paced", "--out", "file"], "file: is a file"),
        (["--paced", "--out", "file/below"], "file/below: the folder cannot be made"),
        (["--paced", "--out", "full"], "full: the output folder is not empty"),
        (["--paced", "--model", "qwen3-0.6"], "did you mean qwen3-0.6b?"),
        (["--model", "nowhere/model"], "nowhere/model"),
        (["--paced", "--set", "workload.count=3"], "--set workload.count=3: a calibration does not ask for it"),
        (["--paced", "--set", "host_inject=vllm-v1"], "--set host_inject=vllm-v1: a calibration"),
        (["--paced", "--set", "engine.loops=normal"], "engine.loops"),
        (["--paced", "--set", "device=h1000"], "did you mean h100-sxm?"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_measured(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    (folder / "file").write_text("x")
    (folder / "full").mkdir()
    (folder / "full" / "precious").write_text("x")
    assert invoke(["calibrate", *arguments]) == WRONG_INPUT
    assert says in capsys.readouterr().err
    assert sorted(path.name for path in folder.rglob("*")) == ["file", "full", "precious"], "nothing is left behind"


@pytest.mark.parametrize("at", ["testbed.study.calibration.host.measure_host", "testbed.report.calibration.fit_panels"])
def test_an_interrupted_calibration_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(at, interrupt)
    assert invoke(["calibrate", *QUICK, "--out", "out"]) == INTERRUPTED
    assert list(folder.iterdir()) == []


def test_a_calibration_on_a_busy_machine_says_so() -> None:
    quiet = pd.DataFrame({"noise_percent": [-3.0, 2.0, 40.0, np.nan]})
    busy = pd.DataFrame({"noise_percent": [-30.0, 20.0, 1.0]})
    assert list(_weather(quiet)) == []
    (note,) = _weather(busy)
    assert "20 %" in note and "calibrate again" in note
