import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from testbed.metrics.run import Run
from testbed.scenario.errors import InputError
from testbed.study.compare import compare


def rows(comparison, metric):
    return [figure for figure in comparison.figures if figure.metric == metric]


def test_a_run_beside_itself_does_not_differ(make_run):
    comparison = compare([make_run(200, name="one"), make_run(200, name="two")])
    assert comparison.paired
    figures = [figure for figure in comparison.figures if figure.run == "two" and not np.isnan(figure.value)]
    assert figures and {figure.verdict for figure in figures} == {"same"}


def test_a_slow_host_is_worse_and_a_fast_one_better(make_run):
    comparison = compare([make_run(400, host_us=us) for us in (400, 1500, 40)])
    base, slow, fast = rows(comparison, "mean_tpot_ms")
    assert (base.verdict, slow.verdict, fast.verdict) == ("baseline", "worse", "better")
    assert slow.difference == pytest.approx(slow.value - base.value) and slow.ratio == slow.value / base.value
    low, high = slow.difference_interval
    assert low < slow.difference < high


def test_pairing_takes_the_workload_out_of_the_interval(make_run):
    base, variant, other = make_run(400), make_run(400, host_us=440), make_run(400, host_us=440, seed=5)
    paired = rows(compare([base, variant]), "mean_e2el_ms")[1]
    unpaired = rows(compare([base, other]), "mean_e2el_ms")[1]
    assert paired.paired and not unpaired.paired
    width = [high - low for low, high in (paired.difference_interval, unpaired.difference_interval)]
    assert width[0] < width[1] / 5


def test_the_paired_interval_is_that_of_per_request_differences(make_run):
    runs = [make_run(2000, rate=2, host_us=us) for us in (400, 600)]
    gap = (runs[1].requests["e2el_ms"] - runs[0].requests["e2el_ms"]).to_numpy()
    figure = rows(compare(runs), "mean_e2el_ms")[1]
    low, high = figure.difference_interval
    assert figure.difference == pytest.approx(gap.mean())
    assert high - low == pytest.approx(2 * 1.96 * gap.std() / len(gap) ** 0.5, rel=0.25)


def test_a_moved_arrival_ends_the_pairing(make_run):
    run = make_run(50)
    arrivals = run.records.requests["arrival_ns"].copy()
    arrivals[3] -= 1
    moved = Run(run.scenario, replace(run.records, requests={**run.records.requests, "arrival_ns": arrivals}), run.meta)
    assert not compare([run, moved]).paired


def test_the_baseline_can_be_any_run(make_run):
    comparison = compare([make_run(100, host_us=us) for us in (400, 1500)], baseline=1)
    assert [figure.verdict for figure in rows(comparison, "mean_tpot_ms")] == ["better", "baseline"]
    with pytest.raises(InputError, match="no run number 2"):
        compare([make_run(10)], baseline=2)


def test_names_tell_runs_apart_by_what_differs(make_run):
    engines = [{"loop": "normal"}, {"loop": "overlap"}]
    runs = [make_run(10, name="x", engine=engine) for engine in engines]
    assert compare(runs).names == ["x (loop=normal)", "x (loop=overlap)"]
    assert compare([runs[0], runs[0]]).names == ["x #1", "x #2"]
    paced = Run(runs[0].scenario, runs[0].records, {**runs[0].meta, "label": "paced"})
    assert compare([runs[0], paced]).names == ["x (simulated)", "x (paced)"]
    assert compare([runs[0], paced, paced]).names == ["x (simulated)", "x (paced) #1", "x (paced) #2"]
    loops = [Run(runs[0].scenario, runs[0].records, {"loop": loop}) for loop in ("normal", "pipeline")]
    assert compare(loops).names == ["x (normal)", "x (pipeline)"]
    runs[0].meta["variant"] = "ours"
    assert compare(runs).names == ["ours", "x"]


def test_the_table_has_a_column_a_run(make_run):
    text = compare([make_run(200, host_us=us) for us in (400, 1500)]).table()
    lines = text.splitlines()
    assert "host 400 us" in lines[0] and "host 1500 us" in lines[0]
    row = next(index for index, line in enumerate(lines) if line.startswith("mean_tpot_ms"))
    assert "[" in lines[row + 1] and lines[row + 1].endswith(" -")
    assert "request_goodput" not in text and "paired: all runs" in text


def test_the_table_has_the_percentiles_that_the_runs_ask_for(make_run):
    text = compare([make_run(50, percentiles=[25]), make_run(50, host_us=900, percentiles=[75, 99.9])]).table()
    assert (
        all(f"{key}_ttft_ms" in text for key in ("p25", "p75", "p99.9")) and "p50_" not in text and "p99_" not in text
    )


def test_differences_come_in_percent_and_counts_whole(make_run):
    runs = [make_run(100, host_us=us) for us in (400, 1500)]
    runs[1].records.steps["extra_rows"] = runs[1].records.steps["extra_rows"] + 1
    comparison = compare(runs)
    lines = {line.split()[0]: line.split() for line in comparison.table().splitlines() if line}
    steps = len(runs[1].steps)
    assert lines["extra_rows"][1:] == ["0", str(steps), f"+{steps:,}"]
    tpot = rows(comparison, "mean_tpot_ms")[1]
    assert lines["mean_tpot_ms"][3:5] == [f"{100 * (tpot.value / (tpot.value - tpot.difference) - 1):+.1f}", "%"]


def test_a_figure_that_one_run_lacks_has_no_difference(make_run):
    runs = [make_run(50), make_run(50, host_us=900)]
    del runs[1].meta["peak_flops"]
    text = compare(runs).table()
    assert "nan" not in text
    assert next(line.split()[2:] for line in text.splitlines() if line.startswith("mfu_percent")) == ["-", "-"]


def test_a_comparison_is_one_line_in_a_notebook(make_run):
    text = repr(compare([make_run(50), make_run(50, host_us=900)]))
    assert text == "<Comparison of host 400 us, host 900 us; baseline host 400 us>"


def test_the_frame_and_the_files_hold_every_figure(make_run, tmp_path):
    comparison = compare([make_run(60, host_us=us) for us in (400, 1500)])
    frame = comparison.frame()
    assert len(frame) == 2 * len(comparison.runs[0].aggregates())
    assert frame.set_index(["metric", "run"]).loc[("mean_ttft_ms", "host 400 us"), "difference"] == 0
    folder = comparison.save(tmp_path / "c")
    content = json.loads((folder / "compare.json").read_text())
    assert content["paired"] and content["runs"] == comparison.names and len(content["figures"]) == len(frame)
    again = pd.read_csv(folder / "compare.csv")
    pd.testing.assert_frame_equal(again[["metric", "value"]], frame[["metric", "value"]])
    with pytest.raises(InputError, match="not empty"):
        comparison.save(folder)
