"""A run as a folder: typed tables, the decision log with its digest, the scenario and one JSON of figures.

Equal runs give byte-identical files. What depends on when and where a run was made (command, date, machine) stands in
the ``provenance`` part of ``run.json`` and nowhere else.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from testbed.metrics.columns import token_owner
from testbed.metrics.journal import Journal
from testbed.metrics.records import REQUEST_COLUMNS, SPAN_COLUMNS, STEP_COLUMNS, Column, Records
from testbed.scenario.errors import InputError
from testbed.scenario.yaml_reader import parse_yaml

FORMAT = 2
"""Version of the folder's layout; written to ``run.json``."""

JOURNAL = "journal.bin"
SEAL = "run.sha256"

TOKEN_COLUMNS = {"request": "index of the request in requests", "time_ns": "when the token was sent"}
TABLES = {"requests": REQUEST_COLUMNS, "steps": STEP_COLUMNS, "spans": SPAN_COLUMNS, "tokens": TOKEN_COLUMNS}
TEXT_COLUMNS = frozenset({"id", "session", "tenant", "finish_reason", "failure"})
_FLOAT = frozenset({"new_token_ratio", "flops", "bytes"})
_ROWS_FREE, _ROWS_A_BYTE = 1_000_000, 200
"""A small file that unfolds into far more rows was not written here: pages of 20,000 rows cost a hundred bytes each."""


class Summary(msgspec.Struct):
    """What is read back from ``run.json``; its figures follow from the records."""

    files: dict[str, str]
    """SHA-256 in hex of the other files, by name."""
    counters: dict[str, int]
    meta: dict[str, Any]
    provenance: dict[str, Any]


def new_folder(folder: Path) -> Path:
    """Make ``folder``, and refuse one that has something in it.

    Raises:
        InputError: it exists and is not empty, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot make the folder: {error.strerror}", where=str(folder)) from error
    if taken:
        raise InputError(
            "the folder is not empty", where=str(folder), remedy="A run is never overwritten: name another."
        )
    return folder


def write_records(records: Records, folder: Path, parquet: bool | None = None) -> None:
    """Write the tables, Parquet where pyarrow is installed (or as ``parquet`` says), else CSV."""
    parquet = find_spec("pyarrow") is not None if parquet is None else parquet
    tokens: dict[str, Column] = {"request": token_owner(records), "time_ns": records.token_times_ns}
    tables = {"requests": records.requests, "steps": records.steps, "spans": records.spans, "tokens": tokens}
    for name, columns in tables.items():
        if parquet:
            _write_parquet(columns, folder / f"{name}.parquet")
        else:
            _write_csv(columns, folder / f"{name}.csv")
    (folder / "decisions.bin").write_bytes(records.decisions)
    if records.journal is not None and records.journal.setting is not None:
        (folder / JOURNAL).write_bytes(records.journal.to_bytes())


def _write_parquet(columns: Mapping[str, Column], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    numbers = [name for name in table.column_names if table.schema.field(name).type == pa.int64()]
    words = [name for name in table.column_names if name not in numbers]
    # Stamps grow steadily: their differences take a third of the room that a dictionary would.
    pq.write_table(
        table,
        path,
        compression="zstd",
        use_dictionary=words,
        column_encoding=dict.fromkeys(numbers, "DELTA_BINARY_PACKED"),
    )


def _write_csv(columns: Mapping[str, Column], path: Path) -> None:
    plain = [values if isinstance(values, list) else values.tolist() for values in columns.values()]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*plain, strict=True))


def read_records(folder: Path, counters: dict[str, int]) -> Records:
    """Read what ``write_records`` wrote.

    Raises:
        InputError: a file is missing, damaged, or lacks a column; it names the file.
    """
    tables = {name: _read_table(folder, name, tuple(known)) for name, known in TABLES.items()}
    requests = len(tables["requests"]["id"])
    owner = np.asarray(tables["tokens"]["request"], dtype=np.int64)
    if len(owner) and (owner[0] < 0 or owner[-1] >= requests or (np.diff(owner) < 0).any()):
        raise unusable("tokens do not belong to the requests of this run, in order", folder / "tokens")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=requests))]).astype(np.int64)
    decisions = read_bytes(folder / "decisions.bin")
    times = np.asarray(tables["tokens"]["time_ns"], dtype=np.int64)
    return Records(
        requests=tables["requests"],
        steps=tables["steps"],
        spans=tables["spans"],
        token_offsets=offsets,
        token_times_ns=times,
        decisions=decisions,
        journal=_read_journal(folder / JOURNAL),
        counters=counters,
    )


def unusable(message: str, place: Path) -> InputError:
    """What is raised for a run folder, or a file of one, that cannot be read."""
    return InputError(message, where=str(place), remedy="copy the whole folder again, or run the scenario again")


def _read_journal(path: Path) -> Journal | None:
    if not path.exists():
        return None
    try:
        return Journal.from_bytes(read_bytes(path))
    except ValueError as error:  # msgspec's own errors are subclasses of it
        raise unusable(f"the file is damaged: {error}", path) from error


def _read_table(folder: Path, name: str, known: tuple[str, ...]) -> dict[str, Column]:
    path = folder / f"{name}.parquet"
    if not path.exists():
        path = folder / f"{name}.csv"
    if not path.exists():
        raise unusable(f"the run has no {name}.parquet and no {name}.csv", folder)
    try:
        columns = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    except (ValueError, OSError, ArithmeticError, LookupError, TypeError, NotImplementedError, csv.Error) as error:
        raise unusable(f"the file is damaged: {error}", path) from error  # pyarrow's are among these
    if missing := [column for column in known if column not in columns]:
        raise unusable(f"the file lacks the columns {', '.join(missing)}", path)
    return columns


def _read_parquet(path: Path) -> dict[str, Column]:
    if find_spec("pyarrow") is None:
        raise InputError("reading Parquet needs pyarrow", where=str(path), remedy="pip install 'testbed[parquet]'")
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_metadata(path).num_rows
    if rows > _ROWS_FREE + _ROWS_A_BYTE * path.stat().st_size:
        raise ValueError(f"it claims {rows:,} rows")
    table = pq.read_table(path)
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = pa.string() if name in TEXT_COLUMNS else pa.float64() if name in _FLOAT else pa.int64()
        if rows and (column.type != kind or column.null_count):
            raise ValueError(f"the column {name} is no column of {kind}")
    return {
        name: table[name].to_pylist() if name in TEXT_COLUMNS else np.array(table[name].to_numpy())
        for name in table.column_names
    }


def _read_csv(path: Path) -> dict[str, Column]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        names = next(reader, [])
        rows = list(reader)
    if any(len(row) != len(names) for row in rows):
        raise ValueError("a row has too few or too many fields")
    columns: dict[str, Column] = {}
    for position, name in enumerate(names):
        values = [row[position] for row in rows]
        if name in TEXT_COLUMNS:
            columns[name] = values
        else:
            columns[name] = np.array(values, np.float64) if name in _FLOAT else np.array(values, np.int64)
    return columns


def read_bytes(path: Path) -> bytes:
    """The content of a file of the run; raises InputError that names it when it cannot be read."""
    try:
        if path.exists() and not path.is_file():  # a pipe or a device may have no end
            raise unusable("this is no file", path)
        return path.read_bytes()
    except OSError as error:
        raise unusable(f"cannot read the file: {error.strerror}", path) from error


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 in hex of every file in ``folder``, by name, ascending."""
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def check_digests(folder: Path, expected: Mapping[str, str]) -> None:
    """Raise InputError, naming the file, where one is missing or differs from what was written."""
    for name, digest in expected.items():
        if name in ("", "..") or name != Path(name).name:
            raise unusable(f"{name!r} names no file of the run", folder / "run.json")
        if sha256(read_bytes(folder / name)).hexdigest() != digest:
            raise unusable("the file is damaged: its content is not what was written", folder / name)


def seal(folder: Path) -> None:
    """Write the digest of ``run.json``, which holds those of all other files."""
    (folder / SEAL).write_text(f"{_run_digest(folder)}  run.json\n", encoding="utf-8")


def check_seal(folder: Path) -> None:
    """Raise InputError where ``run.json`` or its digest is not what was written."""
    if read_bytes(folder / SEAL).decode("utf-8", "replace") != f"{_run_digest(folder)}  run.json\n":
        raise unusable(f"the file is not what was written: its digest is not in {SEAL}", folder / "run.json")


def _run_digest(folder: Path) -> str:
    return sha256(read_bytes(folder / "run.json")).hexdigest()


def write_json(content: Any, path: Path) -> None:
    """JSON, indented, with null for what is not a number."""
    path.write_text(json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the run; raises InputError that names it when it is damaged."""
    try:
        content = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise unusable(f"the file is damaged: {error}", path) from error
    if not isinstance(content, dict):
        raise unusable("the file is damaged: it holds no object", path)
    return content


def summary(content: dict[str, Any], path: Path) -> Summary:
    """What ``content`` of ``path``, a ``run.json``, says; raises InputError where it is another kind of thing."""
    try:
        return msgspec.convert(content, Summary)
    except ValueError as error:
        raise unusable(f"the file is damaged: {error}", path) from error


def write_yaml(content: Any, path: Path) -> None:
    """YAML in block style, keys in the order given."""
    from ruamel.yaml import YAML

    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(plain(content), file)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file of the run; raises InputError that names it when it is damaged."""
    try:
        content = parse_yaml(read_bytes(path).decode(), str(path)).data
    except UnicodeDecodeError as error:
        raise unusable(f"the file is damaged: {error}", path) from error
    if not isinstance(content, dict):
        raise unusable("the file is damaged: it holds no mapping", path)
    return content


def plain(value: Any) -> Any:
    """``value`` in the types that JSON and YAML share: tuples and arrays as lists, numpy numbers as Python's."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
