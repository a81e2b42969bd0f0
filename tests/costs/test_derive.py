from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.costs import derive
from testbed.costs.derive_errors import left_out
from testbed.costs.devices import DeviceProfile, load_device
from testbed.scenario.errors import InputError
from testbed.scenario.paths import data_root

root = data_root()
needs_data = pytest.mark.skipif(root is None or not (root / "measured").is_dir(), reason="no measurements here")


@needs_data
@pytest.mark.parametrize("name", ["a100-sxm", "rtx-pro-6000", "rtx-4090"])
def test_the_committed_profile_is_what_the_measurements_give(name: str) -> None:
    tables = derive.derive(name, derive.measured_root())
    text = derive.dump(tables)
    assert text == (derive.DEVICES / f"{name}.json").read_text()
    assert json.loads(text) == tables


@needs_data
def test_a_known_measurement_survives() -> None:
    frame = derive.read_kernels(derive.AICONFIGURATOR["a100-sxm"], derive.measured_root(), "gemm/gemm_perf")
    row = frame[(frame["m"] == 2048) & (frame["n"] == 8192) & (frame["k"] == 8192)]
    table = load_device("a100-sxm").tables["gemm"]["bfloat16"]
    kept = table["ns"][table["shapes"].index([8192, 8192])][table["m"].index(2048)]
    assert kept == pytest.approx(float(row["latency"].iloc[0]) * 1e6, rel=0.05)


def test_without_measurements_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TESTBED_DATA", str(tmp_path))
    with pytest.raises(InputError, match="measured/"):
        derive.measured_root()


def test_profiles_are_small() -> None:
    assert sum(path.stat().st_size for path in derive.DEVICES.iterdir()) < 1_500_000


@given(st.lists(st.lists(st.floats(1, 1e9), min_size=3, max_size=3), min_size=2, max_size=5))
def test_pooled_times_never_fall(times: list[list[float]]) -> None:
    pooled = derive.rising_both(np.array(times))
    assert (np.diff(pooled, axis=0) >= 0).all()
    assert (np.diff(pooled, axis=1) >= 0).all()


def test_rising_times_stay_and_holes_stay() -> None:
    times = np.array([[1.0, 2.0, np.nan], [3.0, 4.0, 5.0]])
    np.testing.assert_allclose(derive.rising_both(times), times)


def test_cached_kv_is_raised_to_the_line_and_the_rest_kept() -> None:
    context = np.array([1.0, 50.0, 100.0, 200.0])
    times = np.array([[10.0, 11.0, 30.0, 50.0]])
    raised = derive.cold(times, context, context[None, :], l2=60.0)
    assert raised[0].tolist() == [10.0, pytest.approx(10 + 20 * 49 / 99), 30.0, 50.0]
    np.testing.assert_array_equal(derive.cold(times, context, context[None, :], l2=0.5), times)


def test_left_out_errors_of_a_line_and_a_parabola() -> None:
    axis = [1, 2, 4, 8]
    line = pd.DataFrame([[3.0 * x for x in axis]], columns=axis)
    assert np.abs(left_out(line)).max() < 1e-12
    parabola = pd.DataFrame([[3.0 * x * x for x in axis]], columns=axis)
    assert np.abs(left_out(parabola, 0.5)).max() < 1e-12
    assert left_out(parabola).min() > 0.2


def _numbers(profile: DeviceProfile) -> list[list[float]]:
    tables = profile.tables
    lists = [row for gemm in tables["gemm"].values() for row in gemm["ns"]]
    for operator in ("prefill", "decode"):
        lists += [row for parts in tables[operator].values() for part in parts for row in part["ns"]]
    return lists


@pytest.mark.parametrize("name", [*derive.AICONFIGURATOR, *derive.LLMSERVINGSIM])
def test_every_table_is_positive_and_rising(name: str) -> None:
    rows = _numbers(load_device(name))
    assert len(rows) > 10
    assert all(row and min(row) > 0 and row == sorted(row) for row in rows)


def copy(name: str, folder: Path, **change: object) -> Path:
    lines = (derive.DEVICES / f"{name}.yaml").read_text().splitlines()
    kept = [line for line in lines if line.split(":")[0] not in change and not line.startswith("tables")]
    path = folder / "card.yaml"
    path.write_text("\n".join(kept + [f"{key}: {value}" for key, value in change.items() if value is not None]) + "\n")
    return path


def test_a_profile_file_without_tables_is_priced_by_formula(tmp_path: Path) -> None:
    profile = load_device(copy("l40s", tmp_path))
    assert profile.tables == {}
    assert profile.bytes_per_ns == 864
    assert profile.formula_ns(0, 864e3 * 0.8, "bfloat16") == pytest.approx(1000 + profile.formula.kernel_ns)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"memory_mib": None}, "memory_mib"),
        ({"memory_mib": -1}, "memory_mib"),
        ({"bandwidth_gb_s": ".nan"}, "bandwidth_gb_s"),
        ({"bandwidth_gb_s": "fast"}, "bandwidth_gb_s"),
        ({"tflops": 3}, "tflops"),
        ({"tflops": "{bfloat16: 0}"}, "tflops: bfloat16"),
        ({"decode_skew": 2}, "decode_skew"),
        ({"memory_gb": 3}, "memory_gb"),
        ({"tables": "nowhere.json"}, "tables"),
        ({"network_gb_s": 0}, "network_gb_s"),
        ({"launches_per_step": 0}, "launches_per_step"),
        ({"fit": 3}, "fit"),
    ],
)
def test_a_wrong_profile_names_the_field(tmp_path: Path, change: dict[str, object], where: str) -> None:
    path = copy("l40s", tmp_path, **change)
    with pytest.raises(InputError) as caught:
        load_device(path)
    assert caught.value.where == f"{path}: {where}"


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_tables_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(InputError) as caught:
        load_device(copy("l40s", tmp_path, tables="broken.json"))
    assert caught.value.where == str(tmp_path / "broken.json")


def test_a_misspelt_device_suggests_the_near_one() -> None:
    with pytest.raises(InputError, match="did you mean h100-sxm"):
        load_device("h100_sxm")
