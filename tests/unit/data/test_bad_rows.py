"""Bad rows are named together, or counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.errors import DataError
from tests.unit.data.test_dataset import lines, load


def test_all_faults_are_counted_and_twenty_named(tmp_path: Path) -> None:
    """Every fault of every row counts, two in one row as two, and the first twenty are named by line and field."""
    path = lines(tmp_path / "x.jsonl", {"instruction": "a", "output": "b"}, *[{"instruction": 1, "output": ""}] * 30)
    with pytest.raises(DataError) as caught:
        load(path)
    assert caught.value.total == 60
    assert [problem.where for problem in caught.value.problems[:3]] == [
        f"{path}:2 instruction",
        f"{path}:2 output",
        f"{path}:3 instruction",
    ]
    assert str(caught.value).splitlines()[-2] == "... and 40 more"


def test_a_row_that_is_too_long_names_its_longest_field(tmp_path: Path) -> None:
    """A row with more tokens than allowed says how many, and which field is to blame."""
    path = lines(tmp_path / "x.jsonl", {"prompt": "0" * 9, "completion": "b"})
    assert load(path, max_length=12)[1].longest == 12
    with pytest.raises(DataError, match=r"x.jsonl:1 prompt: makes the row 12 tokens long, 11 are allowed"):
        load(path, max_length=11)


def test_the_rest_of_a_broken_file_cannot_be_skipped(tmp_path: Path) -> None:
    """A file that cannot be read to its end is an error even where bad rows are skipped."""
    path = tmp_path / "x.csv"
    path.write_bytes(b'text\na\n"b')
    with pytest.raises(DataError, match="not valid CSV"):
        load(path, on_bad_row="skip")
    assert len(load(path, limit=1)[0]) == 1
