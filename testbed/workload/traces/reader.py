"""Reading traces: the format is told from the content, rows stream, every row is checked and named when it is wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from testbed.scenario.errors import InputError
from testbed.scenario.paths import data_root, trace_folder
from testbed.workload.traces.known import KNOWN_TRACES
from testbed.workload.traces.rows import FORMATS, NO_TIME, BadCell, Column, Format, TraceRow


class _Line(NamedTuple):
    """One row before it is understood."""

    line: int
    cells: dict[str, Any]
    text: str
    """The line as it stands in the file, to find columns in; "" where rows have no text (Parquet)."""


class TraceFile:
    """A trace whose format is known. Iterating reads it from the start; nothing is kept."""

    def __init__(self, path: Path, form: Format) -> None:
        self.path = path
        self.format = form

    @property
    def has_arrivals(self) -> bool:
        """Whether rows carry times; otherwise only lengths."""
        return any(column.field == "arrival_ns" for column in self.format.required.values())

    @property
    def has_sessions(self) -> bool:
        """Whether rows may belong to sessions."""
        return any(
            column.field == "session" for column in (*self.format.required.values(), *self.format.optional.values())
        )

    def __iter__(self) -> Iterator[TraceRow]:
        """The rows in order, each checked by itself and against the order of time and of its session."""
        columns = list({**self.format.required, **self.format.optional}.items())
        origin_ns, last_ns = 0, NO_TIME
        last_turn: dict[str, int] = {}
        for line in _lines(self.path):
            row = TraceRow(line.line, **self._fields(line, columns))
            if self.format.own_clock:
                if last_ns == NO_TIME:
                    origin_ns = row.arrival_ns
                row = row._replace(arrival_ns=row.arrival_ns - origin_ns)
            if self.has_arrivals and row.arrival_ns < max(last_ns, 0):
                raise self._error(line, "arrival_ns", "earlier than the row before", "sort the file by time")
            last_ns = row.arrival_ns
            if row.session:
                row = row._replace(turn=self._turn(line, row, last_turn))
            if row.prefix_tokens > row.prompt_tokens:
                raise self._error(line, "prefix_tokens", "a prefix longer than its prompt", "lower prefix_tokens")
            if row.hash_ids or self.format.last_block_partial:
                self._check_blocks(line, row)
            yield row

    def _fields(self, line: _Line, columns: list[tuple[str, Column]]) -> dict[str, Any]:
        fields: dict[str, Any] = {} if self.has_arrivals else {"arrival_ns": NO_TIME}
        for name, column in columns:
            cell = line.cells.get(name)
            if cell is None or cell == "":
                if name in self.format.required:
                    problem = f"column {name} is missing" if name not in line.cells else f"{name} is empty"
                    raise self._error(line, column.field, problem, "every row needs it: was the file cut off?")
                continue
            try:
                fields[column.field] = column.read(cell)
            except BadCell as error:
                raise self._error(line, column.field, f"{name}: {error.message}", error.remedy) from error
        return fields

    def _turn(self, line: _Line, row: TraceRow, last_turn: dict[str, int]) -> int:
        before = last_turn.get(row.session, -1)
        turn = before + 1 if row.turn < 0 else row.turn
        if turn <= before:
            raise self._error(
                line,
                "turn",
                f"turn {turn} of session {row.session} comes after its turn {before}",
                "each turn occurs once, in order",
            )
        last_turn[row.session] = turn
        return turn

    def _check_blocks(self, line: _Line, row: TraceRow) -> None:
        size = self.format.block_tokens
        limit = -(-row.prompt_tokens // size) if self.format.last_block_partial else row.prompt_tokens // size
        if len(row.hash_ids) > limit or (self.format.last_block_partial and len(row.hash_ids) < limit):
            raise self._error(
                line,
                "hash_ids",
                f"{len(row.hash_ids)} blocks for {row.prompt_tokens} tokens",
                f"a block is {size} tokens, so {limit} are expected",
            )

    def error_at(self, row: TraceRow, message: str, remedy: str) -> InputError:
        """An error about a whole row."""
        return InputError(message, where=f"{self.path}:{row.line}:1", remedy=remedy)

    def _error(self, line: _Line, field: str, message: str, remedy: str) -> InputError:
        columns = {**self.format.required, **self.format.optional}
        names = [name for name, column in columns.items() if column.field == field]
        return InputError(message, where=f"{self.path}:{line.line}:{_position(line, names)}", remedy=remedy)


def find_trace(name: str, base_dir: Path) -> Path:
    """The file that ``name`` means: a path from ``base_dir``, else a file in the folder of fetched traces or of data.

    Raises InputError with similar names when there is none.
    """
    root = data_root()
    folders = [base_dir, trace_folder(), *([root, root / "traces"] if root else [])]
    for folder in folders:
        path = folder / Path(name).expanduser()
        if path.is_file():
            return path
    known = sorted({entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir()})
    similar = get_close_matches(name, known, n=3)
    remedy = f"did you mean {', '.join(similar)}?" if similar else "`testbed presets traces` lists public traces"
    if name in KNOWN_TRACES and KNOWN_TRACES[name].url:
        remedy = f"`testbed trace fetch {name}` fetches it into {trace_folder()}"
    raise InputError(f"no such trace: {name}", where=name, remedy=remedy)


def read_trace(path: Path, form: str = "auto") -> TraceFile:
    """Open a trace; ``form`` names its format, ``auto`` tells it from the columns.

    Raises InputError when the file cannot be read, is empty, or has columns that no format has.
    """
    first = next(_lines(path), None)
    if first is None:
        raise InputError("the file has no rows", where=f"{path}:1:1", remedy="a trace has at least one request")
    named = [candidate for candidate in FORMATS if form in ("auto", candidate.name)]
    for candidate in named:
        if all(column in first.cells for column in (*candidate.required, *candidate.markers)):
            return TraceFile(path, candidate)
    choices = "; ".join(f"{each.name}: {', '.join((*each.required, *each.markers))}" for each in named)
    what = "no known format" if form == "auto" else f"not the format {form}"
    raise InputError(
        f"{what}: the columns are {', '.join(first.cells) or 'none'}",
        where=f"{path}:1:1",
        remedy=f"columns expected ({choices})",
    )


def _lines(path: Path) -> Iterator[_Line]:
    """Rows of a CSV, JSONL or Parquet file; which of them it is, its first byte says."""
    try:
        with path.open("rb") as file:
            head = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path), remedy="check the path") from error
    if head.startswith(b"PAR1"):
        yield from _parquet_lines(path)
        return
    try:
        yield from _json_lines(path) if head.startswith(b"{") else _csv_lines(path)
    except UnicodeDecodeError as error:
        raise InputError("not a text file", where=str(path), remedy="CSV, JSON lines (UTF-8) or Parquet") from error


def _csv_lines(path: Path) -> Iterator[_Line]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [cell.strip() for cell in next(reader, [])]
            for cells in reader:
                if not cells or cells == [""]:
                    continue
                if len(cells) > len(header):
                    raise InputError(
                        f"{len(cells)} cells under {len(header)} columns",
                        where=f"{path}:{reader.line_num}:1",
                        remedy="remove the cells without a column",
                    )
                yield _Line(reader.line_num, dict(zip_longest(header, cells)), ",".join(cells))
        except csv.Error as error:
            where = f"{path}:{reader.line_num}:1"
            raise InputError(f"not valid CSV: {error}", where=where, remedy="was the file cut off?") from error


def _json_lines(path: Path) -> Iterator[_Line]:
    with path.open(encoding="utf-8-sig") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                cells = json.loads(text)
            except (ValueError, RecursionError) as error:
                column = error.colno if isinstance(error, json.JSONDecodeError) else 1
                where = f"{path}:{number}:{column}"
                raise InputError(f"not valid JSON: {error}", where=where, remedy="was the file cut off?") from error
            if not isinstance(cells, dict):
                raise InputError("not a JSON object", where=f"{path}:{number}:1", remedy="one {...} a line")
            yield _Line(number, cells, text)


def _parquet_lines(path: Path) -> Iterator[_Line]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError("Parquet needs pyarrow", where=str(path), remedy="pip install testbed[parquet]") from error
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=4096):
                for cells in batch.to_pylist():
                    number += 1
                    yield _Line(number, cells, "")
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"not valid Parquet: {error}", where=str(path), remedy="was the file cut off?") from error


def _position(line: _Line, names: list[str]) -> int:
    """Column of the text, from 1, where the value of the first of ``names`` that the row has begins."""
    name = next((name for name in names if name in line.cells), None)
    if name is None:
        return 1
    if line.text.lstrip().startswith("{"):
        return max(line.text.find(f'"{name}"') + 1, 1)
    keys = list(line.cells)
    return 1 + sum(len(line.cells[key] or "") + 1 for key in keys[: keys.index(name)])
