"""Files of questions: each row that is not a valid question of its task is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import structlog

from job.errors import DataError
from tests.helpers import ARC_EASY, arc_rows, write_jsonl
from tests.unit.evaluation.example_tasks import local_tasks

pytestmark = [
    pytest.mark.usefixtures("one_index"),
    # lm-eval 0.4.13 calls parts of itself by names that it has deprecated
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lm_eval.*"),
]


@pytest.mark.skipif(not ARC_EASY.exists(), reason=f"the real ARC-Easy is not at {ARC_EASY}")
def test_all_of_the_real_arc_easy_is_accepted() -> None:
    """2,376 questions, each of which fits the task."""
    assert len(local_tasks(arc_easy=ARC_EASY).loaded["tasks"]["arc_easy"].eval_docs) == 2376


GOOD = arc_rows(6)


def test_questions_that_are_asked_twice_are_logged(tmp_path: Path) -> None:
    """Each counts in the comparison as if it were another question; an id of its own makes it none."""
    rows = [*GOOD, {**GOOD[1], "id": "another"}, {**GOOD[2], "id": "one more"}]
    with structlog.testing.capture_logs() as logs:
        local_tasks(arc_easy=write_jsonl(tmp_path / "once.jsonl", GOOD))
        assert logs == []
        local_tasks(arc_easy=write_jsonl(tmp_path / "twice.jsonl", rows))
    (line,) = logs
    assert line["event"].startswith("questions are asked more than once")
    assert (line["task"], line["questions"], line["repeated"]) == ("arc_easy", 8, 2)
    assert line["first"].endswith(":7")


def spoiled(number: int, **changes: Any) -> list[dict[str, Any]]:
    """Valid rows, one of which has changed fields; None removes a field."""
    rows = [dict(row) for row in GOOD]
    rows[number - 1] = {key: value for key, value in {**rows[number - 1], **changes}.items() if value is not None}
    return rows


@pytest.mark.parametrize("line", [1, 4])
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"answerKey": "Z"}, "does not match the task arc_easy: ValueError"),
        ({"answerKey": None}, "does not match the task arc_easy: UndefinedError|None is not in list"),
        ({"question": None}, "does not match the task arc_easy: UndefinedError"),
        ({"choices": None}, "does not match the task arc_easy: UndefinedError"),
        ({"choices": {"text": ["a", ""], "label": ["A", "B"]}, "answerKey": "A"}, "an empty choice|IndexError"),
        ({"choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}, "fewer than two choices"),
        ({"choices": {"text": ["a", "b"], "label": ["A", "A"]}, "answerKey": "A"}, "each of choices.text one label"),
        (
            {"choices": {"text": ["a", "b"], "label": ["A", "B", "C"]}, "answerKey": "A"},
            "each of choices.text one label",
        ),
        ({"choices": {"text": ["a"], "label": ["A", "B"]}, "answerKey": "B"}, "no right choice|IndexError"),
    ],
)
def test_a_bad_question_is_named(tmp_path: Path, line: int, changes: dict[str, Any], why: str) -> None:
    """A row that makes no question of the task is an error of the data with file and line, the first row's too."""
    file = write_jsonl(tmp_path / "q.jsonl", spoiled(line, **changes))
    with pytest.raises(DataError, match=why) as caught:
        local_tasks(arc_easy=file)
    assert [problem.where for problem in caught.value.problems] == [f"file://arc_easy:{line}"]


def test_all_bad_questions_are_named_at_once(tmp_path: Path) -> None:
    """Every bad line of the file is in one error."""
    rows = [{**row, "answerKey": "Z"} if number in {2, 5} else row for number, row in enumerate(GOOD, 1)]
    with pytest.raises(DataError) as caught:
        local_tasks(arc_easy=write_jsonl(tmp_path / "q.jsonl", rows))
    assert [problem.where for problem in caught.value.problems] == ["file://arc_easy:2", "file://arc_easy:5"]


@pytest.mark.parametrize(
    ("content", "where", "why"),
    [
        (b'{"id": "a", "question": \n', "file://arc_easy:1", "JSON"),
        (json.dumps(GOOD[0]).encode() + b"\n\xff\xfe\n", "file://arc_easy:2", "UTF-8"),
        (b"", "file://arc_easy", "no questions"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, where: str, why: str) -> None:
    """Broken JSON, broken UTF-8 and an empty file are errors of the data, with the line where there is one."""
    file = tmp_path / "q.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=why) as caught:
        local_tasks(arc_easy=file)
    assert caught.value.problems[0].where.startswith(where)


def test_rows_of_different_types_are_an_error_of_the_data(tmp_path: Path) -> None:
    """A field that is text in one row and an object in another is no crash."""
    with pytest.raises(DataError, match="fields of the same types") as caught:
        local_tasks(arc_easy=write_jsonl(tmp_path / "q.jsonl", spoiled(3, question={"a": 1})))
    assert caught.value.problems[0].where == "file://arc_easy"
