"""File formats: turns a JSON, JSONL, CSV or Parquet file into rows, one at a time, and says which of them are broken.

A reader never raises for what the file holds. A row that cannot be read becomes a `Fault` and reading goes on; a file
that cannot be read on becomes one last `Fault` of kind `UNREADABLE`.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from job.errors import DataError, Problem

UNREADABLE = "unreadable"

_MAX_CSV_FIELD = 1 << 24
_PARQUET_ROWS = 1024
_SHOWN_FILES = 5


@dataclass(frozen=True)
class Row:
    """One row: `where` is `file:line` (`file:row N` in tables, `file:[index]` in JSON lists).

    Bytes that are no UTF-8 lie in `fields` as lone surrogates (PEP 383), so that the check can name the field.
    """

    where: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class RowError:
    """Something wrong with a row. `kind` is the word it is counted under when bad rows are skipped."""

    kind: str
    where: str
    what: str


Rows = Iterator[Row | RowError]


def find_file(source: str) -> Path:
    """The data file at a path: the path itself, or the only data file directly inside a directory.

    Raises:
        DataError: Nothing is there, or the directory holds none or several, or the format is not known.
    """
    try:
        return _find_file(Path(source), source)
    except OSError as error:
        raise DataError([Problem(source, f"cannot be read: {error.strerror}")]) from error


def _find_file(path: Path, source: str) -> Path:
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if _reader(file) and file.is_file() and file.name[0] != "."]
        if len(files) != 1:
            names = ", ".join(file.name for file in files[:_SHOWN_FILES]) + ", ..." * (len(files) > _SHOWN_FILES)
            found = f"{len(files)} data files, name one: {names}" if files else f"no data file ({', '.join(SUFFIXES)})"
            raise DataError([Problem(source, f"is a directory that holds {found}")])
        return files[0]
    if not path.exists():
        raise DataError([Problem(source, "no such file or directory")])
    if _reader(path) is None:
        raise DataError([Problem(source, f"is not of a known format: the name ends in none of {', '.join(SUFFIXES)}")])
    return path


def has_known_suffix(source: str) -> bool:
    """Whether the name alone says that it is a data file."""
    return _reader(Path(source)) is not None


def read_rows(path: Path, name: str) -> Rows:
    """Yields the rows of a data file in file order, reading no further than it is asked to.

    Only a JSON list has to be read whole; the other formats are streamed.

    Args:
        path: A file that `find_file` found.
        name: What to call the file in messages.
    """
    reader = _reader(path)
    if reader is None:
        raise ValueError(f"not a data file: {path}")
    place = name
    try:
        for row in reader(path, name):
            place = row.where
            yield row
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        after = "" if place == name else f" after {place}"
        yield RowError(UNREADABLE, name, f"cannot be read{after}: {reason}")


def _reader(path: Path) -> Callable[[Path, str], Rows] | None:
    return next((reader for suffix, reader in _READERS.items() if path.name.lower().endswith(suffix)), None)


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _read_jsonl(path: Path, name: str) -> Rows:
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            # Only here: a byte order mark is legal at the start of a file and nowhere else.
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if content.strip():
                yield _parse_line(content, f"{name}:{number}")


def _parse_line(line: bytes, where: str) -> Row | RowError:
    text = line.decode("utf-8", "surrogateescape")
    try:
        return _as_row(json.loads(text), where)
    except (ValueError, RecursionError) as error:
        if not is_valid_text(text):
            return RowError("broken_utf8", where, "is neither UTF-8 nor JSON")
        return RowError("invalid_json", where, f"is not valid JSON: {_reason(error)}")


def _read_json(path: Path, name: str) -> Rows:
    with _open(path) as file:
        text = file.read().removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"{name}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else name
        hint = " (if the file holds one object a line, name it .jsonl)" if text.lstrip()[:1] == "{" else ""
        yield RowError(UNREADABLE, where, f"is not valid JSON: {_reason(error)}{hint}")
        return
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        yield RowError(UNREADABLE, name, 'must be a list of objects, or {"data": [...]}')
        return
    for index, row in enumerate(rows):
        yield _as_row(row, f"{name}:[{index}]")


def _read_csv(path: Path, name: str) -> Rows:
    # The limit is the module's, not the reader's. The default (128 KiB) is less than one long document; no limit at
    # all would let one quote that is never closed swallow the whole file.
    csv.field_size_limit(_MAX_CSV_FIELD)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        table = csv.reader(file, strict=True)
        try:
            header = next(table, [])
            if len(set(header)) != len(header):
                yield RowError(UNREADABLE, f"{name}:1", "names a column twice in its header")
                return
            for number, values in enumerate((row for row in table if row), 1):
                where = f"{name}:row {number}"
                if len(values) == len(header):
                    yield Row(where, dict(zip(header, values, strict=True)))
                else:
                    yield RowError("invalid_csv", where, f"has {len(values)} fields, the header {len(header)}")
        except csv.Error as error:
            yield RowError(UNREADABLE, f"{name}:{table.line_num}", f"is not valid CSV: {error}")


def _read_parquet(path: Path, name: str) -> Rows:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(_PARQUET_ROWS):
                for index in range(batch.num_rows):
                    number += 1
                    yield _parquet_row(batch, index, f"{name}:row {number}")
    except (pa.ArrowException, ValueError, OverflowError) as error:
        yield RowError(UNREADABLE, name, f"is not valid Parquet: {error}")


def _parquet_row(batch: Any, index: int, where: str) -> Row | RowError:
    fields: dict[str, Any] = {}
    for column, values in zip(batch.schema.names, batch.columns, strict=True):
        try:
            fields[column] = values[index].as_py()
        except UnicodeDecodeError as error:
            return RowError("broken_utf8", f"{where} {column}", f"is not UTF-8: {error.reason} at byte {error.start}")
    return Row(where, fields)


def _as_row(value: Any, where: str) -> Row | RowError:
    if isinstance(value, dict):
        return Row(where, value)
    return RowError("not_an_object", where, f"must be an object with named fields, is {type_name(value)}")


def is_valid_text(value: str) -> bool:
    """Whether the text can be written as UTF-8: no broken byte, no half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def type_name(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return "an object" if isinstance(value, dict) else names.get(type(value), type(value).__name__)


def _reason(error: Exception) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


_READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".json.gz": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(_READERS)
