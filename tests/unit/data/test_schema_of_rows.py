"""For rows that fit no schema the error names their fields; a schema that is set takes precedence."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.errors import DataError
from tests.unit.data.loaded_rows import lines, load, text_of


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


@pytest.mark.parametrize(
    ("row", "schema", "field", "setting"),
    [
        ({"prompt": "a", "response": "b"}, "prompt_completion", "completion", "completion=response"),
        ({"completion": "b", "question": "a"}, "prompt_completion", "prompt", "prompt=question"),
        (
            {"instruction": "a", "context": "c", "response": "b", "category": "x"},
            *("alpaca", "output", "output=response,input=context"),
        ),
        ({"instruction": "a", "Answer": "b"}, "alpaca", "output", "output=Answer"),
    ],
    ids=["prompt, response", "question, completion", "Dolly", "upper case"],
)
def test_a_usual_name_of_a_missing_field_is_named_with_its_setting(
    tmp_path: Path, row: dict[str, str], schema: str, field: str, setting: str
) -> None:
    """In place of the advice to skip the rows; the setting reads them, Dolly's `context` included."""
    path = lines(tmp_path / "x.jsonl", row, row)
    names = dict(pair.split("=") for pair in setting.split(","))
    with pytest.raises(DataError) as caught:
        load(path)
    advice = f"is missing; if all rows have it as {names[field]!r}, set JOB_DATA__FIELDS={setting}"
    assert [str(problem) for problem in caught.value.problems] == [f"{path}:{n} {field}: {advice}" for n in (1, 2)]
    assert "JOB_DATA__ON_BAD_ROW" not in str(caught.value)
    examples, record = load(path, field_names=names)
    assert record.format == schema
    assert all(row[own] in text_of(examples[0]) for own in names.values())


def test_names_that_are_set_stay_in_the_setting(tmp_path: Path) -> None:
    """The setting that is named contains the names that JOB_DATA__FIELDS has already."""
    path = lines(tmp_path / "x.jsonl", {"q": "a", "response": "b"})
    with pytest.raises(DataError, match=r"set JOB_DATA__FIELDS=prompt=q,completion=response$"):
        load(path, field_names={"prompt": "q"})


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
