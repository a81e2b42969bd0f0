"""What is said of a device that works behind others or not at all, and of loops that are not alike."""

from __future__ import annotations

import pytest

from testbed import simulate
from testbed.metrics.laws import LINK_LANE, Cause, device_time, merged
from testbed.metrics.levels import levels
from testbed.metrics.loops import loops_of
from testbed.metrics.window import Window, run_end_ns
from testbed.report.figures import batch_timeline, request_timeline
from testbed.report.series import level_mean, time_bins
from testbed.report.trace import _spans

STAGES = 3
GAP_S = 1.0
SCENARIO = {
    "model": "llama-3.1-8b",
    "device": {"constant": {"decode_ns": 3_000_000, "activation_ns": 500_000}},
    "host": "none",
    "engine": {"parallel": {"pp": STAGES}, "kv_tokens": 10_000, "prefix_cache": "none"},
    "workload": {
        "arrivals": {"kind": "constant", "rate_per_s": 1 / GAP_S},
        "lengths": {"prompt_tokens": 10, "output_tokens": 20},
        "count": 3,
    },
}


def test_no_stage_is_without_work_while_requests_are_in_the_system() -> None:
    """One request at a time: a stage is busy a third of it, and waits for the others, not for work."""
    run = simulate(SCENARIO)
    window = Window(0, run_end_ns(run.records))
    split = [device_time(run.records, window, stage) for stage in loops_of(run.records, run.meta)]
    without = {one.total_ns(Cause.NO_WORK) for one in split}
    assert len(without) == 1
    served = sum(run.requests["finish_ns"] - run.requests["arrival_ns"])
    assert without == {window.duration_ns - served}
    assert run.aggregates()["bubble_no_work_percent"] == pytest.approx(100 * (1 - served / window.duration_ns))


def test_no_stage_holds_memory_once_all_have_left() -> None:
    run = simulate(SCENARIO)
    for stage in loops_of(run.records, run.meta):
        state = levels(run.records, stage)
        between = state.values["owned_tokens"][state.since_ns >= run.requests["finish_ns"].iloc[-1]]
        assert len(between) and not between.any()


def test_stages_are_drawn_once() -> None:
    """Requests, their tokens and their memory are those of a deployment, not of each stage that has a part of them."""
    run = simulate(SCENARIO)
    bins = time_bins(run.records)
    assert level_mean(run, bins, "running").max() <= 1
    assert level_mean(run, bins, "owned_tokens").max() <= 30
    prompts = batch_timeline(run).axes[0].collections[0].get_paths()[0].vertices[:, 1].max() * bins.width_s
    assert prompts == pytest.approx(10), "one prompt of 10 tokens in a bin"


def test_replicas_without_requests_count() -> None:
    """Three requests, one after the other, for four replicas: the last has nothing to do."""
    alone = simulate({**SCENARIO, "engine": {**SCENARIO["engine"], "parallel": {"pp": 1}}})
    run = simulate({**SCENARIO, "engine": {**SCENARIO["engine"], "parallel": {"dp": 4}}})
    assert len(loops_of(run.records, run.meta)) == 4
    one, all_four = alone.aggregates(), run.aggregates()
    for figure in ("device_busy_percent", "bubble_host_percent", "kv_use_mean_percent"):
        assert all_four[figure] == pytest.approx(one[figure] / 4), figure


PAIR = {
    **SCENARIO,
    "model": "llama-3.1-8b",
    "device": "h100-sxm",
    "engine": {},
    "workload": {**SCENARIO["workload"], "count": 8},
}


def test_each_engine_is_measured_by_its_own_capacity() -> None:
    """Stages leave more room for keys and values than a decode engine of one device has."""
    run = simulate({**PAIR, "disaggregation": {"prefill_stages": 2}})
    first, _, decode = loops_of(run.records, run.meta)
    assert first.kv_tokens > 2 * decode.kv_tokens
    assert run.aggregates()["kv_use_peak_percent"] < 0.1
    assert run.steps["owned_tokens"].between(0, 100).all()


def test_a_failure_at_a_prefill_engine_is_not_all_of_its_work() -> None:
    """Half of the messages are lost: some requests end where they are prefilled, others are answered behind it."""
    run = simulate({**PAIR, "disaggregation": {"link": {"loss": 0.3}, "bootstrap_timeout_s": 2.0}, "seed": 1})
    assert {0, 1} == set(run.requests["replica"])
    window = Window(0, run_end_ns(run.records))
    prefill = loops_of(run.records, run.meta)[0]
    requests = run.requests
    handed_on = (requests["first_token_ns"] - requests["transfer_ns"]).where(
        requests["replica"] == 1, requests["finish_ns"]
    )
    present = merged(requests["arrival_ns"].to_numpy(), handed_on.to_numpy())
    without = device_time(run.records, window, prefill).total_ns(Cause.NO_WORK)
    assert without == pytest.approx(window.duration_ns - (present[1] - present[0]).sum(), abs=1e7)


def test_devices_that_have_nothing_to_prefill_or_to_decode_wait_for_nobody() -> None:
    """One request at a time: while it decodes, its prefill engine has no work, and the other way round."""
    lengths = {"prompt_tokens": 1000, "output_tokens": 200}
    workload = {"arrivals": {"kind": "constant", "rate_per_s": 0.25}, "lengths": lengths, "count": 3}
    apart = {"engine": {"loop": "normal"}, "disaggregation": {"link": {"gb_per_s": 50}}}  # no extra step at an end
    run = simulate({**PAIR, "workload": workload, **apart})
    window = Window(0, run_end_ns(run.records))
    prefill, decode = (device_time(run.records, window, loop) for loop in loops_of(run.records, run.meta))
    requests = run.requests
    decoding = int((requests["finish_ns"] - requests["first_token_ns"]).sum())
    prefilling = int((requests["first_token_ns"] - requests["transfer_ns"] - requests["arrival_ns"]).sum())
    transferring = int(requests["transfer_ns"].sum())
    assert prefill.total_ns(Cause.NO_WORK) == pytest.approx(window.duration_ns - prefilling, abs=1e5)
    assert decode.total_ns(Cause.NO_WORK) == pytest.approx(window.duration_ns - decoding - transferring, abs=1e5)
    assert min(prefilling, decoding) > 1e6


def test_a_decode_engine_waits_for_transfers() -> None:
    """One request at a time over a slow link: 1,000 tokens of 131,072 bytes take 1,311 ms at 0.1 GB/s and 10 us."""
    lengths = {"prompt_tokens": 1000, "output_tokens": 2}
    arrivals = {"kind": "constant", "rate_per_s": 0.25}
    workload = {"arrivals": arrivals, "lengths": lengths, "count": 3}
    run = simulate({**PAIR, "workload": workload, "disaggregation": {"link": {"gb_per_s": 0.1}}})
    spans = run.spans[run.spans["lane"] == LINK_LANE]
    assert spans["duration_ns"].tolist() == pytest.approx([1_310_730_000] * 3, abs=5)
    assert set(spans["replica"]) == {1}
    window = Window(0, run_end_ns(run.records))
    prefill, decode = (device_time(run.records, window, loop) for loop in loops_of(run.records, run.meta))
    assert decode.total_ns(Cause.TRANSFER) == spans["duration_ns"].sum()
    assert prefill.total_ns(Cause.TRANSFER) == 0
    assert run.aggregates()["bubble_transfer_percent"] == pytest.approx(50 * 3 * 1.31073e9 / window.duration_ns)
    drawn = [piece.lane for piece in _spans(run, 0, window.end_ns + 1)]
    assert drawn.count("decode 0: transfer") == 3
    bars = {bar.get_label(): bar[0] for bar in request_timeline(run).axes[0].containers}
    assert bars["transfer"].get_x() == pytest.approx(bars["prefill"].get_x() + bars["prefill"].get_width())
    assert bars["decode"].get_x() == pytest.approx(bars["transfer"].get_x() + bars["transfer"].get_width())
