import json
import math
from dataclasses import replace

import numpy as np
import pytest

from testbed.metrics.records import REQUEST_COLUMNS, SPAN_COLUMNS, STEP_COLUMNS, Records
from testbed.metrics.run import Run
from testbed.metrics.table import percent_more
from testbed.scenario.errors import InputError

MS = 1_000_000
TEXT = {"id", "session", "tenant", "finish_reason"}


def tiny(requests, steps=(), spans=(), **scenario):
    """A run by hand. requests: (arrival, tokens (ms), reason); times in ms."""
    table = {
        name: [""] * len(requests) if name in TEXT else np.zeros(len(requests), np.int64) for name in REQUEST_COLUMNS
    }
    tokens = []
    for row, (arrival, times, reason) in enumerate(requests):
        stamps = [time * MS for time in times]
        last = stamps[-1] if stamps else arrival * MS + MS
        table["id"][row], table["finish_reason"][row] = f"r{row}", reason
        values = {"arrival_ns": arrival * MS, "finish_ns": last, "last_token_ns": last, "prompt_tokens": 10}
        values |= {"first_scheduled_ns": arrival * MS, "output_tokens": len(stamps), "cached_tokens": 5}
        values |= {"first_token_ns": stamps[0] if stamps else -1, "decode_ns": last - arrival * MS}
        for name, value in values.items():
            table[name][row] = value
        tokens.append(stamps)
    columns = {name: np.array([step.get(name, 0) for step in steps]) for name in STEP_COLUMNS}
    lanes = {name: np.array([span.get(name, 0) for span in spans], np.int64) for name in SPAN_COLUMNS}
    offsets = np.cumsum([0, *map(len, tokens)]).astype(np.int64)
    flat = np.array([stamp for stamps in tokens for stamp in stamps], np.int64)
    return Run(scenario, Records(table, columns, lanes, offsets, flat, b""), {})


THREE = [(0, [10, 20, 40], "length"), (100, [130], "stop"), (200, [], "abort")]


def test_definitions_by_hand():
    figures = tiny(THREE).aggregates()
    assert figures["mean_ttft_ms"] == 20 and figures["mean_tpot_ms"] == 15 and figures["mean_itl_ms"] == 15
    assert figures["max_itl_ms"] == 20 and figures["mean_e2el_ms"] == 35
    assert (figures["requests"], figures["completed"], figures["failed"], figures["undefined_tpot"]) == (3, 2, 1, 1)
    assert figures["total_input_tokens"] == 20 and figures["total_output_tokens"] == 4
    assert figures["duration"] == 0.201 and figures["output_throughput"] == pytest.approx(4 / 0.201)
    assert figures["cache_hit_rate"] == 0.5 and figures["max_concurrent_requests"] == 1
    assert figures["concurrency"] == pytest.approx(71 / 201)


def test_single_token_outputs_have_no_tpot_rather_than_zero():
    run = tiny([(0, [10], "length")] * 3)
    figures = run.aggregates()
    assert np.isnan(figures["mean_tpot_ms"]) and figures["undefined_tpot"] == 3
    assert run.requests["tpot_ms"].isna().all()
    assert not run.slo_marks({"tpot_ms": {"p99": 50}})[0].met


def test_latencies_by_arrival_and_rates_by_what_happens():
    requests = [(0, [10, 20], "length"), (50, [60, 190], "length"), (150, [160, 400], "length")]
    figures = tiny(requests, measure={"skip_s": 0.04, "until": {"seconds": 0.2}}).aggregates()
    assert figures["requests"] == 2 and figures["mean_e2el_ms"] == (140 + 250) / 2
    assert figures["completed"] == 1 and figures["total_output_tokens"] == 3
    assert figures["request_throughput"] == pytest.approx(1 / 0.16)
    until_last = tiny(requests, measure={"until": "last_arrival"}).aggregates()
    assert until_last["duration"] == 0.15 and until_last["requests"] == 3


def test_an_empty_window_is_refused():
    with pytest.raises(InputError, match="window is empty") as caught:
        tiny(THREE, measure={"skip_s": 5}).aggregates()
    assert caught.value.where == "measure" and "skip_s" in caught.value.remedy


def test_a_run_without_requests_has_figures():
    figures = tiny([]).aggregates()
    assert figures["completed"] == 0 and np.isnan(figures["mean_ttft_ms"]) and np.isnan(figures["request_throughput"])
    assert "Serving Benchmark Result" in tiny([]).table()


def test_goodput_counts_requests_that_meet_every_limit():
    slo = {"ttft_ms": {"p99": 20}, "itl_ms": {"p99": 15}}
    figures = tiny(THREE, slo=slo).aggregates()
    assert figures["request_goodput"] == 0 and figures["slo_attainment"] == 0
    loose = tiny(THREE, slo={"ttft_ms": {"p99": 20}}).aggregates()
    assert loose["request_goodput"] == pytest.approx(1 / 0.201) and loose["slo_attainment"] == pytest.approx(1 / 3)
    marks = {mark.key: mark for mark in tiny(THREE, slo=slo).slo_marks()}
    assert not marks["p99_ttft_ms"].met and marks["p99_ttft_ms"].value == pytest.approx(29.8)


def test_an_unknown_slo_names_what_is_allowed():
    with pytest.raises(InputError, match="ttft_ms, tpot_ms, itl_ms, e2el_ms"):
        tiny(THREE, slo={"tftt_ms": {"p99": 1}}).aggregates()


def test_discarded_steps_are_counted_apart_from_discarded_rows():
    steps = [{"rows": 4, "extra_rows": 4, "end_ns": 5}, {"rows": 4, "extra_rows": 1, "start_ns": 5, "end_ns": 9}]
    figures = tiny(THREE, steps).aggregates()
    assert (figures["steps"], figures["extra_steps"], figures["extra_rows"]) == (2, 1, 5)


def test_kv_use_is_weighted_by_time():
    steps = [
        {"free_tokens": 100, "rows": 1},
        {"launch_ns": 150 * MS, "start_ns": 150 * MS, "free_tokens": 20, "rows": 1},
    ]
    run = tiny(THREE, steps)
    run.meta["kv_tokens"] = 100
    figures = run.aggregates()
    assert figures["kv_use_peak_percent"] == 80
    assert figures["kv_use_mean_percent"] == pytest.approx(80 * 51 / 201)


def test_kv_use_ends_where_the_last_request_leaves():
    one = {"free_tokens": 20, "rows": 1}
    run = tiny([(0, [10, 20], "length"), (80, [90, 100], "length")], [one])
    run.meta["kv_tokens"] = 100
    figures = run.aggregates()
    assert (figures["kv_use_mean_percent"], figures["kv_cached_mean_percent"]) == (16, 0)
    two = {"launch_ns": 80 * MS, "start_ns": 80 * MS, "free_tokens": 20, "evictable_tokens": 70, "rows": 1}
    cached = tiny([(0, [10, 20], "length"), (80, [90, 100], "length")], [one, two])
    cached.meta["kv_tokens"] = 100
    figures = cached.aggregates()
    assert figures["kv_use_mean_percent"] == pytest.approx(80 * 0.2 + 10 * 0.2)
    assert figures["kv_cached_mean_percent"] == pytest.approx(80 * 0.6 + 70 * 0.2)


def test_percentiles_are_chosen_and_named(run):
    figures = run.aggregates(percentiles=[25, 99.9])
    values = run.requests["ttft_ms"]
    assert figures["p25_ttft_ms"] == pytest.approx(np.percentile(values, 25))
    assert figures["p99.9_ttft_ms"] == pytest.approx(np.percentile(values, 99.9))
    assert "p50_ttft_ms" not in figures


def test_keys_that_tools_parse(run):
    names = "duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput "
    names += "input_throughput output_throughput total_token_throughput max_output_tokens_per_s max_concurrent_requests"
    latencies = {f"{w}_{m}_ms" for w in ("mean", "median", "std", "p50", "p90", "p95", "p99")
                 for m in ("ttft", "tpot", "itl", "e2el")}  # fmt: skip
    assert {*names.split(), *latencies} <= set(run.aggregates())


def test_busy_and_idle_shares_sum_to_all(run):
    figures = run.aggregates()
    parts = ("device_busy_percent", "bubble_host_percent", "bubble_transfer_percent", "bubble_no_work_percent")
    assert sum(figures[part] for part in parts) == pytest.approx(100)
    assert figures["mfu_percent"] == pytest.approx(100 * run.steps["flops"].sum() / (989e12 * figures["duration"]))
    assert run.itl_ns().sum() == sum(run.token_times(i)[-1] - run.token_times(i)[0] for i in range(300))


def test_itl_leaves_out_borders_between_requests_and_failed_requests():
    requests = [(0, [10, 20], "length"), (0, [500, 600], "abort"), (0, [], "length"), (0, [1000, 1005], "length")]
    run = tiny(requests)
    assert run.itl_ns().tolist() == [10 * MS, 100 * MS, 5 * MS]
    assert sorted(run.samples()["itl"].values_ms) == [5, 10]


def test_intervals_hold_their_figure_and_repeat(run):
    figures, bounds = run.aggregates(), run.intervals()
    for name in ("mean_ttft_ms", "p50_itl_ms", "mean_e2el_ms", "p90_tpot_ms"):
        low, high = bounds[name]
        assert low <= figures[name] <= high and low < high
    assert run.intervals() == bounds
    other = Run({**run.scenario, "seed": 1}, run.records, run.meta)
    assert other.intervals() != bounds


def test_more_requests_narrow_the_interval(make_run):
    width = []
    for requests in (200, 3200):
        low, high = make_run(requests).intervals()["mean_e2el_ms"]
        width.append(high - low)
    assert width[1] < width[0] / 2


def test_a_mean_s_interval_is_as_wide_as_theory_says(make_run):
    run = make_run(4000, rate=2)  # light load: requests hardly touch, so s / sqrt(n) holds
    low, high = run.intervals()["mean_e2el_ms"]
    expected = 2 * 1.96 * run.aggregates()["std_e2el_ms"] / 4000**0.5
    assert (high - low) == pytest.approx(expected, rel=0.25)


def test_table_shows_thresholds_and_sections(run):
    text = run.table()
    for part in ("Serving Benchmark Result", "✗ p99_ttft_ms <= 6.5", "✓ p99_tpot_ms <= 20", "P99 TTFT (ms)",
                 "Event loop", "Bubbles: host (%)", "KV cache", "Device"):  # fmt: skip
        assert part in text
    assert max(map(len, text.splitlines())) <= 58


def test_the_table_counts_guesses_and_tells_other_notes(run):
    told = [f"unmeasured: {index}" for index in range(3)] + ["guess: 7 us", "5 prompts were cut to fit the context"]
    text = Run(run.scenario, run.records, {**run.meta, "notes": told}).table()
    assert "Guessed or unmeasured inputs: 4 (listed in the report)" in text and "7 us" not in text
    assert "Note: 5 prompts were cut to fit the context" in text.splitlines()
    assert "Guessed" not in Run(run.scenario, run.records, {}).table()


def test_a_run_is_one_line_in_a_notebook(run):
    for thing in (run, run.records):
        assert "300 requests" in repr(thing) and len(repr(thing)) < 200 and "\n" not in repr(thing)
    assert "simulated" in repr(run)


def test_frames_carry_derived_columns(run):
    steps = run.steps
    assert set(steps["mode_name"]) == {"extend", "decode"}
    assert (steps["tokens"] == steps["new_tokens"] + steps["decode_rows"]).all()
    busy = (steps["end_ns"] - steps["start_ns"]).sum() + steps["idle_before_ns"].sum()
    assert busy == steps["end_ns"].iloc[-1]
    assert {"receive", "wait", "extend", "decode"} <= set(run.spans["label"])
    assert json.dumps(run.aggregates())


def test_aborted_tokens_are_not_throughput(run):
    reasons = ["abort", *run.records.requests["finish_reason"][1:]]
    other = replace(run.records, requests={**run.records.requests, "finish_reason": reasons})
    lost = Run(run.scenario, other, run.meta).aggregates()
    assert lost["failed"] == 1
    assert run.aggregates()["total_output_tokens"] - lost["total_output_tokens"] == len(run.token_times(0))


def test_what_was_hardly_there_before_is_not_told_in_percent() -> None:
    assert percent_more(1.5) == "+50.0 %" and percent_more(0.25) == "-75.0 %"
    assert percent_more(math.nan) == percent_more(56_849.0) == ""
