"""Bad rows are reported together, or counted."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from job.common.bad_row_reasons import REASONS, with_reasons
from job.data import formats
from job.errors import DataError
from tests.unit.data.loaded_rows import lines, load


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
    assert str(caught.value).splitlines()[20:] == [
        "... and 40 more",
        f"problems of {path} by kind: 30: {REASONS['wrong_type']}; 30: {REASONS['empty_target']}",
        CORRECT.format("rows"),
    ]


CORRECT = "correct the {}, or set JOB_DATA__ON_BAD_ROW=skip to skip and count invalid rows"
SHORTEN = "raise JOB_TRAIN__MAX_LENGTH, or set JOB_DATA__ON_LONG_ROW to skip, truncate or split long rows"
CONVERT = "convert a text file to UTF-8: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW, if it is of Windows or Latin-1"
CORRECT_LATER = CORRECT.replace("=skip to", "=skip once the file is UTF-8, to")
LONG, EMPTY = b'{"text": "%s"}' % (b"0" * 40), b'{"text": ""}'
LATIN, HALF = '{"text": "für"}'.encode("latin-1"), b'{"text": "\\ud800"}'


@pytest.mark.parametrize(
    ("rows", "advice"),
    [
        ([LONG], [SHORTEN]),
        ([EMPTY], [CORRECT.format("rows")]),
        ([LATIN], [CONVERT]),
        ([b"\xfc\xdf"], [CONVERT]),
        ([HALF], []),
        ([LONG, EMPTY, LONG], [SHORTEN, CORRECT.format("other rows")]),
        ([LATIN, LONG], [SHORTEN, CONVERT]),
        ([EMPTY, LATIN, LONG], [SHORTEN, CONVERT, CORRECT_LATER.format("other rows")]),
    ],
)
def test_the_advice_of_each_kind_that_occurs_ends_the_message(
    tmp_path: Path, rows: list[bytes], advice: list[str]
) -> None:
    """Each once, behind the rows; to skip rows is no advice for a file in another encoding."""
    with pytest.raises(DataError) as caught:
        load(lines(tmp_path / "x.jsonl", *rows), schema="text", max_length=30)
    assert str(caught.value).splitlines()[len(rows) :] == advice
    assert caught.value.advice == "\n".join(advice)


@pytest.mark.parametrize("count", [20, 21])
def test_the_number_by_kind_is_given_where_not_all_are_named(tmp_path: Path, count: int) -> None:
    """Twenty problems are all there to be read; of more, the message says how many are of which kind."""
    path = lines(tmp_path / "x.jsonl", *[EMPTY] * count)
    with pytest.raises(DataError) as caught:
        load(path, schema="text")
    by_kind = ["... and 1 more", f"problems of {path} by kind: 21: {REASONS['empty_target']}"]
    assert str(caught.value).splitlines()[20:] == [*(by_kind if count > 20 else []), CORRECT.format("rows")]


def test_the_advice_of_a_kind_that_is_not_shown(tmp_path: Path) -> None:
    """It is counted and advised, though the first twenty problems are of another kind."""
    with pytest.raises(DataError) as caught:
        load(lines(tmp_path / "x.jsonl", *[LONG] * 1200, EMPTY), schema="text", max_length=30)
    assert str(caught.value).splitlines()[20:] == [
        "... and 1,181 more",
        f"problems of {tmp_path / 'x.jsonl'} by kind: 1: {REASONS['empty_target']}; 1,200: {REASONS['too_long']}",
        SHORTEN,
        CORRECT.format("other rows"),
    ]


def test_rows_that_are_not_utf8_can_still_be_skipped(tmp_path: Path) -> None:
    """They are counted under their kind, wherever the invalid text is from."""
    examples, record = load(lines(tmp_path / "x.jsonl", LATIN, HALF, b'{"text": "a"}'), on_bad_row="skip")
    assert (len(examples), record.skipped) == (1, {"broken_utf8": 2})


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


def kinds_of(module: Path) -> set[str]:
    """Kinds that a module's source gives to its errors: the first argument, or what a name of it is assigned."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "RowError"]
    first = [call.args[0] for call in calls if not isinstance(call.args[0], ast.Starred)]
    assigned = [
        item
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in {"(kind, what)", "(kind, why)"}
        for item in ast.walk(node.value)
        if isinstance(item, ast.Tuple)
    ]
    constants = [*first, *(item.elts[0] for item in assigned)]
    return {str(node.value) for node in constants if isinstance(node, ast.Constant)}


def test_every_kind_of_bad_row_has_its_words() -> None:
    """The table has all that the modules give, and nothing more."""
    folder = Path(formats.__file__).parent
    found = {kind for module in folder.glob("*.py") for kind in kinds_of(module)}
    assert found | {formats.UNREADABLE} == set(REASONS)


def test_reasons_are_words_that_stay_as_they_are() -> None:
    """A manifest of an earlier version has kinds, one of this version words; both become the same words."""
    rows = {"rows": 3, "skipped": {"too_long": 1, "empty_target": 2}, "validation": None}
    once = with_reasons({**rows, "validation": {"skipped": {"of_another_version": 1}}})
    assert once == {
        "rows": 3,
        "skipped": {REASONS["empty_target"]: 2, REASONS["too_long"]: 1},
        "validation": {"skipped": {"of another version": 1}},
    }
    assert with_reasons(once) == once
    assert with_reasons(rows)["validation"] is None


def test_a_file_without_a_valid_row_says_why(tmp_path: Path) -> None:
    """In words, with the number of rows."""
    path = lines(tmp_path / "x.jsonl", {"text": ""}, {"text": 3}, {"text": " "})
    with pytest.raises(DataError) as caught:
        load(path, on_bad_row="skip")
    assert "has no valid row (skipped 1: field has a value of the wrong type or an unknown value; 2: nothing" in str(
        caught.value
    )
