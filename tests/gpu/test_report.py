"""The report's own logic: what is kept, what the verdict says, how bytes and operations are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from testbed.scenario.models import load_model
from tests.gpu import decode, exactness, prefill, report
from tests.gpu.report import NO_GPU, SECTIONS, Section

GPU = {"device": "H100"}


def row(passed: bool | None) -> dict[str, Any]:
    return {"what": "this", "figure": "1 | 2", "bar": "2", "passed": passed, "values": {}}


def section(name: str, device: str = "H100", passed: bool | None = None, error: str | None = None) -> Section:
    return Section(name, [row(passed)], 1.0, error, {"device": device}, "abc", "2026-01-01")


def test_lines_that_were_cut_off_leave_the_rows_before_them() -> None:
    lines = [{"machine": GPU}, {"section": "a"}, {"row": row(True)}, {"seconds": 2.0, "error": None}]
    lines += [{"section": "b"}, {"row": row(True)}]
    first, second = report.read_lines([*map(json.dumps, lines), '{"row": {"wha'])
    assert first == Section("a", [row(True)], 2.0, None, GPU)
    assert second.rows == [row(True)]
    assert second.error is not None and not second.passed


def test_figures_of_a_gpu_are_never_replaced_by_a_run_without_one(tmp_path: Path) -> None:
    report.keep([section("decode", passed=True)], tmp_path)
    kept = report.keep([section("decode", NO_GPU), section("prefill", NO_GPU)], tmp_path)
    assert kept["decode"].on_gpu and not kept["prefill"].on_gpu
    assert report.load(tmp_path) == kept
    assert report.keep([section("decode", passed=False)], tmp_path)["decode"].passed is False
    page = (tmp_path / report.PAGE).read_text(encoding="utf-8")
    assert "| this | 1 / 2 | 2 | FAIL |" in page
    assert "no speed was measured" in page
    assert "Not run." in page


def test_the_verdict_is_pass_only_if_all_was_measured_and_every_bar_holds() -> None:
    whole = {name: section(name, passed=True) for name in SECTIONS}
    assert report.verdict(whole).startswith("PASS")
    worse = {
        "FAIL: 7 of 8 bars hold.": section("decode", passed=False),
        "FAIL: 8 of 8 bars hold; failed: decode.": section("decode", passed=True, error="broken"),
        "FAIL: 7 of 7 bars hold; not measured: decode.": section("decode", NO_GPU),
    }
    for text, one in worse.items():
        assert report.verdict({**whole, "decode": one}) == text
    assert "no figure was measured" in report.verdict({name: section(name, NO_GPU) for name in SECTIONS})


def test_without_a_gpu_only_bars_of_speed_may_be_missed() -> None:
    assert section("decode", NO_GPU, passed=False).works
    assert not section("exactness", NO_GPU, passed=False).works
    assert not section("decode", NO_GPU, error="broken").works


def test_a_section_that_takes_too_long_is_ended_and_failed() -> None:
    (found,) = report._run(["sanitizer"], 0.2, "abc")
    assert not found.passed
    assert "ended before" in str(found.error)


def test_bytes_and_operations_are_those_of_the_model() -> None:
    llama, qwen = load_model("llama-3.1-8b"), load_model("qwen3-0.6b")
    # 8,030,261,248 weights, of which an embedding of 128,256 x 4,096 is not read; 32 layers of 2 x 8 x 128 KV numbers.
    assert decode.bytes_read(llama, 1000) == 2 * (8_030_261_248 - 128_256 * 4096) + 1000 * 131_072
    assert decode.bytes_read(qwen, 0) == 2 * qwen.parameters  # its head is its embedding
    matrices = 32 * (6144 * 4096 + 4096 * 4096 + 3 * 14336 * 4096)
    pairs = 8192 * 8193 // 2
    assert prefill.flops(llama, 8192) == 2 * matrices * 8192 + 32 * 4 * 4096 * pairs + 2 * 128_256 * 4096


def test_exactness_judges_by_the_errors_of_the_other_model() -> None:
    draw = torch.Generator().manual_seed(0)
    reference = torch.randn(4, 5, 30, generator=draw)
    theirs, ours = (reference + 0.01 * torch.randn(4, 5, 30, generator=draw) for _ in range(2))
    assert exactness._judge("close", ours, theirs, reference, routed=False).passed
    wrong = ours.clone()
    wrong[0, 0] = wrong[0, 0].roll(1)  # one token of twenty
    for routed in (False, True):
        assert not exactness._judge("one wrong", wrong, theirs, reference, routed).passed
        assert not exactness._judge("far off", ours + 1, theirs, reference, routed).passed
