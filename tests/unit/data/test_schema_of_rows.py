"""Rows that fit no schema say what they have; a named schema wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.errors import DataError
from tests.unit.data.test_dataset import lines, load, text_of


def test_rows_that_fit_no_schema_say_what_they_have(tmp_path: Path) -> None:
    """Where no schema fits, the error names the row's fields and the schemas there are."""
    path = lines(tmp_path / "x.jsonl", {"question": "a", "\ud800": 1})
    with pytest.raises(DataError, match=r"x.jsonl:1: fits no schema.*'question', '\\ud800'; known are alpaca: instr"):
        load(path, on_bad_row="skip")
    with pytest.raises(DataError, match=r"JOB_DATA__FIELDS=prompt=question,completion=NAME takes them"):
        load(path)
    with pytest.raises(DataError, match=r"JOB_DATA__FIELDS=chosen=NAME,rejected=NAME takes them"):
        load(path, method="dpo")


def test_a_misspelled_field_is_named(tmp_path: Path) -> None:
    """The row's own name that is nearest to a missing field is told, in rows that fit half a schema or none."""
    path = lines(tmp_path / "x.jsonl", {"promt": "a", "completion": "b"}, {"Prompt": "a", "completion": "b"})
    with pytest.raises(DataError) as caught:
        load(path)
    assert [str(problem) for problem in caught.value.problems] == [
        f"{path}:{n} prompt: is missing; if it is {name!r}, rename it, or map it with JOB_DATA__FIELDS"
        for n, name in ((1, "promt"), (2, "Prompt"))
    ]
    assert "JOB_DATA__ON_BAD_ROW=skip" in str(caught.value).splitlines()[-1]
    path = lines(tmp_path / "y.jsonl", {"promt": "a", "completon": "b"})
    with pytest.raises(DataError, match="'promt' may be a misspelt prompt; 'completon' may be a misspelt completion"):
        load(path)


def test_pairs_are_one_problem(tmp_path: Path) -> None:
    """Rows of preferences under `sft` are told once, with the method for them; each row is, under a named schema."""
    path = lines(tmp_path / "x.jsonl", *[{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
    with pytest.raises(DataError, match=r"x.jsonl:1: has the fields .* set JOB_TRAIN__METHOD=dpo or orpo$") as caught:
        load(path)
    assert caught.value.total == 1
    with pytest.raises(DataError) as caught:
        load(path, schema="prompt_completion")
    assert caught.value.total == 3
    assert all("set JOB_TRAIN__METHOD=dpo" in problem.what for problem in caught.value.problems)


def test_instructions_under_dpo_name_the_fields_of_pairs(tmp_path: Path) -> None:
    """Who asks for DPO gets to know which rows it learns from, not only the method for the rows there are."""
    path = lines(tmp_path / "x.jsonl", {"instruction": "a", "output": "b"})
    with pytest.raises(DataError, match=r"METHOD=sft, or give rows with the fields chosen, rejected$"):
        load(path, method="dpo")


def test_a_row_of_another_schema_is_one_problem(tmp_path: Path) -> None:
    """It says so, instead of one missing field after another; a row that lacks a field of its schema names it."""
    other, half = {"prompt": "a", "completion": "b"}, {"instruction": "a"}
    path = lines(tmp_path / "x.jsonl", {"instruction": "a", "output": "b"}, other, half)
    with pytest.raises(DataError) as caught:
        load(path)
    what = "has the fields of the schema prompt_completion, not of alpaca; all rows must have one schema, that of"
    assert [str(problem) for problem in caught.value.problems] == [
        f"{path}:2: {what} JOB_DATA__FORMAT or else of the first row",
        f"{path}:3 output: is missing",
    ]
    assert load(path, on_bad_row="skip")[1].skipped == {"missing_field": 2}


def test_a_named_schema_wins(tmp_path: Path) -> None:
    """A schema given by name is used where detection would take another."""
    path = lines(tmp_path / "x.jsonl", {"instruction": "a", "output": "b", "text": "cat"})
    assert load(path)[1].format == "alpaca"
    examples, record = load(path, schema="text")
    assert (record.format, text_of(examples[0])) == ("text", "cat")
