"""Files of questions (JOB_EVAL__DATA): read, used instead of a task's data set, and checked row by row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from job.data.files import find_file
from job.data.formats import Row, RowError, read_rows
from job.errors import DataError, Problem, named_by
from job.evaluation.task_names import MULTIPLE_CHOICE

_EXAMPLES = "examples"


def find_questions(place: str) -> Path:
    """The file of a task's questions. Raises DataError, naming JOB_EVAL__DATA, where there is none that is read."""
    with named_by("JOB_EVAL__DATA"):
        return find_file(place)


def read_questions(path: Path, name: str) -> list[Row]:
    """All rows of a file of questions. Raises DataError with every row that cannot be read."""
    rows = list(read_rows(find_questions(str(path)), name))
    faults = [Problem(row.where, row.what) for row in rows if isinstance(row, RowError)]
    if faults or not rows:
        raise DataError(faults or [Problem(name, "holds no questions")])
    return [row for row in rows if isinstance(row, Row)]


def as_dataset(rows: Sequence[Row], source: str) -> Any:
    """The rows as a data set of `datasets`. Raises DataError where fields are of several types."""
    from datasets import Dataset

    try:
        return Dataset.from_list([row.fields for row in rows])
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError([Problem(source, f"its rows do not have fields of the same types: {error}")]) from error


@contextmanager
def in_their_groups(manager: Any, local: Mapping[str, Any]) -> Iterator[None]:
    """Has lm-eval build its groups with these tasks, from `task_with_rows`, while the context is open."""
    index = manager.task_index
    before = {name: index[name] for name in local}
    index.update({name: replace(before[name], yaml_path=None, cfg=local[name].config_given) for name in local})
    try:
        yield
    finally:
        index.update(before)  # it is kept for the next call


def task_with_rows(
    manager: Any, name: str, rows: Sequence[Row], source: str, examples: Sequence[Row] | None = None
) -> Any:
    """The task of lm-eval, its questions replaced by `rows`, and the examples of its prompts by `examples`.

    `config_given` is what it was made from.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    questions = as_dataset(rows, source)
    config = load_yaml(manager.task_index[name].yaml_path, resolve_func=True)
    split = config.get("test_split") or config.get("validation_split")
    unused = dict.fromkeys(("training_split", "fewshot_split", "validation_split"))
    config |= {**unused, "test_split": split, "custom_dataset": lambda **_: {split: questions}}
    if examples is not None:
        data = {split: questions, _EXAMPLES: as_dataset(examples, f"examples of {name}")}
        config |= {"fewshot_split": _EXAMPLES, "custom_dataset": lambda **_: data}
    try:
        task = manager.load([config])["tasks"][name]
    except Exception as error:  # a task renders its templates on the first row, and these may raise anything
        raise DataError([_misfit(rows[0].where, name, error)]) from error
    task.config_given = config
    return task


def _misfit(where: str, name: str, error: Exception) -> Problem:
    what = f"does not match the task {name}: {type(error).__name__}: {error}"
    return Problem(where, f"{what}; a row needs the fields and values of the task's own data set")


def find_misfits(task: Any, rows: Sequence[Row], source: str) -> Iterator[Problem]:
    """Rows of which the task cannot make a question with one right choice or more."""
    for where, doc in _located(list(task.eval_docs), rows, f"{source}:question"):
        if task.OUTPUT_TYPE != MULTIPLE_CHOICE:
            try:
                fits = task.doc_to_text(doc) != "" or task.OUTPUT_TYPE == "loglikelihood_rolling"
                task.doc_to_target(doc)
            except Exception as error:  # noqa: BLE001 - as below
                yield _misfit(where, task.task_name, error)
            else:
                if not fits:
                    yield Problem(where, f"has no question for {task.task_name}")
            continue
        try:
            text, choices, target = task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc)
            gold = text if task.multiple_input else target
            golds = [
                choices.index(g) if isinstance(g, str) else int(g) for g in (gold if isinstance(gold, list) else [gold])
            ]
            fits = (
                text != "" and len(choices) > 1 and all(choices) and golds and all(0 <= g < len(choices) for g in golds)
            )
        except Exception as error:  # noqa: BLE001 - a task's templates and functions may raise anything
            yield _misfit(where, task.task_name, error)
        else:
            if not fits:
                what = "has no question, fewer than two choices, an empty choice, or no right choice"
                yield Problem(where, f"{what} for {task.task_name}")
            elif not _labelled(doc.get("choices")):
                yield Problem(where, "has a choices.label that does not give each of choices.text one label")


def find_example_misfits(task: Any, examples: Sequence[Row], source: str) -> Iterator[Problem]:
    """Examples that the task's prompts cannot have, or that are questions too.

    lm-eval would show these in their own prompts, with the answer: it expects examples of another split.
    """
    questions, few = {_identity(task, doc) for _, doc in _located(list(task.eval_docs), (), "")}, task.fewshot_cfg
    for where, doc in _located(list(task.fewshot_docs()), examples, f"{source}:example"):
        try:
            task.doc_to_text(doc, few.doc_to_text)
            task.doc_to_target(doc, few.doc_to_target)
            is_asked = _identity(task, doc) in questions
        except Exception as error:  # noqa: BLE001 - as above
            yield _misfit(where, task.task_name, error)
        else:
            if is_asked:
                what = (
                    f"is also a question of {task.task_name}, so its answer would be in the prompt; remove one of them"
                )
                yield Problem(where, what)


def _located(docs: Sequence[Any], rows: Sequence[Row], kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place of each document, and its fields that are given.

    A task may filter rows, and then only a document's number says where it is. The data set fills fields
    that a row lacks with null, which a template would render as "None".
    """
    for number, doc in enumerate(docs):
        where = rows[number].where if len(docs) == len(rows) else f"{kind} {number + 1}"
        yield where, {field: value for field, value in doc.items() if value is not None}


def _identity(task: Any, doc: dict[str, Any]) -> str:
    """What is asked, with its choices: the same of two rows that differ only in what is not asked, such as an id."""
    choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == MULTIPLE_CHOICE else None
    return json.dumps([task.doc_to_text(doc), choices], default=str)


def _labelled(choices: Any) -> bool:
    """Whether choices of ARC's kind, texts next to their labels, have one label each: the answer names one."""
    texts, labels = (choices.get(name) if isinstance(choices, dict) else None for name in ("text", "label"))
    if not isinstance(texts, list) or not isinstance(labels, list):
        return True  # another task's kind
    return len(texts) == len(labels) == len(set(labels))
