"""``testbed confirm`` as a user meets it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from testbed import Run, load_scenario
from testbed.cli.main import INTERRUPTED, MISSED, OK, WRONG_INPUT, invoke
from testbed.engine.models.create import Sizes, create_model
from testbed.study.confirm import run as study
from tests.cli.terminal import Command

SCENARIO = """\
name: small & quick
model: qwen3-0.6b
device: {constant: {prefill_ns: 2000000, decode_ns: 1000000}}
host: testbed
engine: {kv_tokens: 2000}
workload:
  arrivals: {kind: poisson, rate_per_s: 100}
  lengths: {prompt_tokens: {kind: uniform, low: 20, high: 90}, output_tokens: {kind: uniform, low: 2, high: 20}}
  count: 12
"""
LOOPS = "compare:\n  normal: {engine.loop: normal}\n  overlap: {engine.loop: overlap}\n"
DOCS = Path(__file__).parents[2] / "docs" / "confirm.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "one.yaml").write_text(SCENARIO, encoding="utf-8")
    (tmp_path / "loops.yaml").write_text(SCENARIO + LOOPS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


class Page(HTMLParser):
    """Every element that opens closes; what it says and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.references: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_variants_are_simulated_run_and_joined(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["confirm", "loops.yaml", "--paced", "-o", "out", "--repeats", "3"]) == OK
    printed = capsys.readouterr().out
    for name in ("normal", "overlap"):
        labels = ["simulated", "paced", "paced", "paced"]
        for place, label in zip(("simulated", "real-1", "real-2", "real-3"), labels, strict=True):
            assert Run.load(folder / "out" / name / place).meta["label"] == label
    content = read(folder / "out/confirm.json")
    assert (content["format"], content["scenario"], content["label"], content["repeats"]) == (
        1,
        "small & quick",
        "paced",
        3,
    )
    assert list(content["variants"]) == ["normal", "overlap"]
    for name, variant in content["variants"].items():
        assert f"{name}: {variant['verdict']}" in printed
        assert [len(row["repeats"]) for row in variant["figures"]] == [3] * len(variant["figures"])
        assert [replayed["diverges_at"] for replayed in variant["replays"]] == [None] * 3
        assert variant["executor_faults"] == [[], [], []]
    assert {ranking["verdict"] for ranking in content["rankings"]} <= {"right", "wrong", "too close to call"}
    text = (folder / "out/confirm.html").read_text(encoding="utf-8")
    page = Page(text)
    words = " ".join(" ".join(page.words).split())
    assert all(reference.startswith("#") for reference in page.references) and len(page.references) > 5
    assert "<script" not in text and "@import" not in text and "url(http" not in text
    for part in (
        "small & quick: simulation and reality",
        "host profile",
        "too close to call",
        "every decision as recorded",
    ):
        assert part in words
    assert all(variant["verdict"] in words for variant in content["variants"].values())
    assert {path.name for path in (folder / "out/figures").glob("*.svg")} == {
        f"{name}_{index}.svg" for name in ("latency", "device", "host") for index in (1, 2)
    }
    assert text.count("<svg") == 6
    assert invoke(["compare", "out/overlap"]) == OK
    capsys.readouterr()
    assert invoke(["replay", "out"]) == OK
    assert capsys.readouterr().out.count("every decision is the recorded one") == 8


def test_a_single_scenario(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["confirm", "one.yaml", "--paced", "--no-report", "--seed", "4", "--set", "workload.count=5"]) == OK
    out = folder / "runs/small-quick-1"
    assert {path.name for path in out.iterdir()} == {"simulated", "real-1", "real-2", "confirm.json"}
    assert read(out / "confirm.json")["provenance"]["seed"] == 4
    assert read(out / "confirm.json")["rankings"] == []
    assert "runs: runs/small-quick-1" in capsys.readouterr().out


def test_every_field_is_documented(folder: Path) -> None:
    assert invoke(["confirm", "loops.yaml", "--paced", "--no-report", "-o", "out"]) == OK
    text = DOCS.read_text(encoding="utf-8")

    def fields(value: Any) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(fields, value))
        if not isinstance(value, dict):
            return set()
        return set(value).union(*map(fields, value.values()))

    content = read(folder / "out/confirm.json")
    content.pop("provenance")
    found = fields(content) - {"normal", "overlap"}
    assert len(found) > 50
    assert [name for name in sorted(found) if not re.search(rf"`{re.escape(name)}`", text)] == []


@pytest.mark.parametrize(
    ("condition", "status"),
    [
        ("tpot>100000", OK),
        ("tpot>=0", MISSED),
        ("throughput>=0", MISSED),
        ("ttft_p99_ms>100000", OK),
        ("makespan_s>=0", MISSED),
    ],
)
def test_errors_can_fail_the_command(
    condition: str, status: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["confirm", "one.yaml", "--paced", "--no-report", "--fail-if-error", condition]) == status
    assert (f"(--fail-if-error '{condition}')" in capsys.readouterr().err) == (status == MISSED)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--repeats", "1"], "--repeats"),
        (["--fail-if-error", "tpott>5"], "there is no figure 'tpott'"),
        (["--fail-if-error", "tpot"], "--fail-if-error 'tpot': is not of the form"),
        (["--set", "executor=simulated"], "there is nothing real to confirm a simulation with"),
        (["-o", "one.yaml"], "is a file, not a folder"),
        (["--set", "engine.kv_tokens=null"], "give engine.kv_tokens"),
    ],
)
def test_wrong_input_is_told_before_anything_runs(
    arguments: list[str], told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paced = [] if "executor=simulated" in arguments else ["--paced"]
    assert invoke(["confirm", "one.yaml", *paced, *arguments]) == WRONG_INPUT
    assert told in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_ctrl_c_keeps_what_had_run(folder: Path) -> None:
    with Command("confirm", "one.yaml", "--paced", "--set", "workload.count=5000", cwd=folder) as command:
        command.wait_for(r"for real.*[1-9]\d* of 5,000 finished")
        command.interrupt()
        ended = command.ended()
    assert ended.status == INTERRUPTED
    assert "what had run is in runs/small-quick-1" in ended.stderr and "Traceback" not in ended.stderr
    assert {path.name for path in (folder / "runs/small-quick-1").iterdir()} == {"simulated", "real-1"}
    assert Run.load(folder / "runs/small-quick-1/real-1").meta["interrupted"]


def test_on_this_machine_the_device_is_opened_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """And its tokens are the oracle's where the scenario says so; an H100's profile is not this machine's."""
    create_model("llama-3.1-8b", folder / "tiny", Sizes(layers=1, hidden=32))
    opened = []

    def counted(options: Any) -> Any:
        opened.append(options)
        return original(options)

    original = study.open_device
    monkeypatch.setattr(study, "open_device", counted)
    settings = ["model=tiny", "device=h100-sxm", "tokens=oracle", "engine.context_length=256", "workload.count=6"]
    sets = [part for setting in settings for part in ("--set", setting)]
    assert invoke(["confirm", "loops.yaml", *sets, "-o", "out"]) == OK
    assert len(opened) == 1
    content = read(folder / "out/confirm.json")
    assert content["label"] == "real"
    for variant in content["variants"].values():
        assert variant["executor_faults"] == [[], []]
        causes = {finding["cause"] for finding in variant["findings"]}
        assert {"other device", "device profile"} <= causes and "scheduler" not in causes
        assert {row["name"] for row in variant["steps"]} == {"decode, eager", "extend, eager"}


def test_a_device_is_opened_anew_for_other_options(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Opened:
        def __init__(self, options: Any) -> None:
            self.page_size = options.page_size

        def __enter__(self) -> Opened:
            events.append(f"open {self.page_size}")
            return self

        def __exit__(self, *_: object) -> None:
            events.append(f"close {self.page_size}")

    monkeypatch.setattr(study, "open_device", Opened)
    monkeypatch.setattr(study.api, "execute_on", lambda device, *_, **__: events.append(f"run {device.page_size}"))
    content = {
        "model": "qwen3-0.6b",
        "workload": {
            "lengths": {"prompt_tokens": 5, "output_tokens": 5},
            "arrivals": {"kind": "all_at_once"},
            "count": 1,
        },
    }
    scenarios = [load_scenario({**content, "engine": {"page_size": size}}).scenario for size in (1, 16)]
    with study.RealRuns() as real:
        for one in (scenarios[0], scenarios[0], scenarios[1], scenarios[0]):
            real.execute(one)
    assert events == [
        "open 1",
        "run 1",
        "run 1",
        "close 1",
        "open 16",
        "run 16",
        "close 16",
        "open 1",
        "run 1",
        "close 1",
    ]
