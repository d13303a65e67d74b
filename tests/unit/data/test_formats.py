"""Reading JSON, JSONL, CSV, Parquet and Arrow."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.data.files import find_file, find_files
from job.data.formats import SUFFIXES, UNREADABLE, Row, RowError, read_rows
from job.errors import DataError

ROWS = [{"a": "one", "b": "1"}, {"a": 'q"uo,te\nline\u2028', "b": ""}, {"a": "ünï🙂", "b": "3"}]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes rows in the format that the path's suffix names."""
    if path.suffix in {".parquet", ".arrow"}:
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.Table.from_pylist(rows)
        if path.suffix == ".parquet":
            parquet.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
        return path
    if {".csv", ".tsv"} & set(path.suffixes):
        content = io.StringIO(newline="")
        table = csv.DictWriter(content, list(rows[0]), dialect="excel" if ".csv" in path.suffixes else "excel-tab")
        table.writeheader()
        table.writerows(rows)
        text = content.getvalue()
    elif {".jsonl", ".ndjson"} & set(path.suffixes):
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = json.dumps(rows)
    path.write_bytes(packed(text.encode(), path.suffix))
    return path


def packed(data: bytes, suffix: str) -> bytes:
    """Compressed as the suffix says."""
    import pyarrow as pa

    if suffix == ".zst":
        return bytes(pa.Codec("zstd").compress(data, asbytes=True)) if data else b""
    return gzip.compress(data, mtime=0) if suffix == ".gz" else data


def read(path: Path, content: bytes | None = None) -> list[Row | RowError]:
    """All rows and faults of a file, which is called by its own name."""
    if content is not None:
        path.write_bytes(content)
    return list(read_rows(path, path.name))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    """Rows come out as they went in, whatever the format, quotes and line breaks inside fields included."""
    path = write_rows(tmp_path / f"rows{suffix}", ROWS)
    assert find_file(str(path)) == find_file(str(tmp_path)) == find_files(str(path), "train")[0][0] == path
    rows = read(path)
    assert [row.fields for row in rows if isinstance(row, Row)] == ROWS
    assert len(rows) == len(ROWS)


@pytest.mark.parametrize(
    ("suffix", "where"),
    [(".jsonl", "x.jsonl:2"), (".json", "x.json:[1]"), (".csv", "x.csv:row 2"), (".parquet", "x.parquet:row 2")],
)
def test_rows_say_where_they_stand(tmp_path: Path, suffix: str, where: str) -> None:
    """A row is named by its line, by its index in a JSON list, by its number in a table."""
    assert read(write_rows(tmp_path / f"x{suffix}", ROWS))[1].where == where


def test_one_broken_line_does_not_hide_the_others(tmp_path: Path) -> None:
    """Every broken line of a JSONL file is a fault with its line number, and reading goes on behind it."""
    lines = [b'{"a": "x"}', b"{", b"", b"[1]", b"\xff\xfe", b'{"a": ' + b"[" * 100_000, b"9" * 5000, b'{"a": "y"}']
    found = read(tmp_path / "x.jsonl", b"\n".join(lines))
    assert [item.where for item in found] == [f"x.jsonl:{line}" for line in (1, 2, 4, 5, 6, 7, 8)]
    kinds = [item.kind if isinstance(item, RowError) else "good" for item in found]
    assert kinds == ["good", "invalid_json", "not_an_object", "broken_utf8", "invalid_json", "invalid_json", "good"]


def test_the_place_in_a_broken_line_is_told_once(tmp_path: Path) -> None:
    """The line is that of the file; within it only the character is named."""
    (_, found) = read(tmp_path / "x.jsonl", b'{"a": 1}\n{"prompt": \n')
    assert isinstance(found, RowError)
    assert f"{found.where}: {found.what}" == "x.jsonl:2: is not valid JSON: Expecting value at character 13"


@pytest.mark.parametrize(
    ("name", "content", "fix"),
    [
        ("x.jsonl.gz", gzip.compress(b'{"a": "1"}\n', mtime=0)[:-9], "was cut off; copy or download it again"),
        ("x.jsonl.gz", b'{"a": "1"}\n', "is not gzip, or damaged; copy it again, or rename it"),
        ("x.parquet", b"PAR1 cut off", "is not valid Parquet: "),
        ("x.jsonl", b'{\n"a": "1"\n}\n', "; write each row as one object on one line, or name a list of objects .json"),
        ("x.jsonl", b'{"a": "1"},\n', "; remove the comma after the object"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_fix(tmp_path: Path, name: str, content: bytes, fix: str) -> None:
    """What to do about a cut, a wrong suffix, and JSON that is written otherwise than a row on each line."""
    found = read(tmp_path / name, content)[0]
    assert isinstance(found, RowError)
    assert fix in found.what
    assert "; " in found.what


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf \n"])
def test_an_empty_json_file_is_said_to_be_empty(tmp_path: Path, content: bytes) -> None:
    """Instead of where its JSON breaks off."""
    (found,) = read(tmp_path / "x.json", content)
    assert isinstance(found, RowError)
    assert f"{found.where}: {found.what}" == "x.json: is empty; it must be a list of objects"


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    """A byte order mark at the start of a file is dropped."""
    for name, content in [("x.jsonl", b'{"a": "1"}'), ("x.json", b'[{"a": "1"}]'), ("x.csv", b"a\n1\n")]:
        found = read(tmp_path / name, b"\xef\xbb\xbf" + content)
        assert [item.fields for item in found if isinstance(item, Row)] == [{"a": "1"}]


def test_reading_is_lazy(tmp_path: Path) -> None:
    """A file that breaks behind the rows that are asked for gives them."""
    content = gzip.compress(b'{"a": "1"}\n' * 100_000, mtime=0)
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(content[: len(content) // 2])
    rows = read_rows(path, "x")
    assert next(rows) == Row("x:1", {"a": "1"})
    *good, last = rows
    assert len(good) > 1000
    assert isinstance(last, RowError)
    assert (last.kind, last.where) == (UNREADABLE, "x")
    assert f"after x:{len(good) + 1}" in last.what


def test_json_may_hold_its_rows_under_data(tmp_path: Path) -> None:
    """{"data": [...]} reads like the list itself, and any other value is refused."""
    assert read(tmp_path / "x.json", b'{"data": [{"a": "1"}]}') == [Row("x.json:[0]", {"a": "1"})]
    for content in (b'{"rows": []}', b"3", b'{"a": 1}\n{"a": 2}\n', b'[{"a": "1"}'):
        (fault,) = read(tmp_path / "x.json", content)
        assert isinstance(fault, RowError)
        assert fault.kind == UNREADABLE


def test_csv_rows_of_another_width_than_the_header_are_faults(tmp_path: Path) -> None:
    """A CSV row with a field too many or too few is reported, and reading goes on."""
    found = read(tmp_path / "x.csv", b"a,b\n1,2\n1\n1,2,3\n3,4\n")
    assert [(item.where, isinstance(item, Row)) for item in found] == [
        ("x.csv:row 1", True),
        ("x.csv:row 2", False),
        ("x.csv:row 3", False),
        ("x.csv:row 4", True),
    ]


@pytest.mark.parametrize("content", [b'a,b\n1,"2\n', b"a,a\n1,2\n"])
def test_broken_csv_is_unreadable(tmp_path: Path, content: bytes) -> None:
    """A quote that is never closed, or a column named twice, ends the reading of a CSV file with a fault."""
    found = read(tmp_path / "x.csv", content)
    assert [item.kind for item in found if isinstance(item, RowError)] == [UNREADABLE]


def test_csv_fields_may_be_long(tmp_path: Path) -> None:
    """A CSV field longer than the csv module's own limit is read."""
    (row,) = read(tmp_path / "x.csv", b"a\n" + b"x" * 200_000 + b"\n")
    assert isinstance(row, Row)
    assert len(row.fields["a"]) == 200_000


def test_broken_utf8_in_parquet_names_row_and_column(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 in a Parquet text column are one row's fault."""
    import pyarrow as pa
    from pyarrow import parquet

    broken = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc"))
    parquet.write_table(pa.table({"text": broken}), tmp_path / "x.parquet")
    first, second, third = read(tmp_path / "x.parquet")
    assert (first, third) == (Row("x.parquet:row 1", {"text": "a"}), Row("x.parquet:row 3", {"text": "c"}))
    assert isinstance(second, RowError)
    assert (second.kind, second.where) == ("broken_utf8", "x.parquet:row 2 text")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(suffix=st.sampled_from(SUFFIXES), content=st.binary(max_size=300))
def test_arbitrary_bytes_are_never_a_traceback(tmp_path: Path, suffix: str, content: bytes) -> None:
    """Whatever a file holds, reading it gives rows and faults, and raises nothing."""
    for found in read(tmp_path / f"x{suffix}", content):
        assert isinstance(found, Row | RowError)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([".parquet", ".jsonl.gz", ".csv"]), st.floats(0, 1, exclude_max=True), st.binary(max_size=8))
def test_damaged_files_are_never_a_traceback(tmp_path: Path, suffix: str, place: float, damage: bytes) -> None:
    """A real file with some bytes overwritten gives rows and faults, and raises nothing."""
    content = bytearray(write_rows(tmp_path / f"x{suffix}", ROWS).read_bytes())
    start = int(place * len(content))
    content[start : start + len(damage)] = damage
    for found in read(tmp_path / f"x{suffix}", bytes(content)):
        assert isinstance(found, Row | RowError)


def test_a_damaged_footer_does_not_end_the_process(tmp_path: Path) -> None:
    """In pyarrow 26 it aborts where damaged sizes of a column are asked for (bytes 11 and 12 of this footer)."""
    content = write_rows(tmp_path / "x.parquet", ROWS).read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for place in range(footer, footer + 40):
        damaged = bytearray(content)
        damaged[place] = (damaged[place] + 1) % 256
        assert all(isinstance(found, Row | RowError) for found in read(tmp_path / "x.parquet", bytes(damaged)))


def test_a_directory_stands_for_its_only_data_file(tmp_path: Path) -> None:
    """A directory is read where exactly one data file lies in it; other and hidden files do not count."""
    with pytest.raises(DataError, match="no data file"):
        find_file(str(tmp_path))
    path = write_rows(tmp_path / "rows.csv", ROWS)
    # What people, Spark and SageMaker's copying leave beside it.
    for name in ("README.md", ".hidden.json", "_SUCCESS", "rows.csv.sagemaker-uploaded", ".part-0000.csv.crc"):
        (tmp_path / name).touch()
    assert find_file(str(tmp_path)) == path
    write_rows(tmp_path / "rows.json", ROWS)
    with pytest.raises(
        DataError, match=r"2 data files, name one, or several by a glob such as \S+/\*\.csv: rows\.csv, rows\.json$"
    ):
        find_file(str(tmp_path))


@pytest.mark.parametrize("name", ["missing.jsonl", "rows.txt", "x" * 300 + ".csv"])
def test_a_path_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    """A path that is not there, of no known format or impossible is an error of the data that names it."""
    (tmp_path / "rows.txt").touch()
    with pytest.raises(DataError, match=name):
        find_file(str(tmp_path / name))


def test_a_key_given_twice_is_a_fault_of_its_row(tmp_path: Path) -> None:
    """JSON's last value does not win in silence: the key is named, at any depth, in lines and in lists."""
    rows = b'{"a": "1"}', b'{"a": "1", "b": "2", "a": "3"}', b'{"a": [{"b": {"c": 1, "c": 1}}]}'
    for name, content in (("x.jsonl", b"\n".join(rows)), ("x.json", b"[" + b",".join(rows) + b"]")):
        good, *faults = read(tmp_path / name, content)
        assert isinstance(good, Row)
        assert [fault.kind for fault in faults if isinstance(fault, RowError)] == ["repeated_key"] * 2
        assert [fault.where.split(" ")[1] for fault in faults] == ["a", "a.0.b.c"]
    (fault,) = read(tmp_path / "y.json", b'{"data": [], "data": []}')
    assert isinstance(fault, RowError)
    assert fault.kind == UNREADABLE


def test_a_column_given_twice_is_a_fault_in_parquet_too(tmp_path: Path) -> None:
    """The last one does not win in silence."""
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table([pa.array(["x"]), pa.array(["y"]), pa.array(["z"])], names=["a", "b", "b"])
    parquet.write_table(table, tmp_path / "x.parquet")
    (fault,) = read(tmp_path / "x.parquet")
    assert isinstance(fault, RowError)
    assert fault.kind == UNREADABLE
    assert "'b' twice" in fault.what


def test_nan_of_pandas_is_a_missing_value(tmp_path: Path) -> None:
    """NaN, which is no JSON and which pandas writes for what is missing, reads as null; in Parquet too."""
    import pyarrow as pa
    from pyarrow import parquet

    (row,) = read(tmp_path / "x.jsonl", b'{"a": NaN, "b": [NaN, Infinity]}')
    assert row == Row("x.jsonl:1", {"a": None, "b": [None, float("inf")]})
    parquet.write_table(pa.table({"a": [float("nan")], "b": ["x"]}), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == [Row("x.parquet:row 1", {"a": None, "b": "x"})]


@pytest.mark.parametrize("header", [b"a;b\r\n1;2\r\n", b"a\tb\n1\t2\n", b"\xef\xbb\xbfa;b\n1;2\n"])
def test_csv_with_other_separators_is_read(tmp_path: Path, header: bytes) -> None:
    """A header without a comma is split at its semicolons or tabs."""
    assert read(tmp_path / "x.csv", header) == [Row("x.csv:row 1", {"a": "1", "b": "2"})]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", '{"a": "1"}\n'.encode("utf-16"), "iconv -f UTF-16"),
        ("x.jsonl", '{"a": "1"}\n'.encode("utf-16-le"), "iconv -f UTF-16"),
        ("x.csv", "a,b\n1,2\n".encode("utf-16-be"), "iconv -f UTF-16"),
        ("x.json.gz", gzip.compress('[{"a": "1"}]'.encode("utf-16"), mtime=0), "iconv -f UTF-16"),
        ("x.jsonl", '{"a": "1"}\n'.encode("utf-32"), "iconv -f UTF-32"),
        ("x.jsonl", '{"a": "1"}\n'.encode("utf-32-le"), "iconv -f UTF-32"),
        ("x.csv", "a,b\n1,2\n".encode("utf-32-be"), "iconv -f UTF-32"),
        ("x.jsonl", b"<!DOCTYPE html>\n<html>Please sign in", "HTML page"),
        ("x.json", b"\n<html><body>403</body></html>", "HTML page"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("x.jsonl", b"PK\x03\x04....", "suffix of its format"),
    ],
)
def test_a_file_that_is_something_else_says_what(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    """UTF-16, UTF-32, HTML, pointers of git-lfs and archives are named as that, and not as broken rows."""
    (fault,) = read(tmp_path / name, content)
    assert isinstance(fault, RowError)
    assert fault.kind == UNREADABLE
    assert words in fault.what


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.zip", "unpack it"),
        ("x.jsonl.xz", "use gzip or zstd"),
        ("x.parquet.gz", "unpack it"),
        ("x.xlsx", "save it as CSV"),
        ("x.feather", "as Parquet"),
        ("x.pkl", "run code"),
    ],
)
def test_formats_that_are_not_read_say_what_to_do(tmp_path: Path, name: str, words: str) -> None:
    """A file of a format that people have and the job does not read is refused with the way to one that it reads."""
    (tmp_path / name).write_bytes(b"x")
    for place in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=words):
            find_file(str(place))


def test_a_folder_of_save_to_disk_is_read(tmp_path: Path) -> None:
    """What `datasets` saved gives its rows in order; of a dictionary of data sets, those of the split."""
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "dict")
    for folder, split, expected in (("one", "any", ROWS), ("dict", "train", ROWS), ("dict", "test", ROWS[1:2])):
        files, _ = find_files(str(tmp_path / folder), split)
        found = [row for file in files for row in read_rows(file, file.name)]
        assert [row.fields for row in found if isinstance(row, Row)] == expected
    for split in ("validation", ".."):
        with pytest.raises(DataError, match=r"JOB_DATA__SPLIT.*'train', 'test'"):
            find_files(str(tmp_path / "dict"), split)
    assert find_files(str(tmp_path / "one" / "data-00001-of-00002.arrow"), "any")[1] is False


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ('{"_data_files": [{"filename": "../x.arrow"}]}', "names no files"),
        ('{"_data_files": [{"filename": "x.arrow"}]}', "lacks x.arrow"),
        ('{"_data_files": [{"filename": "state.json"}]}', "lacks state.json"),
        ("[]", "not a JSON object"),
        ("{", "not a JSON object"),
    ],
)
def test_a_saved_data_set_stays_in_its_folder(tmp_path: Path, state: str, words: str) -> None:
    """A state.json that names other files than Arrow files of the folder is an error."""
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(DataError, match=words):
        find_files(str(tmp_path), "train")


def test_globs_and_numbered_shards_are_read_in_order(tmp_path: Path) -> None:
    """All files that a glob fits, or a folder's shards if nothing is missing, are read; other files are not mixed."""
    names = ["rows-00001.jsonl", "rows-00000.jsonl"]
    for name in names:
        write_rows(tmp_path / name, ROWS)
    assert [file.name for file in find_files(str(tmp_path), "train")[0]] == sorted(names)
    write_rows(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(DataError, match=r"3 data files, name one, or several by a glob such as \S+/\*\.jsonl"):
        find_files(str(tmp_path), "train")
    assert [file.name for file in find_files(f"{tmp_path}/rows-*.jsonl", "train")[0]] == sorted(names)
    assert len(find_files(f"{tmp_path.parent}/**/{tmp_path.name}/*.jsonl", "train")[0]) == 3
    with pytest.raises(DataError, match="matches no file"):
        find_files(f"{tmp_path}/*.csv", "train")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"notes\.txt: ends in none of"):
        find_files(f"{tmp_path}/*", "train")
    (tmp_path / "test.jsonl").unlink()
    (tmp_path / "rows-00000.jsonl").rename(tmp_path / "rows-00003.jsonl")
    with pytest.raises(DataError, match="2 data files"):
        find_files(str(tmp_path), "train")


@pytest.mark.parametrize(
    "names",
    [
        ["part-0.jsonl", "part-1.jsonl"],
        [f"part_{number}.jsonl" for number in range(1, 12)],
        ["0.jsonl", "1.jsonl"],
        [f"rows-{number}.jsonl" for number in range(101)],
    ],
    ids=["one digit", "from 1 to 11", "only numbers", "from 0 to 100"],
)
def test_shards_may_be_numbered_without_leading_zeros(tmp_path: Path, names: list[str]) -> None:
    """They are read in the order of their numbers, as writers of parts name them."""
    for name in reversed(names):
        (tmp_path / name).write_bytes(LINES)
    assert [file.name for file in find_files(str(tmp_path), "train")[0]] == names


@pytest.mark.parametrize(
    "names",
    [
        ["rows_v1.jsonl", "rows_v2.jsonl"],
        ["rows-1.0.jsonl", "rows-1.1.jsonl"],
        ["part-0.jsonl", "part-2.jsonl"],
        ["part-0.jsonl", "part-1.csv"],
        ["train-0.jsonl", "test-1.jsonl"],
        ["part-0.jsonl", "part-1.jsonl", "part-01.jsonl"],
        ["part-8.jsonl", "part-9.jsonl"],
        ["part-0.jsonl", "part-1.jsonl", "other.jsonl"],
    ],
)
def test_files_that_may_be_no_shards_are_not_put_together(tmp_path: Path, names: list[str]) -> None:
    """Versions, gaps, several names or formats: the error asks for one file or a glob."""
    for name in names:
        (tmp_path / name).write_bytes(LINES)
    with pytest.raises(DataError, match=f"{len(names)} data files, name one, or several by a glob"):
        find_files(str(tmp_path), "train")


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".csv.zst", ".arrow"])
def test_a_damaged_file_is_a_fault(tmp_path: Path, suffix: str) -> None:
    """A file that is cut off anywhere, or is no such file, gives a fault that names it, never an exception."""
    path = write_rows(tmp_path / f"x{suffix}", [{"a": f"{number} " * 50, "b": "x"} for number in range(200)])
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-1], b"\xff" * 200):
        found = read(path, content)
        assert found
        assert isinstance(found[-1], RowError)
        assert found[-1].kind == UNREADABLE


LINES = b'{"a": 1}\n{"a": 2}\n'
CUT = {
    "gzip, garbage behind": (".jsonl.gz", gzip.compress(LINES, mtime=0) + b"garbage"),
    "gzip, cut": (".jsonl.gz", gzip.compress(LINES, mtime=0)[:-1]),
    "gzip, second part cut": (".jsonl.gz", gzip.compress(LINES, mtime=0) * 2 + gzip.compress(LINES, mtime=0)[:5]),
    "gzip, other checksum": (".jsonl.gz", gzip.compress(LINES, mtime=0)[:-8] + bytes(8)),
    "zstd, cut": (".jsonl.zst", packed(LINES, ".zst")[:-1]),
    "zstd, second part cut": (".jsonl.zst", packed(LINES, ".zst") * 2 + packed(LINES, ".zst")[:3]),
    "zstd, garbage behind": (".jsonl.zst", packed(LINES, ".zst") + b"garbage"),
    "CSV, cut in quotes": (".csv", b'a,b\n1,2\n3,"4'),
    "CSV, cut in a row": (".csv", b"a,b\n1,2\n3"),
    "CSV, header again": (".csv", b"a,b\n1,2\na,b\n3,4\n"),
    "JSONL, zeros behind": (".jsonl", LINES + bytes(512)),
    "JSONL, byte order mark within": (".jsonl", LINES + codecs.BOM_UTF8 + LINES),
    "JSONL, old line breaks": (".jsonl", LINES.replace(b"\n", b"\r")),
    "JSONL, number of 5000 digits": (".jsonl", b'{"a": ' + b"1" * 5000 + b"}\n"),
    "JSON, two lists": (".json", b'[{"a": 1}][{"a": 2}]'),
    **{
        f"text, but {head[:4]!r}": (".csv", head + b"\0,1\n" * 20)
        for head in (b"BZh9", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
    },
}


@pytest.mark.parametrize("case", CUT)
def test_what_was_cut_or_put_together_is_a_fault(tmp_path: Path, case: str) -> None:
    """A file that broke off, or holds something behind its end, never just has fewer rows."""
    suffix, content = CUT[case]
    assert any(isinstance(row, RowError) for row in read(tmp_path / f"rows{suffix}", content))


def test_compressed_files_put_together_are_read_to_the_end(tmp_path: Path) -> None:
    """Gzip and zstd files one behind the other are one file, as their tools have it."""
    for suffix in (".gz", ".zst"):
        rows = read(tmp_path / f"rows.jsonl{suffix}", packed(LINES, suffix) * 2)
        assert [row.fields for row in rows if isinstance(row, Row)] == [{"a": 1}, {"a": 2}] * 2


@pytest.mark.parametrize("damage", ["no end", "twice", "tail", "column twice"])
def test_an_arrow_stream_that_does_not_end_where_its_file_does_is_a_fault(tmp_path: Path, damage: str) -> None:
    """Between two batches a stream may break off unseen, and what follows its end is read by nobody."""
    path = write_rows(tmp_path / "rows.arrow", ROWS)
    data = path.read_bytes()
    if damage == "column twice":
        import pyarrow as pa

        table = pa.Table.from_arrays([pa.array(["1"]), pa.array(["2"])], names=["a", "a"])
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_bytes({"no end": data[:-8], "twice": data * 2, "tail": data + b"12345678"}[damage])
    assert isinstance(read(path)[-1], RowError)


def test_checksums_of_parquet_pages_are_verified(tmp_path: Path) -> None:
    """One flipped bit in a file whose pages have checksums is a fault; without it the text would be another."""
    import pyarrow as pa
    from pyarrow import parquet

    path, rows = tmp_path / "rows.parquet", [{"a": "a text that is not compressed"}]
    parquet.write_table(
        pa.Table.from_pylist(rows),
        path,
        compression="none",
        write_page_checksum=True,
        use_dictionary=False,
        write_statistics=False,
    )
    data = path.read_bytes()
    assert [row.fields for row in read(path) if isinstance(row, Row)] == rows
    (fault,) = read(path, data.replace(b"a text", b"a teXt", 1))
    assert isinstance(fault, RowError)
    assert "checksum" in fault.what


def test_values_that_python_does_not_know_are_faults_of_their_rows(tmp_path: Path) -> None:
    """A time zone of nowhere, or a day beyond all calendars, is named by row and column."""
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    for values in (pa.array([1], pa.timestamp("us", tz="Mars/Phobos")), pa.array([2**30], pa.date32())):
        parquet.write_table(pa.table({"t": values}), path)
        (fault,) = read(path)
        assert isinstance(fault, RowError)
        assert fault.where == "rows.parquet:row 1 t"


def test_types_of_arrow_are_what_they_stand_for(tmp_path: Path) -> None:
    """Text in a dictionary, in views or in large columns is text; nested lists and structs are lists and objects."""
    import pyarrow as pa

    texts = pa.array(["one", "two"])
    turn = pa.struct([("role", pa.dictionary(pa.int32(), pa.string())), ("content", pa.string_view())])
    turns = [[{"role": "user", "content": "a"}]] * 2
    table = pa.table(
        {
            "dictionary": texts.dictionary_encode(),
            "large": texts.cast(pa.large_string()),
            "view": texts.cast(pa.string_view()),
            "turns": pa.array(turns, pa.list_(turn)),
        }
    )
    path = tmp_path / "rows.arrow"
    for new in (pa.ipc.new_stream, pa.ipc.new_file):
        with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table)
        found = [row.fields for row in read(path) if isinstance(row, Row)]
        assert found == [{"dictionary": t, "large": t, "view": t, "turns": turns[0]} for t in ("one", "two")]


ODD = {
    "a link to nothing": lambda path: path.symlink_to("/nowhere/at/all"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "packed otherwise": lambda path: path.with_name(f"{path.name}.bz2").touch(),
    "still to come": lambda path: path.with_name(f"{path.name}.part").touch(),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_shard_that_cannot_be_read_is_not_left_out(tmp_path: Path, odd: str) -> None:
    """A shard that is no file, or not complete yet, is named: without it there would silently be fewer rows."""
    for number in range(2):
        (tmp_path / f"rows-{number:02}.jsonl").write_bytes(LINES)
    (tmp_path / ".rows-02.jsonl").touch()
    (tmp_path / "README.md").touch()
    assert len(find_files(str(tmp_path), "train")[0]) == 2
    ODD[odd](tmp_path / "rows-02.jsonl")
    sources = [tmp_path, tmp_path / "rows-*"]
    for source in sources:
        with pytest.raises(DataError, match=r"rows-02\.jsonl"):
            find_files(str(source), "train")


@pytest.mark.parametrize("odd", [odd for odd in ODD if odd != "a folder"])
@pytest.mark.parametrize("name", ["rows-01.jsonl", "other.jsonl"])
def test_the_only_file_of_a_folder_is_not_a_part_of_it(tmp_path: Path, odd: str, name: str) -> None:
    """A second data file that cannot be read is named too where only one is left, which would be taken for all."""
    (tmp_path / "rows-00.jsonl").write_bytes(LINES)
    (tmp_path / "README.md").touch()
    assert len(find_files(str(tmp_path), "train")[0]) == 1
    ODD[odd](tmp_path / name)
    if name == "other.jsonl" and odd in {"packed otherwise", "still to come"}:  # of no name that the first one has
        return
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        find_files(str(tmp_path), "train")


def test_the_shards_of_a_split_are_read_in_order(tmp_path: Path) -> None:
    """A clone of a hub repository is read by split, as the hub names its shards; one that is missing is an error."""
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").touch()
    for name in ("train-00001-of-00002", "train-00000-of-00002", "test-00000-of-00001-0123456789abcdef"):
        write_rows(tmp_path / "data" / f"{name}.parquet", ROWS)
    files, chosen = find_files(str(tmp_path), "train")
    assert ([file.name for file in files], chosen) == (
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        True,
    )
    assert len(find_files(str(tmp_path), "test")[0]) == 1
    with pytest.raises(DataError, match=r"data/test-00000-of-00001-0123456789abcdef\.parquet is one; name it"):
        find_files(str(tmp_path), "validation")
    (tmp_path / "data/train-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="1 of the 2 shards of split 'train'"):
        find_files(str(tmp_path), "train")
    assert find_files(str(tmp_path / "data/train-00001-of-00002.parquet"), "train")[1] is False


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """A FIFO as data file is an error at once."""
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        find_file(str(tmp_path / "x.jsonl"))


def peak_of_reading(path: Path) -> tuple[int, str]:
    """MiB that reading a file takes at most, in a process of its own; and the last fault."""
    code = (
        "import resource, sys; from pathlib import Path; from job.data.formats import *\n"
        "path = Path(sys.argv[1]); last = None\n"
        "import pyarrow.parquet\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for row in read_rows(path, path.name): last = row if isinstance(row, RowError) else last\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, last and last.what)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True, timeout=120)
    used, _, what = done.stdout.partition(" ")
    return int(used), what


@pytest.mark.long
def test_decompression_bombs_are_refused(tmp_path: Path) -> None:
    """A small file of gigabytes when decompressed (lines, one line, JSON, Parquet) takes bounded memory."""
    import pyarrow as pa
    from pyarrow import parquet

    line = b'{"text": "' + b"a" * (1 << 20) + b'"}\n'
    with gzip.open(tmp_path / "lines.jsonl.gz", "wb", compresslevel=9) as file:
        for _ in range(150):
            file.write(line)
    with gzip.open(tmp_path / "one.jsonl.gz", "wb", compresslevel=9) as file:
        for _ in range(150):
            file.write(b"a" * (1 << 20))
    shutil.copy(tmp_path / "one.jsonl.gz", tmp_path / "one.json.gz")
    values = pa.array(["a" * (8 << 20)])
    many = pa.DictionaryArray.from_arrays(pa.array([0] * 4096, pa.int32()), values)
    parquet.write_table(pa.table({"text": many}), tmp_path / "dictionary.parquet", compression="zstd")
    plain = pa.table({"text": ["a" * (8 << 20)] * 20})
    parquet.write_table(plain, tmp_path / "plain.parquet", compression="zstd", use_dictionary=False)
    for path in sorted(tmp_path.iterdir()):
        assert path.stat().st_size < 1 << 20
        used, what = peak_of_reading(path)
        assert "expands to more than 400 times" in what, path.name
        assert used < 600, path.name


def test_a_line_that_is_too_long_is_one_fault(tmp_path: Path) -> None:
    """A line of more bytes than a row may have is a fault with its number, and the next one is read."""
    (tmp_path / "x.jsonl").write_bytes(b'{"a": "' + b"x" * (40 << 20) + b'"}\n{"a": "1"}\n')
    fault, row = read(tmp_path / "x.jsonl")
    assert isinstance(fault, RowError)
    assert (fault.kind, fault.where) == ("too_long", "x.jsonl:1")
    assert row == Row("x.jsonl:2", {"a": "1"})
    (tmp_path / "x.csv").write_bytes(b"a\n" + b"x" * (40 << 20) + b"\n")
    (fault,) = read(tmp_path / "x.csv")
    assert isinstance(fault, RowError)
    assert "16,777,216" in fault.what


@pytest.mark.parametrize(
    "content", [b'{"a": [1, 2], "b": ["x", "y"]}', b'{"a": {"0": 1, "1": 2}, "b": {"0": "x", "1": "y"}}']
)
def test_json_of_columns_is_said_to_be_that(tmp_path: Path, content: bytes) -> None:
    """What pandas or a dict of lists writes is not told to write one of its columns to a file."""
    (fault,) = read(tmp_path / "x.json", content)
    assert isinstance(fault, RowError)
    assert "it contains columns: write one object for each row" in fault.what
    (other,) = read(tmp_path / "y.json", b'{"train": [{"a": 1}], "test": [{"a": 2}]}')
    assert isinstance(other, RowError)
    assert "it has lists under 'train', 'test'" in other.what
