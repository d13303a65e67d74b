"""File formats: reads a JSON, JSONL, CSV or Parquet file row by row, and reports rows that cannot be read.

A reader never raises because of the file's content. A row that cannot be read becomes a `RowError`, and reading goes
on; where the file cannot be read any further, the last `RowError` is of kind `UNREADABLE`. The constants below bound
the memory that a file can take, however much it decompresses to.

To add a format: write a reader `(path, name) -> rows` and enter its suffixes in `_READERS` at the end.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

UNREADABLE = "unreadable"
HALF_PAIR = "has half of a surrogate pair, such as the escape \\ud800 alone; correct the text"
NOT_UTF8 = "is not valid UTF-8 text"
TO_UTF8 = "convert a text file to UTF-8: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW, if it is of Windows or Latin-1"
"""The fix for text that is not UTF-8. In Latin-1, the letters have the same bytes as in Windows-1252."""

MAX_ROW_BYTES = 16 << 20
"""Of one line of JSONL or CSV, and of one CSV field."""
MAX_JSON_BYTES = 1 << 30
"""Of a JSON file that is one list, which has to be held in memory whole."""
MAX_EXPANSION = 400
"""How many times its size a compressed file may expand to. Text compresses to a third or a tenth, logs to a 50th."""
FREE_BYTES = 64 << 20
"""What any compressed file may expand to, however small it is."""
_MAX_BATCH_BYTES = 1 << 30
_PARQUET_ROWS = (16, 1024)
_SHOWN_FILES = 5
_HEAD_BYTES = 64
_ARROW_FILE = b"ARROW1"
_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
_BINARY = (
    b"PK\3\4",
    b"PAR1",
    b"PARE",
    _ARROW_FILE,
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ",
    b"\x28\xb5\x2f\xfd",
    b"SQLite format",
    b"%PDF",
)
"""How files begin that are no text: zip, Parquet, Arrow, gzip, bzip2, xz, zstd, SQLite, PDF."""


@dataclass(frozen=True)
class Row:
    """One row: `where` is `file:line` (`file:row N` in tables, `file:[index]` in JSON lists).

    Bytes that are not UTF-8 are in `fields` as lone surrogates (PEP 383), so that the check can name the field.
    """

    where: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class RowError:
    """Something wrong with a row. `kind` is its category in the counts of skipped rows."""

    kind: str
    where: str
    what: str


class Line(NamedTuple):
    """A line of JSONL that is not decoded yet: processes that encode rows decode them, too."""

    where: str
    data: bytes


Rows = Iterator[Row | RowError]
Lines = Iterator[Row | RowError | Line]


def read_rows(path: Path, name: str) -> Rows:
    """Yields the rows of a data file in file order, reading no further than it is asked to.

    Only a JSON list has to be read whole; the other formats are streamed.

    Args:
        path: A file that `files.find_file` found.
        name: What to call the file in messages.
    """
    decode = LineDecoder()
    return (decode(row) for row in read_lines(path, name))


def read_lines(path: Path, name: str) -> Lines:
    """`read_rows` with undecoded lines of JSONL, for a `LineDecoder`."""
    reader = reader_of(path)
    if reader is None:
        raise ValueError(f"not a data file: {path}")
    last_where = name
    try:
        if (what := _not_its_format(path)) is not None:
            yield RowError(UNREADABLE, name, what)
            return
        for row in reader(path, name):
            last_where = row.where
            yield row
    except (OSError, EOFError, zlib.error, _TooLargeError) as error:
        reason = _NOT_WHOLE.get(type(error)) or getattr(error, "strerror", None) or error
        if reason is error and isinstance(error, OSError):  # pyarrow's, about the content of a file
            reason = f"{error}; write, copy or download it again"
        after = "" if last_where == name else f" after {last_where}"
        yield RowError(UNREADABLE, name, f"cannot be read{after}: {reason}")


_NOT_WHOLE: dict[type[BaseException], str] = {
    EOFError: "its compressed data ends too early: the file was cut off; copy or download it again",
    zlib.error: "its compressed data is damaged; copy or download it again",
    gzip.BadGzipFile: "it is not gzip, or damaged; copy it again, or rename it if it is not compressed",
}
"""What the errors of a compressed file mean."""


class _TooLargeError(Exception):
    """A file decompresses to more than the limit."""


def reader_of(path: Path) -> Callable[[Path, str], Lines] | None:
    """What reads a file, by its name; None if nothing does."""
    return next((reader for suffix, reader in _READERS.items() if path.name.lower().endswith(suffix)), None)


def _not_its_format(path: Path) -> str | None:
    """What a file really is if its first bytes contradict its name; None if they do not."""
    with _open(path) as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"
    if reader_of(path) in {_read_parquet, _read_arrow}:
        return None
    if encoding := other_encoding(head):
        return what_to_convert(encoding, path)
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, such as a login or error page, instead of the file; download it again"
    if head.startswith(_BINARY):
        return "is an archive, a table or compressed, which its name does not say; give it the suffix of its format"
    return None


def what_to_convert(encoding: str, path: Path) -> str:
    """What is wrong with a file in this encoding, with the fix."""
    return f"is {encoding} text; convert it: iconv -f {encoding} -t UTF-8 {path.name} > NEW"


def other_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by a byte order mark or by zeros next to ASCII characters; None for neither."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) or b"\0\0\0" in {head[1:4], head[:3]}:
        return "UTF-32"
    even, odd = head[0:4:2], head[1:4:2]
    wide = any(
        zeros == b"\0\0" and text.isascii() and text.decode().isprintable()
        for zeros, text in ((even, odd), (odd, even))
    )
    return "UTF-16" if wide or head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else None


class _Decompressed:
    """Reads a file that may be compressed; raises `_TooLargeError` if it expands by more than `MAX_EXPANSION`."""

    def __init__(self, path: Path) -> None:
        self._file = _open(path)
        self._most = max(FREE_BYTES, MAX_EXPANSION * path.stat().st_size)
        self._read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, most: int) -> bytes:
        """Up to `most` bytes."""
        return self._counted(self._file.read(most))

    def readline(self, most: int) -> bytes:
        """The next line with its end, or its first `most` bytes."""
        return self._counted(self._file.readline(most))

    def _counted(self, data: bytes) -> bytes:
        self._read += len(data)
        if self._read > self._most:
            raise _TooLargeError(f"it expands to more than {MAX_EXPANSION} times its size; give it uncompressed")
        return data


class _Raw(io.RawIOBase):
    """What `_Decompressed` reads, as a raw stream that text can be read from."""

    def __init__(self, source: _Decompressed) -> None:
        self._source = source

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads up to the length of the buffer into it."""
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _open(path: Path) -> BinaryIO | gzip.GzipFile | io.BufferedReader:
    name = path.name.lower()
    if name.endswith(".zst"):
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return gzip.open(path) if name.endswith(".gz") else path.open("rb")


def _read_jsonl(path: Path, name: str) -> Lines:
    with _Decompressed(path) as lines:
        number = 0
        while line := lines.readline(MAX_ROW_BYTES + 1):
            number += 1
            where = f"{name}:{number}"
            if len(line) > MAX_ROW_BYTES:
                while line and not line.endswith(b"\n"):
                    line = lines.readline(MAX_ROW_BYTES)
                yield RowError(
                    "too_long", where, f"is a line of more than {MAX_ROW_BYTES:,} bytes, the largest that is allowed"
                )
                continue
            # Only here: a byte order mark is legal at the start of a file and nowhere else.
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if content.strip():
                yield Line(where, content)


class LineDecoder:
    """Makes rows of lines; returns rows unchanged."""

    def __init__(self) -> None:
        self._decoder = _Decoder()

    def __call__(self, row: Row | RowError | Line) -> Row | RowError:
        """The row, or why the line is none."""
        if not isinstance(row, Line):
            return row
        text = row.data.decode("utf-8", "surrogateescape")
        try:
            return _as_row(self._decoder.decode(text), row.where, self._decoder)
        except (ValueError, RecursionError) as error:
            if not is_valid_text(text):
                return RowError("broken_utf8", row.where, "is neither UTF-8 nor JSON")
            return RowError(
                "invalid_json", row.where, f"is not valid JSON: {_reason(error, line=True)}{_hint_of_line(text)}"
            )


def _hint_of_line(line: str) -> str:
    """What is the matter with a line that is not valid JSON, where it can be told; else nothing."""
    if line.strip() in {"{", "[", "[{"}:
        return "; write each row as one object on one line, or name a list of objects .json"
    return "; remove the comma after the object" if line.rstrip().endswith("},") else ""


def _read_json(path: Path, name: str) -> Rows:
    decoder = _Decoder()
    with _Decompressed(path) as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        most = (
            f"is more than {MAX_JSON_BYTES >> 20} MiB of JSON in one piece; write one object on each "
            "line, and name it .jsonl"
        )
        yield RowError(UNREADABLE, name, most)
        return
    text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    del content
    if not text.strip():
        yield RowError(UNREADABLE, name, "is empty; it must be a list of objects")
        return
    try:
        value = decoder.decode(text)
    except (ValueError, RecursionError) as error:
        where = f"{name}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else name
        hint = " (if the file has one object on each line, name it .jsonl)" if text.lstrip()[:1] == "{" else ""
        yield RowError(UNREADABLE, where, f"is not valid JSON: {_reason(error)}{hint}")
        return
    if isinstance(value, _Repeated):
        yield RowError(UNREADABLE, name, f"has the key {value.key!r} twice")
        return
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        yield RowError(UNREADABLE, name, f'must be a list of objects, or {{"data": [...]}}{_hint(value)}')
        return
    for index, row in enumerate(rows):
        yield _as_row(row, f"{name}:[{index}]", decoder)


def _hint(value: object) -> str:
    """What to do with JSON that holds no list of rows."""
    items = value if isinstance(value, dict) else {}
    lists = [key for key, item in items.items() if isinstance(item, list)]
    sizes = {len(item) for item in items.values() if isinstance(item, list | dict)}
    nested = any(isinstance(row, dict) for key in lists for row in items[key][:1])
    # pandas writes {"column": {"0": value, ...}, ...} by default, and a dict of its columns is {"column": [...], ...}
    dicts = len(items) > 1 and all(isinstance(item, dict) for item in items.values())
    if len(sizes) == 1 and not nested and (dicts or len(lists) == len(items)):
        return "; it contains columns: write one object for each row (pandas: to_json with orient='records')"
    return (
        f"; it has lists under {', '.join(map(ascii, lists[:_SHOWN_FILES]))}: write one of them to a separate file"
        if lists
        else ""
    )


class _Repeated(dict[str, Any]):
    """A JSON object with a duplicate key: which of the values is meant is ambiguous."""

    key = ""


class _Decoder:
    """Decodes JSON; marks objects with a duplicate key. NaN, which pandas writes for a missing value, is read as null.

    `seen` says whether any object was marked; if none was, the values need not be searched.
    """

    def __init__(self) -> None:
        self.seen = False
        self.decode = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant).decode

    def _object(self, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) == len(pairs):
            return fields
        keys = [key for key, _ in pairs]
        twice = _Repeated(fields)
        twice.key = next(key for key in fields if keys.count(key) > 1)
        self.seen = True
        return twice

    @staticmethod
    def _constant(name: str) -> float | None:
        return None if name == "NaN" else float(name)


def _repeated_key(value: Any, path: str = "") -> str | None:
    """The path of a key that is given twice somewhere in a value."""
    if isinstance(value, _Repeated):
        return f"{path}{value.key}"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next((repeated for key, item in items if (repeated := _repeated_key(item, f"{path}{key}."))), None)


def _read_csv(path: Path, name: str) -> Rows:
    # The limit is the module's, not the reader's. The default (128 KiB) is less than one long document; no limit at
    # all would let one quote that is never closed swallow the whole file.
    csv.field_size_limit(MAX_ROW_BYTES)
    with (
        _Decompressed(path) as content,
        io.TextIOWrapper(
            io.BufferedReader(_Raw(content)), encoding="utf-8-sig", errors="surrogateescape", newline=""
        ) as file,
    ):
        first = file.readline(MAX_ROW_BYTES)
        table = csv.reader(_csv_lines(first, file), strict=True, delimiter=_delimiter(path, first))
        try:
            header = next(table, [])
            if len(set(header)) != len(header):
                yield RowError(UNREADABLE, f"{name}:1", "names a column twice in its header")
                return
            for number, values in enumerate((row for row in table if row), 1):
                where = f"{name}:row {number}"
                if values == header:
                    what = "is the header again, as in concatenated files; remove the line"
                    yield RowError("invalid_csv", where, what)
                elif len(values) == len(header):
                    yield Row(where, dict(zip(header, values, strict=True)))
                else:
                    yield RowError("invalid_csv", where, f"has {len(values)} fields, the header {len(header)}")
        except csv.Error as error:
            yield RowError(UNREADABLE, f"{name}:{table.line_num}", f"is not valid CSV: {error}")


def _csv_lines(first: str, file: Any) -> Iterator[str]:
    """The lines of a CSV file, each of a bounded length."""
    line = first
    while line:
        if len(line) >= MAX_ROW_BYTES and not line.endswith(("\n", "\r")):
            raise csv.Error(f"a line has more than {MAX_ROW_BYTES:,} characters, the largest number that is allowed")
        yield line
        line = file.readline(MAX_ROW_BYTES)


def _delimiter(path: Path, header: str) -> str:
    """What separates the columns: a tab in .tsv; in .csv a semicolon, as Excel writes in half the world, or a comma.

    A semicolon if the header has one and no comma: a single column with a semicolon in its name is not expected.
    """
    if ".tsv" in path.name.lower():
        return "\t"
    if "," in header:
        return ","
    return next((mark for mark in (";", "\t") if mark in header), ",")


def _read_parquet(path: Path, name: str) -> Rows:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _check_names(file.schema_arrow.names)
            number, expanded = 0, 0
            most = max(FREE_BYTES, MAX_EXPANSION * path.stat().st_size)
            largest = _check_row_groups(file.metadata, most)
            fewest, usual = _PARQUET_ROWS
            # No value is larger than its row group, so this bounds a batch, even if a dictionary repeats values.
            rows = min(usual, max(fewest, _MAX_BATCH_BYTES // max(1, largest)))
            for batch in file.iter_batches(rows):
                expanded += batch.nbytes
                if expanded > most:
                    raise _TooLargeError(
                        f"it expands to more than {MAX_EXPANSION} times its size; write it as JSON lines"
                    )
                for index in range(batch.num_rows):
                    number += 1
                    yield _parquet_row(batch, index, f"{name}:row {number}")
    except (pa.ArrowException, ValueError, OverflowError) as error:
        yield RowError(UNREADABLE, name, f"is not valid Parquet: {error}; write, copy or download it again")


def _read_arrow(path: Path, name: str) -> Rows:
    """Arrow's stream format, as `Dataset.save_to_disk` writes it, or its file format."""
    import pyarrow as pa

    most = max(FREE_BYTES, MAX_EXPANSION * path.stat().st_size)
    try:
        with pa.memory_map(str(path)) as file:
            is_file_format = file.read(len(_ARROW_FILE)) == _ARROW_FILE
            if not is_file_format:
                _check_end(file)
            file.seek(0)
            number, expanded = 0, 0
            for batch in _arrow_batches(file, is_file_format=is_file_format):
                batch.validate(full=True)  # offsets that point outside of their buffer would be followed
                expanded += batch.nbytes
                if expanded > most:
                    raise _TooLargeError(f"it expands to more than {MAX_EXPANSION} times its size")
                for index in range(batch.num_rows):
                    number += 1
                    yield _parquet_row(batch, index, f"{name}:row {number}")
            if not is_file_format and file.tell() < file.size():
                what = f"does not end at row {number}, where its table ends; give each table its own file"
                yield RowError(UNREADABLE, name, what)
    except (pa.ArrowException, ValueError, OverflowError) as error:
        yield RowError(UNREADABLE, name, f"is not valid Arrow: {error}")


def _check_end(file: Any) -> None:
    """Refuses a stream that breaks off between two batches: for a reader that is an end like any other.

    Raises:
        ValueError: It lacks the mark that a writer puts at the end.
    """
    size = file.size()
    if size:
        file.seek(max(0, size - len(_ARROW_END)))
        if file.read(len(_ARROW_END)) != _ARROW_END:
            raise ValueError("its end is missing: the file was cut off, or its writer was not closed")


def _check_names(columns: Sequence[str]) -> None:
    """Refuses a table with a column twice.

    Raises:
        ValueError: It has one.
    """
    if (twice := next((column for column in columns if columns.count(column) > 1), None)) is not None:
        raise ValueError(f"it has the column {twice!r} twice, so it is ambiguous")


def _arrow_batches(file: Any, *, is_file_format: bool) -> Iterator[Any]:
    import pyarrow as pa

    if not is_file_format:
        stream = pa.ipc.open_stream(file)
        _check_names(stream.schema.names)
        yield from stream
        return
    reader = pa.ipc.open_file(file)
    _check_names(reader.schema.names)
    yield from map(reader.get_batch, range(reader.num_record_batches))


def _check_row_groups(metadata: Any, most: int) -> int:
    """The bytes of the largest row group, decompressed.

    Those of a column are not asked for: `RowGroupMetaData.column` of pyarrow 26 ends the process if it is damaged.

    Raises:
        _TooLargeError: A row group expands by more than `MAX_EXPANSION`.
    """
    largest = max((metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)), default=0)
    if largest > most:
        raise _TooLargeError(f"it expands to more than {MAX_EXPANSION} times its size; write it as JSON lines")
    return int(largest)


def _parquet_row(batch: Any, index: int, where: str) -> Row | RowError:
    fields: dict[str, Any] = {}
    for column, values in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value = values[index].as_py()
        except UnicodeDecodeError as error:
            what = f"is not UTF-8: {error.reason} at byte {error.start}; write the table again from UTF-8 text"
            return RowError("broken_utf8", f"{where} {column}", what)
        except (ArithmeticError, LookupError, ValueError) as error:  # a time zone or a date that Python does not know
            return RowError("unreadable_value", f"{where} {column}", f"cannot be converted from Arrow: {error}")
        # pandas writes missing values as NaN in a column that has no other values.
        fields[column] = None if isinstance(value, float) and math.isnan(value) else without_nulls(value)
    return Row(where, fields)


def without_nulls(value: Any) -> Any:
    """The value without the keys of its objects, at any depth, that are null.

    All objects of a column of a table have the same keys, so that a key which only some of them had is null in the
    others: the arguments of each tool would appear, as null, in the calls of all the others. TRL removes them as well.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _as_row(value: Any, where: str, decoder: _Decoder) -> Row | RowError:
    if not isinstance(value, dict):
        hint = "; a file that is one list is named .json" if isinstance(value, list) else ""
        return RowError("not_an_object", where, f"must be an object with named fields, is {type_name(value)}{hint}")
    if decoder.seen and (key := _repeated_key(value)) is not None:
        return RowError("repeated_key", f"{where} {key}", "is given twice, so it is ambiguous; remove one")
    return Row(where, value)


def is_valid_text(value: str) -> bool:
    """Whether the text can be written as UTF-8: no broken byte, no half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def what_is_invalid(value: str) -> str:
    """What is wrong with a text that is not valid. Python has an invalid byte as one of U+DC80 to U+DCFF (PEP 383)."""
    halves = {character for character in value if "\ud800" <= character <= "\udfff"}
    return NOT_UTF8 if any("\udc80" <= half <= "\udcff" for half in halves) else HALF_PAIR


def type_name(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return "an object" if isinstance(value, dict) else names.get(type(value), type(value).__name__)


def _reason(error: Exception, *, line: bool = False) -> str:
    """What is wrong with a text, and at which position; of a single line, at which character alone."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    if line and isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return str(error)


_READERS: dict[str, Callable[[Path, str], Lines]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".ndjson.gz": _read_jsonl,
    ".ndjson.zst": _read_jsonl,
    ".json": _read_json,
    ".json.gz": _read_json,
    ".json.zst": _read_json,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".csv.zst": _read_csv,
    ".tsv": _read_csv,
    ".tsv.gz": _read_csv,
    ".tsv.zst": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
SUFFIXES = tuple(_READERS)
