from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML

from testbed import Run, simulate
from testbed.cli.main import INTERNAL, INTERRUPTED, MISSED, OK, WRONG_INPUT, invoke
from testbed.scenario.errors import InputError
from testbed.scenario.schema import Scenario

SCENARIO = """\
name: Small & quick
model: qwen3-0.6b
device: {constant: {prefill_ns: 5000000, decode_ns: 1000000}}
host: none
engine: {kv_tokens: 10000}
workload:
  arrivals: {kind: constant, rate_per_s: 100}
  lengths: {prompt_tokens: 50, output_tokens: 5}
  count: 8
"""
HEAVY = ("pandas", "scipy", "matplotlib", "simpy", "numpy.random")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "s.yaml").write_text(SCENARIO, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ended_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "testbed.cli.main", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def test_simulate_writes_a_new_folder_each_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["simulate", "s.yaml", "--no-report"]) == OK
    assert "Serving Benchmark Result" in capsys.readouterr().out
    assert invoke(["simulate", "s.yaml", "--no-report", "--seed", "5"]) == OK
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["small-quick-1", "small-quick-2"]
    first, second = (json.loads((folder / f"runs/small-quick-{n}/run.json").read_text()) for n in (1, 2))
    assert first["completed"] == second["completed"] == 8
    assert "seed: 5" in (folder / "runs/small-quick-2/scenario.resolved.yaml").read_text()


def test_numbers_grow_past_gaps(folder: Path) -> None:
    (folder / "runs" / "small-quick-7").mkdir(parents=True)
    assert invoke(["simulate", "s.yaml", "--no-report"]) == OK
    assert (folder / "runs" / "small-quick-8" / "run.json").is_file()


def test_a_chosen_folder_is_never_written_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["simulate", "s.yaml", "--no-report", "-o", "out/deep"]) == OK
    before = (folder / "out/deep/run.json").read_bytes()
    assert invoke(["simulate", "s.yaml", "--no-report", "-o", "out/deep"]) == WRONG_INPUT
    assert "not empty" in capsys.readouterr().err
    assert (folder / "out/deep/run.json").read_bytes() == before


def test_the_resolved_scenario_gives_the_same_run(folder: Path) -> None:
    assert invoke(["simulate", "s.yaml", "--no-report", "-o", "a"]) == OK
    assert invoke(["simulate", "a/scenario.resolved.yaml", "--no-report", "-o", "b"]) == OK
    for name in ("decisions.bin", "scenario.resolved.yaml"):
        assert (folder / "a" / name).read_bytes() == (folder / "b" / name).read_bytes()


def test_variants_are_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare = "compare:\n  normal: {engine.loop: normal}\n  overlap: {engine.loop: overlap}\n"
    (folder / "c.yaml").write_text(SCENARIO + compare, encoding="utf-8")
    assert invoke(["simulate", "c.yaml", "-o", "out"]) == OK
    out = capsys.readouterr().out
    assert out.count("Serving Benchmark Result") == 2
    assert "paired" in out
    assert {path.name for path in (folder / "out").iterdir()} == {"normal", "overlap", "comparison"}
    assert invoke(["compare", "out/overlap", "out/normal"]) == OK
    assert "mean_ttft_ms" in capsys.readouterr().out
    everything = [f"out/{path.name}" for path in sorted((folder / "out").iterdir())]  # as a shell writes out/*
    assert invoke(["compare", *everything]) == OK
    assert invoke(["compare", "out", "-o", "out"]) == WRONG_INPUT
    err = capsys.readouterr().err
    assert "name a new folder with -o" in err and "runs/NAME-NUMBER" not in err


def test_provenance_says_when_where_and_with_what(folder: Path) -> None:
    assert invoke(["simulate", "s.yaml", "--no-report", "--seed", "7"]) == OK
    saved = json.loads((folder / "runs/small-quick-1/run.json").read_text())
    assert saved["provenance"]["seed"] == 7
    assert saved["provenance"]["numpy"] == np.__version__
    assert datetime.now(UTC) - datetime.fromisoformat(saved["provenance"]["date"]) < timedelta(minutes=5)
    assert (saved["meta"]["host"], saved["meta"]["device"]) == ("none", "constant")


def test_report_of_a_saved_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["simulate", "s.yaml", "--no-report", "-o", "out"]) == OK
    assert not (folder / "out/report.html").exists()
    assert invoke(["report", "out"]) == OK
    assert (folder / "out/report.html").stat().st_size > 1000


class TestThresholds:
    @pytest.mark.parametrize(
        ("condition", "status"),
        [
            ("ttft_p99_ms>1000", OK),
            ("p99_ttft_ms>1000", OK),
            ("ttft_p99_ms>1", MISSED),
            ("completed<8", OK),
            ("completed<=8", MISSED),
            ("ttft_p98.5_ms >= 1", MISSED),
            ("mfu_percent>90", MISSED),  # a constant device knows no MFU: nothing is proven
        ],
    )
    def test_fail_if(self, folder: Path, condition: str, status: int) -> None:
        assert invoke(["simulate", "s.yaml", "--no-report", "--fail-if", condition]) == status

    def test_slo(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert invoke(["simulate", "s.yaml", "--no-report", "--set", "slo={ttft_ms: {p99: 1000}}"]) == OK
        assert invoke(["simulate", "s.yaml", "--no-report", "--set", "slo={ttft_ms: {p99: 1}}"]) == MISSED
        captured = capsys.readouterr()
        assert "missed: slo: p99_ttft_ms" in captured.err
        assert (folder / "runs/small-quick-2/run.json").is_file()  # a missed threshold is a result

    def test_unknown_figure(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert invoke(["simulate", "s.yaml", "--no-report", "--fail-if", "throughputt>1"]) == WRONG_INPUT
        assert "there is no figure 'throughputt'" in capsys.readouterr().err
        assert not (folder / "runs").exists()  # it is refused before the run

    def test_figures_of_the_slo_are_known(self, folder: Path) -> None:
        slo = ["--set", "slo={ttft_ms: {p99: 1000}}"]
        assert invoke(["simulate", "s.yaml", "--no-report", *slo, "--fail-if", "request_goodput<1"]) == OK


def test_a_run_without_figures_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["simulate", "s.yaml", "--set", "measure.skip_s=1000"]) == WRONG_INPUT
    captured = capsys.readouterr()
    assert "run: runs/small-quick-1" in captured.out
    assert "measure: the measure window is empty" in captured.err
    saved = json.loads((folder / "runs/small-quick-1/run.json").read_text())
    assert saved["completed"] is None and saved["counters"]["steps"] > 0


def test_what_was_cut_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = "{prompt_tokens: {kind: uniform, low: 50, high: 900}, output_tokens: 5}"
    settings = ["--set", "engine.kv_tokens=128", "--set", f"workload.lengths={lengths}"]
    assert invoke(["simulate", "s.yaml", "--no-report", *settings]) == OK
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: ") and note.endswith("the 122 tokens that engine.kv_tokens allows and were cut")
    saved = json.loads((folder / "runs/small-quick-1/run.json").read_text())
    assert note.removeprefix("note: ") in saved["meta"]["notes"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["--version"]) == OK
    assert capsys.readouterr().out.startswith("testbed 0.")


def test_python_refuses_several_variants() -> None:
    with pytest.raises(InputError, match=r"(?s)several runs.*variants"):
        simulate({**YAML(typ="safe").load(SCENARIO), "compare": {"a": {"seed": 1}, "b": {"seed": 2}}})


def test_validate_says_what_follows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["validate", "s.yaml", "--set", "device=h100-sxm", "--set", "engine.kv_tokens=null"]) == OK
    out = capsys.readouterr().out
    assert 0 <= out.index("# loop:") < out.index("max_running_requests: 256")
    assert "# weights:    1.19 GB a device" in out
    assert "# loop:       overlap (auto)" in out
    assert "tokens of 114,688 bytes" in out


def test_validate_says_it_of_each_kind_of_engine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["device=h100-sxm", "engine.kv_tokens=null", "disaggregation.prefill_stages=2"]
    assert invoke(["validate", "s.yaml", *(word for setting in settings for word in ("--set", setting))]) == OK
    out = capsys.readouterr().out
    assert "# loop:       prefill: pipeline_prefill (auto)" in out
    assert "# loop:       decode: overlap_decode (auto)" in out
    assert re.search(r"# weights: +prefill: [\d.]+, [\d.]+ GB a device, by stage", out)
    gigabytes = re.findall(r"# KV: .* = ([\d.]+) GB a device", out)
    assert len(gigabytes) == 2 and all(60 < float(size) < 80 for size in gigabytes)


def test_a_scenario_without_a_name_has_that_of_its_file(folder: Path) -> None:
    (folder / "unnamed.yaml").write_text(SCENARIO.partition("\n")[2], encoding="utf-8")
    assert invoke(["simulate", "unnamed.yaml", "--no-report"]) == OK
    assert [path.name for path in (folder / "runs").iterdir()] == ["unnamed-1"]


def test_warnings_do_not_stop(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--set", "engine.policy=lpm", "--set", "engine.prefix_cache=none"]
    assert invoke(["simulate", "s.yaml", "--no-report", *settings]) == OK
    assert "warning: --set engine.policy=lpm: engine.policy: lpm" in capsys.readouterr().err


def test_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["presets"]) == OK
    out = capsys.readouterr().out
    for name in ("llama-3.1-8b", "h100-sxm", "vllm-v1-early", "sglang-0.5.1", "azure_llm_2023_code.csv", "azure-conv"):
        assert f"\n  {name}" in out
    assert invoke(["presets", "engines"]) == OK
    assert capsys.readouterr().out.splitlines()[0] == "engines"


def test_a_kind_of_presets_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["presets", "model"]) == WRONG_INPUT
    assert "did you mean 'models'?" in capsys.readouterr().err


def test_presets_fit_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    assert invoke(["presets"]) == OK
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 90


def test_trace_stats(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "arrival_s,input_tokens,output_tokens,client_id\n0,100,10,1\n1,300,30,2\n"
    (folder / "t.csv").write_text(rows, encoding="utf-8")
    assert invoke(["trace", "stats", "t.csv"]) == OK
    assert "mean 200" in capsys.readouterr().out
    assert invoke(["trace", "stats", "t.csv", "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["rows"] == 2


class TestEndings:
    def test_usage(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert invoke(["simulate", "--nonsense"]) == WRONG_INPUT
        assert invoke(["nonsense"]) == WRONG_INPUT
        assert "Traceback" not in capsys.readouterr().err
        assert invoke(["--help"]) == OK

    def test_internal_error_leaves_a_report(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise ZeroDivisionError("a defect")

        monkeypatch.setattr("testbed.api.simulate", fail)
        assert invoke(["simulate", "s.yaml"]) == INTERNAL
        (report,) = folder.glob("testbed-error-*.txt")
        text = report.read_text()
        assert "command: testbed simulate s.yaml" in text and "Traceback" in text and "a defect" in text
        err = capsys.readouterr().err
        assert str(report) in err and "Traceback" not in err

    def test_interrupt(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("testbed.api.simulate", interrupted)
        assert invoke(["simulate", "s.yaml"]) == INTERRUPTED
        assert not (folder / "runs").exists()

    def test_interrupt_of_the_second_variant(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupted(one: Scenario, **_: object) -> Run:
            if one.name == "b":
                raise KeyboardInterrupt
            return simulate(one)

        monkeypatch.setattr("testbed.api.simulate", interrupted)
        (folder / "c.yaml").write_text(SCENARIO + "compare: {a: {seed: 1}, b: {seed: 2}}\n", encoding="utf-8")
        assert invoke(["simulate", "c.yaml", "-o", "out"]) == INTERRUPTED
        assert capsys.readouterr().err.splitlines() == ["finished variants are in out", "interrupted"]
        assert (folder / "out/a/run.json").is_file()

    @pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
    def test_interrupt_of_a_process(self, folder: Path) -> None:
        settings = ["--set", "workload.count=1000000", "--set", "workload.arrivals.rate_per_s=10"]
        command = [sys.executable, "-m", "testbed.cli.main", "simulate", "s.yaml", *settings]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == INTERRUPTED, stderr
        assert "Traceback" not in stderr

    def test_nobody_reads(self, folder: Path) -> None:
        command = f"{sys.executable} -m testbed.cli.main presets | true"
        ended = subprocess.run(
            ["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=60, check=False
        )
        assert ended.stderr == ""


@pytest.mark.parametrize("arguments", [["--help"], ["simulate", "--help"], ["validate", "missing.yaml"]])
def test_light_commands_import_little(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom testbed.cli.main import invoke\n"
        f"invoke({arguments!r})\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    loaded = ended.stderr.splitlines()
    assert "testbed.cli.main" in loaded
    assert [name for name in HEAVY if name in loaded] == []


def test_the_entry_point(folder: Path) -> None:
    ended = ended_process("simulate", "s.yaml", "--no-report", "--no-progress", cwd=folder)
    assert (ended.returncode, ended.stderr) == (OK, "")
    assert ended.stdout.rstrip().endswith("run: runs/small-quick-1")
