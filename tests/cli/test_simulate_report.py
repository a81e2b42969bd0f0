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
