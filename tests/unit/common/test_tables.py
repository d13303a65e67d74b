"""Tables of text: aligned, with special characters of cells escaped."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from job.common import tables

rows = st.lists(st.tuples(st.text(), st.text()), max_size=5)


def test_plain_columns_are_aligned() -> None:
    """A line under the head, and every column as wide as its widest value."""
    assert tables.plain(("name", "A"), [("x", "1"), ("longer", "22")]) == [
        "name    A",
        "------  --",
        "x       1",
        "longer  22",
    ]


def test_markdown() -> None:
    """Head, rule, rows."""
    assert tables.markdown(("", "A"), [("x", "1")]) == ["|  | A |", "| --- | --- |", "| x | 1 |"]


@given(rows)
def test_a_row_stays_a_row(content: list[tuple[str, str]]) -> None:
    """Whatever the cells hold: one line a row, only printable characters, and in Markdown no cell too many."""
    for lines in (tables.plain(("a", "b"), content), tables.markdown(("a", "b"), content)):
        assert len(lines) == len(content) + 2
        assert all(line.isprintable() for line in lines)
    for line in tables.markdown(("a", "b"), content):
        bare = line.replace("\\\\", "").replace("\\|", "")
        assert bare.count("|") == 3
        assert "<" not in line
