"""What the names in JOB_EVAL__TASKS refer to: lm-eval's tasks and groups, and tasks in users' files.

No task is loaded here, so that wrong names are found before a run begins.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import yaml

from job.common.source_list import EXAMPLES
from job.errors import Problem, SettingsError
from job.evaluation.task_files import GroupFile, TaskFile, is_task_file, own_tasks, read_task_file

MULTIPLE_CHOICE = "multiple_choice"
MEASURED = ("generate_until", "loglikelihood_rolling", "loglikelihood")
"""Kinds of tasks without choices, with metrics such as exact_match or perplexity: see `task_metrics`."""
_NEAR = 0.75
"""Similarity of a mistyped name to a task that is suggested; among thousands, one of less is usually another thing."""
T = TypeVar("T")
KINDS = (MULTIPLE_CHOICE, *MEASURED)


def read_files(names: Sequence[str]) -> tuple[list[str], list[TaskFile | GroupFile]]:
    """The names of lm-eval's tasks and groups, and what the users' files describe."""
    files = [read_task_file(name) for name in names if is_task_file(name)]
    return [name for name in names if not is_task_file(name)], files


def bundled_task_names(user_tasks: Sequence[TaskFile | GroupFile]) -> list[str]:
    """The names of tasks that come with this job."""
    return [task.name for task in user_tasks if task.name in own_tasks()]


def members_of(user_tasks: Sequence[TaskFile | GroupFile]) -> list[str]:
    """lm-eval's tasks and groups that users' groups name."""
    return [
        name for group in user_tasks if isinstance(group, GroupFile) for name in group.members if isinstance(name, str)
    ]


def member_files(user_tasks: Sequence[TaskFile | GroupFile]) -> list[TaskFile]:
    """The tasks of files that users' groups name."""
    groups = [group for group in user_tasks if isinstance(group, GroupFile)]
    return [task for group in groups for task in group.members if isinstance(task, TaskFile)]


def check_tasks(names: Sequence[str], data: Iterable[str]) -> None:
    """Refuses unknown tasks and tasks that cannot be compared, without fetching anything.

    Args:
        names: Tasks or groups of lm-eval, or files that describe a task.
        data: Tasks for which the user gives a file of questions.

    Raises:
        SettingsError: With all that is wrong.
        DataError: The data next to a user's own task cannot be read.
    """
    names, own = read_files(names)
    names += members_of(own)
    data, _ = without_examples(dict.fromkeys(data))
    check_data((*names, *bundled_task_names(own)), data)
    data = [name for name in data if name not in own_tasks()]
    if _are_known(frozenset((*names, *data))):
        return
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    check_names(open_index((*names, *data)).task_index, names, data)


@cache
def _are_known(names: frozenset[str]) -> bool:
    """Whether lm-eval has a multiple-choice task of each name in a file of that name; False where that is not certain.

    The files are read without importing lm-eval, which takes over two seconds of CPU time, before a run's first answer.
    """
    spec = find_spec("lm_eval")
    folders = spec.submodule_search_locations if spec else None
    found_names = set()
    for file in Path(folders[0], "tasks").rglob("*.yaml") if folders else ():
        if file.stem in names:
            try:
                content = yaml.safe_load(file.read_bytes())
            except (OSError, ValueError, yaml.YAMLError):
                continue  # not certain, for instance because of lm-eval's own tags, such as !function
            own = (
                isinstance(content, dict)
                and content.get("task") == file.stem
                and not {"class", "group"} & content.keys()
            )
            if own and content.get("output_type") == MULTIPLE_CHOICE:
                found_names.add(file.stem)
    return found_names == names


def import_tasks() -> None:
    """Imports lm-eval's tasks, which import datasets: half a second."""
    import lm_eval.tasks  # noqa: F401


@cache
def open_index(names: tuple[str, ...]) -> Any:
    """lm-eval's index of tasks, made from the folders with files of these names only, if that finds all of them.

    A full index reads 14,000 files in six seconds, at every restart; names are checked first, and loaded later.
    """
    from lm_eval import tasks

    root = Path(tasks.__file__).parent
    folders = sorted({file.parent for file in root.rglob("*.yaml") if file.stem in names})
    manager = tasks.TaskManager(include_path=folders, include_defaults=False)
    entries = (manager.task_index.get(name) for name in names)
    return manager if all(entry and entry.kind.name == "TASK" for entry in entries) else tasks.TaskManager()


def tasks_of(index: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """The tasks that names of lm-eval refer to: tasks, and those of groups and tags, also of nested ones."""
    pending = list(names)
    tasks: set[str] = set()
    visited: set[str] = set()
    while pending:
        name = pending.pop()
        if name in visited or name not in index:
            continue
        visited.add(name)
        entry = index[name]
        if entry.kind.name not in {"GROUP", "TAG"}:
            tasks.add(name)
            continue
        members = entry.tags if entry.kind.name == "TAG" else (entry.cfg or {}).get("task")
        members = [members] if isinstance(members, str) else members or []
        pending += [str(one.get("group") or one.get("task")) if isinstance(one, dict) else str(one) for one in members]
    return tasks


def without_examples(data: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """JOB_EVAL__DATA by task: files of questions, and files of examples for the prompts.

    Raises:
        SettingsError: Examples of a task whose questions are not given.
    """
    questions = {name: value for name, value in data.items() if not name.endswith(EXAMPLES)}
    examples = {name.removesuffix(EXAMPLES): value for name, value in data.items() if name.endswith(EXAMPLES)}
    if unasked := [name for name in examples if name not in questions or name in own_tasks()]:
        what = f"gives examples of {', '.join(unasked)}, and no questions of lm-eval's task of that name; give both"
        raise SettingsError([Problem("JOB_EVAL__DATA", what)])
    return questions, examples


def check_data(names: Sequence[str], data: Iterable[str]) -> None:
    """Raises SettingsError for questions of tasks that are not asked; the settings do not know the tasks of a file.

    Tasks of lm-eval's groups are asked where the group is. Its whole index is read only for these.
    """
    unnamed = [name for name in data if name not in names]
    if unnamed:
        inside = tasks_of(open_index((*names, *unnamed)).task_index, names)
        unnamed = [name for name in unnamed if name not in inside]
    if unnamed:
        what = f"gives questions of {', '.join(unnamed)}, and JOB_EVAL__TASKS does not name that task"
        raise SettingsError([Problem("JOB_EVAL__DATA", f"{what}; add it there, or remove its file")])


def check_names(index: Mapping[str, Any], names: Sequence[str], data: Iterable[str]) -> None:
    """Raises SettingsError for names that are unknown or of another kind, with the nearest known name."""
    problems = []
    for name in dict.fromkeys([*names, *data]):
        if name not in index:
            near = get_close_matches(name, index, n=1, cutoff=_NEAR)
            own = "; a task of your own is given by the path of its YAML file, such as my_task.yaml"
            hint = f"; did you mean {near[0]!r}?" if near else own
            problems.append(Problem("JOB_EVAL__TASKS", f"lm-eval has no task {name!r}{hint}"))
        elif (kind := (index[name].cfg or {}).get("output_type", MULTIPLE_CHOICE)) not in KINDS:
            problems.append(Problem("JOB_EVAL__TASKS", f"{name} is of a kind that cannot be evaluated: {kind}"))
        elif name in data and index[name].kind.name != "TASK":
            problems.append(Problem("JOB_EVAL__DATA", f"{name} is a group of tasks; give a file for each of its tasks"))
    if problems:
        raise SettingsError(problems)
