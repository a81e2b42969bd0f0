import json

import numpy as np
import pytest

from testbed.metrics.run import Run
from testbed.scenario.errors import InputError


@pytest.mark.parametrize("parquet", [True, False])
def test_what_is_saved_is_what_is_loaded(run, tmp_path, parquet):
    folder = run.save(tmp_path / "a", parquet=parquet)
    again = Run.load(folder)
    for part in ("requests", "steps", "spans"):
        old, new = getattr(run.records, part), getattr(again.records, part)
        assert list(old) == list(new)
        for name in old:
            assert np.asarray(new[name]).dtype == np.asarray(old[name]).dtype or isinstance(old[name], list)
            assert list(new[name]) == list(old[name])
    assert (again.records.token_times_ns == run.records.token_times_ns).all()
    assert (again.records.token_offsets == run.records.token_offsets).all()
    assert again.scenario == run.scenario and again.meta == run.meta and again.table() == run.table()
    assert again.decision_digest == run.decision_digest and again.records.counters == run.records.counters


@pytest.mark.parametrize("parquet", [True, False])
def test_equal_runs_give_equal_bytes(make_run, tmp_path, parquet):
    first, second = make_run(60), make_run(60)
    second.meta["provenance"] = {"date": "2031-12-31", "command": "another"}
    one, two = first.save(tmp_path / "one", parquet=parquet), second.save(tmp_path / "two", parquet=parquet)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir()) and len(names) == 9
    for name in names:
        if name not in ("run.json", "run.sha256"):
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
    left, right = (json.loads((folder / "run.json").read_text()) for folder in (one, two))
    assert left.pop("provenance") != right.pop("provenance")
    assert left == right


def test_run_json_holds_aggregates_at_the_top(run, tmp_path):
    content = json.loads((run.save(tmp_path / "a") / "run.json").read_text())
    figures = run.aggregates()
    assert content["output_throughput"] == figures["output_throughput"]
    assert content["p99_ttft_ms"] == figures["p99_ttft_ms"] and len(content["intervals"]["p99_ttft_ms"]) == 2
    assert content["slo"][0] == {"key": "p99_ttft_ms", "limit": 6.5, "value": figures["p99_ttft_ms"], "met": False}


def test_a_run_is_never_overwritten(run, tmp_path):
    run.save(tmp_path / "a")
    with pytest.raises(InputError, match="not empty"):
        run.save(tmp_path / "a")


def test_tables_without_rows_come_back(make_run, tmp_path):
    run = make_run(3)
    empty = {name: column[:0] for name, column in run.records.spans.items()}
    run.records.spans = empty
    for parquet in (True, False):
        again = Run.load(run.save(tmp_path / str(parquet), parquet=parquet))
        assert all(len(column) == 0 for column in again.records.spans.values())


@pytest.mark.parametrize("parquet", [True, False])
@pytest.mark.parametrize(
    "name",
    ["requests", "steps", "spans", "tokens", "decisions.bin", "decisions.sha256", "run.json", "scenario.resolved.yaml"],
)
@pytest.mark.parametrize("damage", ["missing", "cut", "noise"])
def test_a_damaged_folder_names_the_file(make_run, tmp_path, name, damage, parquet):
    folder = make_run(5).save(tmp_path / "a", parquet=parquet)
    path = folder / name if "." in name else folder / f"{name}.{'parquet' if parquet else 'csv'}"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3] if damage == "cut" else b"\x00\xff: [noise")
    if (name, damage) == ("scenario.resolved.yaml", "cut"):
        path.write_text("name: [unfinished")
    with pytest.raises(InputError) as caught:
        Run.load(folder)
    named = f"{caught.value.where} {caught.value.message}"
    assert name.split(".")[0] in named and "run the scenario again" in caught.value.remedy
