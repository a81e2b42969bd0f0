"""What ``testbed simulate`` says it wrote is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from testbed.cli.main import invoke

SCENARIO = """\
name: small
model: qwen3-0.6b
workload:
  arrivals: {kind: poisson, rate_per_s: 20}
  lengths: {prompt_tokens: 50, output_tokens: 10}
  count: 8
"""
VARIANTS = "compare: {one: {engine.loop: normal}, two: {engine.loop: overlap}}\n"


@pytest.mark.parametrize("text", [SCENARIO, SCENARIO + VARIANTS], ids=["single", "variants"])
def test_the_report_lies_where_the_command_says(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scenario.yaml").write_text(text)
    assert invoke(["simulate", "scenario.yaml", "--no-progress"]) == 0
    named = re.search(r"^report: (\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert named is not None
    page = Path(named.group(1))
    assert page.stat().st_size > 20_000 and "<svg" in page.read_text()
    assert list((page.parent / "figures").glob("*.png")) and list((page.parent / "figures").glob("*.svg"))


def test_each_variant_has_a_report_that_the_comparison_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scenario.yaml").write_text(SCENARIO + VARIANTS)
    assert invoke(["simulate", "scenario.yaml", "--no-progress", "-o", "out"]) == 0
    page = Path("out/comparison/report.html").read_text()
    assert "<h1>small</h1>" in page
    for link in ("../one/report.html", "../two/report.html"):
        assert f'href="{link}"' in page and (Path("out/comparison") / link).is_file()


def test_a_trace_says_what_it_covers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scenario.yaml").write_text(SCENARIO)
    command = ["simulate", "scenario.yaml", "--no-progress", "--no-report", "-o"]
    assert invoke([*command, "out", "--trace-window", "0.05:0.1"]) == 0
    assert re.search(r"^trace: \S+ \(0.05 s to 0.1 s of a run of \S+ s\)$", capsys.readouterr().out, re.MULTILINE)
    assert invoke(["report", "out", "--trace"]) == 0
    assert re.search(r"^trace: \S+ \(0 s to (\S+) s of a run of \1 s\)$", capsys.readouterr().out, re.MULTILINE)
    assert invoke([*command, "other", "--trace-window", "soon"]) == 2
    assert "--trace-window" in capsys.readouterr().err
