from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.metrics.laws import (
    Cause,
    DeviceTime,
    closure,
    device_time,
    little,
    merged,
    presence,
    stays,
    utilisation,
    violations,
)
from testbed.metrics.window import Window, run_end_ns

intervals = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), max_size=12).map(
    lambda pairs: (np.array([a for a, _ in pairs], np.int64), np.array([a + b for a, b in pairs], np.int64))
)


def covered(begin, end, horizon=100):
    ticks = np.zeros(horizon, bool)
    for first, last in zip(begin, end, strict=True):
        ticks[first:last] = True
    return ticks


@given(intervals)
def test_little_counts_by_tick(pairs):
    begin, end = pairs
    number = np.zeros(100, int)
    for first, last in zip(begin, end, strict=True):
        number[first:last] += 1
    sides = little(begin, end)
    assert sides.area_ns == sides.sojourn_ns == number.sum()
    assert sides.peak == number.max()


@given(intervals)
def test_merged_is_the_disjoint_union(pairs):
    begin, end = merged(*pairs)
    assert (covered(begin, end) == covered(*pairs)).all()
    assert (end > begin).all() and (begin[1:] > end[:-1]).all()


def test_presence_names_each_event_once():
    times, number = presence(np.array([0, 2, 2]), np.array([2, 5, 5]))
    assert times.tolist() == [0, 2, 5] and number.tolist() == [1, 2, 0]


def test_a_sound_run_breaks_no_law(run):
    assert violations(run.records) == []
    assert utilisation(run.records).busy_ns == run.steps["gpu_ns"].sum()


@pytest.mark.parametrize("place", ["system", "waiting", "running"])
def test_little_holds_in_every_place(run, place):
    assert little(*stays(run.records)[place]).holds


def test_waiting_and_running_make_up_the_system(run):
    area = {place: little(*sides).area_ns for place, sides in stays(run.records).items()}
    assert area["waiting"] + area["running"] == area["system"] > 0


def test_one_lost_nanosecond_is_found(run):
    decode = run.records.requests["decode_ns"].copy()
    decode[7] -= 1
    broken = replace(run.records, requests={**run.records.requests, "decode_ns": decode})
    assert closure(broken).sum() == 1
    assert any("timing closure: 1 requests" in line for line in violations(broken))


def test_overlapping_steps_are_found(run):
    start = run.records.steps["start_ns"].copy()
    start[1] = start[0]
    broken = replace(run.records, steps={**run.records.steps, "start_ns": start})
    assert any("utilisation" in line for line in violations(broken))


def test_device_time_fills_the_window_exactly(run):
    for window in (Window(0, run_end_ns(run.records)), Window(1_234_567, 2_345_678_901)):
        split = device_time(run.records, window)
        assert sum(split.total_ns(cause) for cause in Cause) == window.duration_ns
        assert split.begin_ns[0] == window.start_ns and split.end_ns[-1] == window.end_ns
        assert (split.begin_ns[1:] == split.end_ns[:-1]).all()
    assert split.total_ns(Cause.HOST) > 0 and split.total_ns(Cause.BUSY) > 0


def test_host_bubbles_are_the_host_time_of_a_normal_loop(make_run):
    run = make_run(50, rate=1e6, host_us=400)
    split = device_time(run.records, Window(0, run_end_ns(run.records)))
    first = int(run.records.requests["arrival_ns"][0])
    assert split.total_ns(Cause.HOST) == 400_000 * len(run.steps)
    assert split.total_ns(Cause.NO_WORK) == first


def test_without_host_time_there_is_no_host_bubble(make_run):
    run = make_run(50, rate=20, host_us=0)
    split = device_time(run.records, Window(0, run_end_ns(run.records)))
    assert split.total_ns(Cause.HOST) == 0 and split.total_ns(Cause.NO_WORK) > 0


def test_an_idle_device_waits_for_a_transfer_under_way(run):
    step = run.records.steps
    begin, end = int(step["end_ns"][0]), int(step["start_ns"][1])
    link = {"lane": 2, "name": 0, "step": 0, "begin_ns": begin, "end_ns": end, "replica": 0}
    spans = {name: np.append(run.records.spans[name], value) for name, value in link.items()}
    split = device_time(replace(run.records, spans=spans), Window(0, run_end_ns(run.records)))
    before = device_time(run.records, Window(0, run_end_ns(run.records)))
    assert split.total_ns(Cause.TRANSFER) == end - begin > 0
    assert split.total_ns(Cause.HOST) == before.total_ns(Cause.HOST) - (end - begin)


@given(intervals, st.integers(0, 99))
def test_covered_time_is_a_count_of_ticks(pairs, at):
    begin, end = merged(*pairs)
    split = DeviceTime(begin, end, np.full(len(begin), int(Cause.HOST)))
    assert split.covered_ns(Cause.HOST, np.array([at]))[0] == covered(begin, end)[:at].sum()
    assert split.covered_ns(Cause.BUSY, np.array([at]))[0] == 0
