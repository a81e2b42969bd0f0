"""Reading traces: every format, what is refused and where it says so, the published table, fetching."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from testbed.scenario.errors import InputError
from testbed.scenario.paths import data_root, trace_folder
from testbed.workload.traces import KNOWN_TRACES, KnownTrace, fetch_trace, find_trace, known, read_trace, trace_stats

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
OWN = "arrival_s,prompt_tokens,output_tokens\n"


def write(folder: Path, text: str | bytes, name: str = "trace") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "form", "expected"),
    [
        (
            AZURE + "2023-11-16 23:59:59.9799600,48,10\n2023-11-17 00:00:00.0319601,31,8\n",
            "azure",
            [(0, 48, 10), (52_000_100, 31, 8)],
        ),
        (
            AZURE
            + "2024-05-10 00:00:00.009930+00:00,5,6\n2024-05-10 02:00:00+02:00,7,8\n".replace("00.009930", "00.0"),
            "azure",
            [(0, 5, 6), (0, 7, 8)],
        ),
        (
            "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,log\n"
            "45.5,GPT-4,1,2,3,API log\n",
            "burstgpt",
            [(5 * 10**9, 472, 18), (45_500_000_000, 1, 2)],
        ),
        ("arrival_s,input_tokens,output_tokens,client_id\n0.000337,18,4634,35\n", "servegen", [(337_000, 18, 4634)]),
        ("num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3,4,7,0.75\n", "lengths", [(-1, 3, 4)]),
        (OWN + "0.25,3,4\n", "testbed", [(250_000_000, 3, 4)]),
        (
            "output_tokens,arrival_ns,prompt_tokens,more\n4,9007199254740993,3,x\n",
            "testbed",
            [(9007199254740993, 3, 4)],
        ),
        ("prompt_tokens,output_tokens\n3.0,4\n", "testbed", [(-1, 3, 4)]),
        ('{"arrival_s": 1, "prompt_tokens": 3, "output_tokens": 4}\n', "testbed", [(10**9, 3, 4)]),
        (
            '{"timestamp": 1500, "input_length": 600, "output_length": 5, "hash_ids": [0, 7]}\n',
            "mooncake",
            [(1_500_000_000, 600, 5)],
        ),
    ],
)
def test_formats_are_told_from_their_content(tmp_path: Path, text: str, form: str, expected: list[Any]) -> None:
    for content in (text, "\ufeff" + text, text.replace("\n", "\r\n"), text + "\n", text.removesuffix("\n")):
        trace = read_trace(write(tmp_path, content))
        assert trace.format.name == form
        assert [(row.arrival_ns, row.prompt_tokens, row.output_tokens) for row in trace] == expected


def test_optional_columns(tmp_path: Path) -> None:
    text = (
        "id,arrival_s,prompt_tokens,output_tokens,session,think_s,priority,tenant,prefix_id,prefix_tokens\n"
        "a,0,10,2,chat,,,acme,sys,4\nb,1,20,3,chat,0.5,7,acme,,\n"
    )
    first, second = read_trace(write(tmp_path, text))
    assert (first.id, first.session, first.turn, first.think_ns, first.priority) == ("a", "chat", 0, 0, None)
    assert (first.tenant, first.prefix_id, first.prefix_tokens) == ("acme", "sys", 4)
    assert (second.turn, second.think_ns, second.priority, second.prefix_tokens) == (1, 500_000_000, 7, 0)


ROWS = st.lists(
    st.tuples(st.integers(0, 2**40), st.integers(1, 10**6), st.integers(1, 10**6), st.integers(-9, 9)), min_size=1
)


@given(ROWS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
def test_round_trip_through_csv_jsonl_and_parquet(tmp_path: Path, rows: list[tuple[int, ...]]) -> None:
    import pyarrow
    from pyarrow import parquet

    rows.sort(key=lambda row: row[0])
    names = ["arrival_ns", "prompt_tokens", "output_tokens", "priority"]
    csv_text = "\n".join([",".join(names), *(",".join(map(str, row)) for row in rows)])
    jsonl = "\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows)
    table = tmp_path / "table"
    parquet.write_table(pyarrow.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), table)
    for path in (write(tmp_path, csv_text, "csv"), write(tmp_path, jsonl, "jsonl"), table):
        read = [(row.arrival_ns, row.prompt_tokens, row.output_tokens, row.priority) for row in read_trace(path)]
        assert read == rows


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        (OWN + "1,5,5\n0.5,5,5\n", "3:1", "earlier"),
        (OWN + "-1,5,5\n", "2:1", "negative"),
        (OWN + "1,0,5\n", "2:3", "0 tokens"),
        (OWN + "1,-4,5\n", "2:3", "-4 tokens"),
        (OWN + "1,nan,5\n", "2:3", "nan"),
        (OWN + "1,,5\n", "2:3", "prompt_tokens is empty"),
        (OWN + "1,5.5,5\n", "2:3", "whole number"),
        (OWN + "1,5,inf\n", "2:5", "inf"),
        (OWN + "1,5,-+5\n", "2:5", "-+5"),
        (OWN + "1,5," + "9" * 5000 + "\n", "2:5", "number"),
        (OWN + "1e308,5,5\n", "2:1", "62 bits"),
        (OWN + "1,5\n", "2:5", "output_tokens is empty"),
        (OWN + "1,5,5,5\n", "2:1", "4 cells under 3 columns"),
        (OWN + "1,5,5\n1,\x005,5\n", "3", "5"),
        (OWN, "1:1", "no rows"),
        ("", "1:1", "no rows"),
        ("a,b\n1,2\n", "1:1", "a, b"),
        (AZURE + "2023-11-16,4,5\n", "2:1", "date and time"),
        (AZURE + "2023-13-16 00:00:00,4,5\n", "2:1", "month"),
        (AZURE + "2023-11-16 24:00:00,4,5\n", "2:1", "time of day"),
        (AZURE + "2023-11-16 10:00:00,4,5\n2023-11-16 09:00:00,4,5\n", "3:1", "earlier"),
        ('{"arrival_s": 1, "prompt_tokens": 3, "output_tokens": 4}\n{"arrival_s": 1, "pro', "2:", "JSON"),
        ('{"arrival_s": 1, "prompt_tokens": 3, "output_tokens": 4}\n[]\n', "2:1", "object"),
        ('{"arrival_s": 1, "prompt_tokens": NaN, "output_tokens": 4}\n', "1:18", "nan"),
        ('{"arrival_s": 1, "prompt_tokens": true, "output_tokens": 4}\n', "1:18", "True"),
        (
            '{"arrival_s": 1, "prompt_tokens": 3, "output_tokens": 4}\n{"arrival_s": 1, "output_tokens": 4}\n',
            "2:1",
            "missing",
        ),
        ('{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0]}\n', "1:59", "1 blocks for 600"),
        ('{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": "0,1"}\n', "1:59", "block ids"),
        (
            '{"timestamp": 0, "session_id": 1, "turn": 0, "input_length": 20, "output_length": 5, "hash_ids": [1]}\n'
            * 2,
            "2:35",
            "turn 0",
        ),
        ("arrival_s,prompt_tokens,output_tokens,prefix_id,prefix_tokens\n0,5,5,a,6\n", "2:9", "longer than its prompt"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, text: str, place: str, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        list(read_trace(path))
    assert caught.value.where.startswith(f"{path}:{place}"), caught.value.where
    assert words in caught.value.message
    assert caught.value.remedy


@given(st.binary(max_size=200))
@example(b"PAR1abcd")
@example(b'{"a":' * 3000)
@example(b"\xff\xfe")
@example(OWN.encode() + b'"')
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
def test_no_content_makes_anything_but_an_input_error(tmp_path: Path, content: bytes) -> None:
    for prefix in (b"", OWN.encode(), b'{"arrival_s": 1, "prompt_tokens": 3, "output_tokens": 4}\n'):
        try:
            list(read_trace(write(tmp_path, prefix + content)))
        except InputError as error:
            assert error.remedy


def test_a_named_format_is_not_guessed(tmp_path: Path) -> None:
    path = write(tmp_path, OWN + "1,2,3\n")
    with pytest.raises(InputError, match="not the format azure"):
        read_trace(path, "azure")


def test_a_missing_trace_says_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, OWN, "azure_conv.csv")
    monkeypatch.setenv("TESTBED_DATA", str(tmp_path))
    assert find_trace("azure_conv.csv", Path("/")) == tmp_path / "azure_conv.csv"
    with pytest.raises(InputError, match=r"did you mean azure_conv\.csv"):
        find_trace("azure_con.csv", Path("/"))


# --- the data folder ------------------------------------------------------------------------------------------------


def traces() -> Path:
    root = data_root()
    assert root is not None, "the traces are needed: set TESTBED_DATA"
    return root / "traces"


def published() -> list[list[str]]:
    """The cells of the table in the data folder's README."""
    lines = (traces() / "README.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("| ") and not line.startswith("| file")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


@pytest.mark.parametrize("index", range(8))
def test_stats_reproduce_the_published_table(index: int) -> None:
    name, rows, _, duration, rate, cv, prompts, outputs, hit = published()[index]
    found = trace_stats(traces() / name)
    assert found["rows"] == int(rows)
    for key, cell, places in (
        ("duration_s", duration, 1),
        ("rate_per_s", rate, 3),
        ("gap_cv", cv, 3),
        ("ideal_prefix_hit", hit, 4),
    ):
        if cell == "-":
            assert found[key] is None
        else:
            assert round(found[key], places) == float(cell)
    for key, cell in (("prompt_tokens", prompts), ("output_tokens", outputs)):
        # Rounded twice, as the table was: 251.46 is printed as 252.
        assert [round(round(found[key][statistic], 1)) for statistic in ("mean", "p50", "p95", "p99", "max")] == [
            int(each) for each in cell.split("/")
        ]


def test_the_list_of_known_traces_is_the_data_folder() -> None:
    for row in published():
        content = (traces() / row[0]).read_bytes()
        assert KNOWN_TRACES[row[0]].sha256 == hashlib.sha256(content).hexdigest()
        if KNOWN_TRACES[row[0]].lines is not None:
            assert content.count(b"\n") == KNOWN_TRACES[row[0]].lines
    assert len(KNOWN_TRACES) == len(published())


# --- fetching -------------------------------------------------------------------------------------------------------


def origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, lines: int | None, sha256: str) -> None:
    """A public trace whose origin is a local file."""
    url = write(tmp_path, content, "origin").as_uri()
    trace = KnownTrace("t.csv", url, sha256, "CC-BY-4.0", "Somebody, 2026", lines=lines)
    monkeypatch.setitem(KNOWN_TRACES, "t.csv", trace)


def test_fetch_takes_the_first_lines_and_checks_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = b"a,b\r\n1,2\r\n"
    origin(tmp_path, monkeypatch, kept + b"3,4\r\n", 2, hashlib.sha256(kept).hexdigest())
    path = fetch_trace("t.csv", tmp_path / "data")
    assert path.read_bytes() == kept
    notice = (tmp_path / "data" / "t.csv.LICENSE.txt").read_text()
    assert "CC-BY-4.0" in notice and "Somebody" in notice
    monkeypatch.setattr(known, "urlopen", lambda *_, **__: pytest.fail("what is right is not fetched again"))
    assert fetch_trace("t.csv", tmp_path / "data") == path


def test_fetch_leaves_nothing_behind_when_the_checksum_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin(tmp_path, monkeypatch, b"a,b\n", None, "0" * 64)
    with pytest.raises(InputError, match="wrong checksum"):
        fetch_trace("t.csv", tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["origin"]


def test_fetch_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(known, "urlopen", offline)
    with pytest.raises(InputError, match="TESTBED_DATA"):
        fetch_trace("azure_llm_2023_code.csv", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_fetch_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(known, "urlopen", no_network)
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError):
        fetch_trace("azure_llm_2023_code.csv", tmp_path / "mine" / "data" / "traces")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


@pytest.mark.parametrize("named", [True, False])
def test_what_was_fetched_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TESTBED_DATA", raising=False)
    if named:
        monkeypatch.setenv("TESTBED_DATA", str(tmp_path / "elsewhere"))
    assert trace_folder() == (tmp_path / "elsewhere" if named else Path("data/traces"))
    trace_folder().mkdir(parents=True)
    (trace_folder() / "fetched.csv").write_text("x")
    assert find_trace("fetched.csv", Path("scenarios")) == trace_folder() / "fetched.csv"


def test_fetch_knows_what_it_cannot_fetch(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean azure_llm_2023_code"):
        fetch_trace("azure_llm_2023_codes.csv", tmp_path)
    with pytest.raises(InputError, match="cannot be downloaded"):
        fetch_trace("servegen_m_small_14h.csv", tmp_path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path) -> None:
    path = write(tmp_path, b"PAR1....PAR1")
    code = f"""
import sys
sys.modules["pyarrow"] = None
from pathlib import Path
from testbed.scenario.errors import InputError
from testbed.workload.traces import read_trace
try:
    read_trace(Path({str(path)!r}))
except InputError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "testbed[parquet]" in result.stdout
