"""Names of tasks: unknown and unsupported tasks are refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from job.errors import SettingsError
from job.evaluation import task_names
from job.evaluation.task_names import check_tasks
from job.evaluation.tasks import load_tasks
from tests.helpers import arc_rows, write_jsonl
from tests.unit.evaluation.example_tasks import local_tasks

pytestmark = [
    pytest.mark.usefixtures("one_index"),
    # lm-eval 0.4.13 calls parts of itself by names that it has deprecated
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lm_eval.*"),
]


@pytest.mark.parametrize(
    ("names", "problems"),
    [
        (["arc_easi"], [("JOB_EVAL__TASKS", "lm-eval has no task 'arc_easi'; did you mean 'arc_easy'?")]),
        (
            ["arc_easy", "my_task"],  # like xlsum_tasks, a little
            [
                (
                    "JOB_EVAL__TASKS",
                    (
                        "lm-eval has no task 'my_task'; a task of your own is given by the path of its YAML file, "
                        "such as my_task.yaml"
                    ),
                )
            ],
        ),
        (
            ["no.yaml"],
            [
                (
                    "JOB_EVAL__TASKS",
                    "no.yaml cannot be read: No such file or directory; lm-eval's own tasks have no suffix",
                )
            ],
        ),
    ],
)
def test_tasks_that_cannot_be_asked_are_refused(names: list[str], problems: list[tuple[str, str]]) -> None:
    """An unknown task, with the nearest known one, and a file that is not there: all named, before any download."""
    with pytest.raises(SettingsError) as caught:
        load_tasks(names, {}, {})
    assert [(problem.where, problem.what) for problem in caught.value.problems] == problems


def test_simple_tasks_are_known_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task whose file says all of it is found without the import of lm-eval, which looks up all others."""
    asked: list[Any] = []

    def look_up(names: tuple[str, ...]) -> Any:
        asked.append(names)
        raise SettingsError([])

    monkeypatch.setattr(task_names, "open_index", look_up)
    check_tasks(["arc_easy"], {"arc_easy": "questions.jsonl"})
    assert not asked
    # asks otherwise, a group, with functions, with another file, unknown
    others = ["gsm8k", "ai2_arc", "hellaswag", "arc_challenge", "arc_easi"]
    for name in others:
        with pytest.raises(SettingsError):
            check_tasks(["arc_easy", name], {})
    assert [names[1] for names in asked] == others


def test_a_file_for_a_group_of_tasks_is_refused(tmp_path: Path) -> None:
    """A file serves one task: which of a group's tasks it would be for is not guessed."""
    file = write_jsonl(tmp_path / "q.jsonl", arc_rows(4))
    with pytest.raises(
        SettingsError, match=r"JOB_EVAL__DATA: ai2_arc is a group of tasks; give a file for each of its tasks"
    ):
        local_tasks(ai2_arc=file)


def problems_of(names: Sequence[str]) -> str:
    """What is wrong with these tasks."""
    with pytest.raises(SettingsError) as caught:
        load_tasks(names, {}, {})
    return str(caught.value)


def test_good_tasks_are_not_named_beside_bad_ones() -> None:
    """Only what is wrong is in the message."""
    assert "arc_easy" not in problems_of(["arc_easy", "§"])
