"""Files of questions (JOB_EVAL__DATA): read, used instead of a task's data set, and checked row by row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from job.data.files import find_file
from job.data.formats import Row, RowError, read_rows
from job.errors import DataError, Problem, named_by
from job.evaluation.task_names import MULTIPLE_CHOICE

_EXAMPLES = "examples"


def find_questions(location: str) -> Path:
    """The file of a task's questions. Raises DataError, naming JOB_EVAL__DATA, where there is none that is read."""
    with named_by("JOB_EVAL__DATA"):
        return find_file(location)


def read_questions(path: Path, name: str) -> list[Row]:
    """All rows of a file of questions. Raises DataError with every row that cannot be read."""
    rows = list(read_rows(find_questions(str(path)), name))
    faults = [Problem(row.where, row.what) for row in rows if isinstance(row, RowError)]
    if faults or not rows:
        raise DataError(faults or [Problem(name, "holds no questions")])
    return [row for row in rows if isinstance(row, Row)]


def as_dataset(rows: Sequence[Row], source: str) -> Any:
    """The rows as a data set of `datasets`, fields that a row lacks as null.

    Raises:
        DataError: Fields are of several types.
    """
    from datasets import Dataset

    names = dict.fromkeys(name for row in rows for name in row.fields)  # `from_list` takes those of the first row alone
    try:
        return Dataset.from_list([{name: row.fields.get(name) for name in names} for row in rows])
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
    docs = list(task.eval_docs)
    # Some tasks ask nothing: the likeliest of several sentences is the right one (BLiMP).
    silent = task.OUTPUT_TYPE == MULTIPLE_CHOICE and not any(map(partial(_asks, task), docs))
    for where, doc in _located(docs, rows, f"{source}:question"):
        try:
            text, choices, target = _parts(task, doc)
            if task.OUTPUT_TYPE != MULTIPLE_CHOICE:
                fits = text != "" or task.OUTPUT_TYPE == "loglikelihood_rolling"
                fits = fits and (target != "" or task.OUTPUT_TYPE != "loglikelihood")
            else:
                gold = text if task.multiple_input else target
                golds = [
                    choices.index(g) if isinstance(g, str) else int(g)
                    for g in (gold if isinstance(gold, list) else [gold])
                ]
                several = len(choices) > 1 and all(choices)
                fits = (text != "" or silent) and several and golds and all(0 <= g < len(choices) for g in golds)
        except Exception as error:  # noqa: BLE001 - a task's templates and functions may raise anything
            yield _misfit(where, task.task_name, error)
            continue
        if not fits:
            what = "has no question, fewer than two choices, an empty choice, or no right choice"
            what = what if task.OUTPUT_TYPE == MULTIPLE_CHOICE else "has no question, or nothing to answer it with"
            yield Problem(where, f"{what}, for {task.task_name}")
        elif task.OUTPUT_TYPE == MULTIPLE_CHOICE and not _labelled(doc.get("choices")):
            yield Problem(where, "has a choices.label that does not give each of choices.text one label")


def _asks(task: Any, doc: dict[str, Any]) -> bool:
    try:
        return bool(task.doc_to_text(doc) != "")
    except Exception:  # noqa: BLE001 - as in `find_misfits`, which names the row
        return False


def _parts(task: Any, doc: dict[str, Any], fewshot: Any = None) -> tuple[Any, Any, Any]:
    """(question, choices, target) of a document as lm-eval makes them; choices None where the task has none.

    The data set fills fields that a row lacks with null. A template may ask whether such a field is there, but must not
    write it, since it would write "None".

    Args:
        task: The task.
        doc: The document.
        fewshot: The task's `fewshot_cfg`, for a document that is shown as an example; then choices are None.

    Raises:
        Exception: Whatever the task's templates and functions raise; of a field that is null, as if it were missing.
    """
    doc_without_nulls = _without_nulls(doc)
    failure: Exception | None = None
    try:
        made = _made(task, doc_without_nulls, fewshot)
    except Exception as error:  # noqa: BLE001 - raised again below
        failure = error
    if len(doc_without_nulls) < len(doc):
        try:
            made = _made(task, doc, fewshot)
        except Exception as error:  # noqa: BLE001 - as above
            raise failure or error from None
        if any(part is None for part in made[::2]) or _writes_null(task, doc, fewshot, made):
            raise failure or ValueError("a field that is null is written as None")
    elif failure is not None:
        raise failure
    return made


def _writes_null(task: Any, doc: dict[str, Any], fewshot: Any, made: tuple[Any, Any, Any]) -> bool:
    """Whether `made` has the word None more often than with empty texts for the fields that are null."""
    try:
        otherwise = json.dumps(
            _made(task, {field: "" if value is None else value for field, value in doc.items()}, fewshot), default=str
        )
    except Exception:  # noqa: BLE001 - a template that distinguishes null from an empty text
        otherwise = json.dumps(_without_nulls(doc), default=str)
    return json.dumps(made, default=str).count("None") > otherwise.count("None")


def _made(task: Any, doc: dict[str, Any], fewshot: Any) -> tuple[Any, Any, Any]:
    if fewshot is not None:
        return task.doc_to_text(doc, fewshot.doc_to_text), None, task.doc_to_target(doc, fewshot.doc_to_target)
    choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == MULTIPLE_CHOICE else None
    return task.doc_to_text(doc), choices, task.doc_to_target(doc)


def _without_nulls(doc: dict[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in doc.items() if value is not None}


def find_repeated(task: Any, rows: Sequence[Row], source: str) -> list[str]:
    """Where questions of valid rows are that were asked by an earlier row, with the same choices.

    Each counts in every comparison, as if it were new evidence. Texts whose likelihood is measured have no question.
    """
    if task.OUTPUT_TYPE not in {MULTIPLE_CHOICE, "generate_until"}:
        return []
    asked: set[str] = set()
    repeated = []
    for where, doc in _located(list(task.eval_docs), rows, f"{source}:question"):
        question = _identity(task, doc)
        if question in asked:
            repeated.append(where)
        asked.add(question)
    return repeated


def find_example_misfits(task: Any, examples: Sequence[Row], source: str, *, apart: bool = True) -> Iterator[Problem]:
    """Examples that the task's prompts cannot have, or that are questions too.

    lm-eval would show these in their own prompts, with the answer: it expects examples of another split. Where it
    leaves the question itself out of the examples, `apart` is false.
    """
    docs = list(task.eval_docs) if apart else []
    questions = {_identity(task, doc) for doc in docs}
    for where, doc in _located(list(task.fewshot_docs()), examples, f"{source}:example"):
        try:
            _parts(task, doc, task.fewshot_cfg)
            is_asked = apart and _identity(task, doc) in questions
        except Exception as error:  # noqa: BLE001 - as above
            yield _misfit(where, task.task_name, error)
        else:
            if is_asked:
                what = (
                    f"is also a question of {task.task_name}, so its answer would be in the prompt; remove one of them"
                )
                yield Problem(where, what)


def _located(docs: Sequence[Any], rows: Sequence[Row], kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The index of each document, and the document.

    A task may filter rows, and then only a document's number says where it is.
    """
    for number, doc in enumerate(docs):
        yield rows[number].where if len(docs) == len(rows) else f"{kind} {number + 1}", doc


def _identity(task: Any, doc: dict[str, Any]) -> str:
    """What is asked, with its choices: the same of two rows that differ only in what is not asked, such as an id."""
    choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == MULTIPLE_CHOICE else None
    return json.dumps([task.doc_to_text(doc), choices], default=str)


def _labelled(choices: Any) -> bool:
    """Whether choices of ARC's kind, texts beside their labels, have one label each: the answer names one."""
    texts, labels = (choices.get(name) if isinstance(choices, dict) else None for name in ("text", "label"))
    if not isinstance(texts, list) or not isinstance(labels, list):
        return True  # another task's kind
    return len(texts) == len(labels) == len(set(labels))
