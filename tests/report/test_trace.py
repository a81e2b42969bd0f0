import gzip
import json

import pytest

from testbed.report import trace as module
from testbed.report import write_trace
from testbed.scenario.errors import InputError

WHOLE = (0, 10**12)


def parse(path):
    """Slices as (lane, name, begin, end, args, flows), counters as {name: [(time, value)]}."""
    proto = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
    content = proto.Trace()
    content.ParseFromString(path.read_bytes())
    names, open_slices, slices, counters = {}, {}, [], {}
    for packet in content.packet:
        if packet.HasField("track_descriptor"):
            names[packet.track_descriptor.uuid] = packet.track_descriptor.name
            continue
        event = packet.track_event
        lane = names[event.track_uuid]
        if event.type == proto.TrackEvent.TYPE_COUNTER:
            counters.setdefault(lane, []).append((packet.timestamp, event.double_counter_value))
        elif event.type == proto.TrackEvent.TYPE_SLICE_BEGIN:
            assert lane not in open_slices, "slices of a lane overlap"
            args = {note.name: note.int_value for note in event.debug_annotations}
            open_slices[lane] = (event.name, packet.timestamp, args, list(event.flow_ids))
        else:
            name, begin, args, flows = open_slices.pop(lane)
            slices.append((lane, name, begin, packet.timestamp, args, flows))
    assert not open_slices
    return slices, counters


def test_device_slices_are_the_steps(run, tmp_path):
    slices, _ = parse(write_trace(run, tmp_path / "t.pftrace", WHOLE))
    device = [(begin, end, name, args["rows"]) for lane, name, begin, end, args, _ in slices if lane.endswith("device")]
    steps = run.steps
    expected = zip(steps["start_ns"], steps["end_ns"], steps["mode_name"], steps["rows"], strict=True)
    assert device == list(expected)


def test_host_slices_are_the_stages(run, tmp_path):
    slices, _ = parse(write_trace(run, tmp_path / "t.pftrace", WHOLE))
    host = {name for lane, name, *_ in slices if lane.endswith("host thread")}
    assert host == {"receive", "schedule", "prepare", "launch", "wait", "process", "send"}


def test_arrows_join_each_launch_to_its_step(run, tmp_path):
    slices, _ = parse(write_trace(run, tmp_path / "t.pftrace", WHOLE))
    ends = {}
    for lane, name, begin, end, args, flows in slices:
        for flow in flows:
            ends.setdefault(flow, []).append((lane.rsplit(": ")[-1], name, begin, end, args["step"]))
    assert len(ends) == len(run.steps)
    for launch, step in ends.values():
        assert launch[0] == "host thread" and launch[1] == "launch" and step[0] == "device"
        assert launch[4] == step[4] and launch[3] <= step[2]


def test_counters_repeat_the_step_records(run, tmp_path):
    _, counters = parse(write_trace(run, tmp_path / "t.pftrace", WHOLE))
    for label, column in (("running requests", "running"), ("KV owned (tokens)", "owned_tokens")):
        drawn = dict(counters[f"replica 0: {label}"])
        assert [drawn[at] for at in run.steps["launch_ns"]] == run.steps[column].tolist()


def test_counters_are_zero_where_no_request_is_in_the_system(make_run, tmp_path):
    run = make_run(20, rate=0.5)
    _, counters = parse(write_trace(run, tmp_path / "t.pftrace", WHOLE))
    running = dict(counters["replica 0: running requests"])
    owned = dict(counters["replica 0: KV owned (tokens)"])
    requests = run.requests
    alone = [
        end
        for end in requests["finish_ns"]
        if not ((requests["arrival_ns"] <= end) & (requests["finish_ns"] > end)).any()
    ]
    assert len(alone) > 5
    assert {running[end] for end in alone} == {owned[end] for end in alone} == {0}


def test_request_lanes_are_contiguous_lives(run, tmp_path):
    slices, _ = parse(write_trace(run, tmp_path / "t.pftrace", WHOLE))
    lanes = {}
    for lane, name, begin, end, *_ in slices:
        if lane.startswith("request "):
            lanes.setdefault(lane.removeprefix("request "), []).append((name, begin, end))
    assert len(lanes) == module.REQUEST_LANES
    table = run.requests.set_index("id")
    for rid, parts in lanes.items():
        assert [name for name, *_ in parts] == ["queue", "prefill", "decode"]
        assert (parts[0][1], parts[-1][2]) == (table.loc[rid, "arrival_ns"], table.loc[rid, "finish_ns"])
        assert parts[0][2] == parts[1][1] and parts[1][2] == parts[2][1]


def test_a_window_cuts_the_trace(run, tmp_path):
    begin, end = 10**9, 2 * 10**9
    slices, counters = parse(write_trace(run, tmp_path / "t.pftrace", (begin, end)))
    assert all(since < end and until > begin for _, _, since, until, *_ in slices)
    assert all(begin <= at < end for values in counters.values() for at, _ in values)
    steps = run.steps
    inside = ((steps["start_ns"] < end) & (steps["end_ns"] > begin)).sum()
    assert sum(lane.endswith("device") for lane, *_ in slices) == inside > 0


def test_it_says_which_part_of_the_run_it_covers(run, monkeypatch):
    end = int(run.requests["finish_ns"].max())
    assert module.covered(run) == (0, end, end)
    assert module.covered(run, (5, 10**15)) == (5, end, end)
    monkeypatch.setattr(module, "DEFAULT_STEPS", 50)
    assert module.covered(run) == (0, run.steps["start_ns"][50], end)


def test_by_default_a_long_run_is_cut(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DEFAULT_STEPS", 50)
    slices, _ = parse(write_trace(run, tmp_path / "t.pftrace"))
    assert sum(lane.endswith("device") for lane, *_ in slices) == 50


def test_equal_runs_give_equal_traces(run, tmp_path):
    first, second = (write_trace(run, tmp_path / name) for name in ("a.pftrace", "b.pftrace"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("window", [(5, 5), (-1, 5), (10**15, 10**16)])
def test_a_window_that_holds_nothing_is_refused(run, tmp_path, window):
    with pytest.raises(InputError, match="holds nothing"):
        write_trace(run, tmp_path / "t.pftrace", window)


def test_without_perfetto_it_is_chrome_s_json(run, tmp_path, monkeypatch):
    slices, counters = parse(write_trace(run, tmp_path / "t.pftrace", WHOLE))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    path = write_trace(run, tmp_path / "u.pftrace", WHOLE)
    assert path.name == "u.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    same = [(lanes[e["tid"]], e["name"], round(e["ts"] * 1000), e["args"]) for e in events if e["ph"] == "X"]
    assert sorted(same, key=str) == sorted(((lane, name, at, args) for lane, name, at, _, args, _ in slices), key=str)
    assert sum(e["ph"] == "s" for e in events) == sum(e["ph"] == "f" for e in events) == len(run.steps)
    assert sum(e["ph"] == "C" for e in events) == sum(map(len, counters.values()))
