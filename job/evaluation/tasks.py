"""lm-eval's tasks: found by name, loaded (with the user's own questions where given), and validated before scoring."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from job.data.files import find_file
from job.data.formats import Row, RowError, read_rows
from job.errors import DataError, Problem, SettingsError, named_by
from job.storage.hub import hub_errors

MULTIPLE_CHOICE = "multiple_choice"


@contextmanager
def compiled_once() -> Iterator[None]:
    """Caches lm-eval's compiled Jinja templates while the context is open.

    lm-eval compiles a template for every use, eight times a question: 8 of 32 ms a question on a CPU.
    """
    from lm_eval.utils import env

    if "from_string" in vars(env):  # the context is open already
        yield
        return
    env.from_string = cache(env.from_string)
    try:
        yield
    finally:
        del env.from_string  # the instance's attribute hid the method of the class


@dataclass(frozen=True)
class Tasks:
    """The loaded tasks, and for each where its questions come from."""

    loaded: Any
    sources: Mapping[str, str]

    def questions(self, limit: int | None) -> dict[str, list[tuple[str, str]]]:
        """By task: id and `doc_hash` of each question, equal to those of its sample."""
        from lm_eval.utils import handle_non_serializable, hash_string

        def row(doc: Any) -> str:
            return json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)

        return {
            name: [
                (question_id(doc, number), hash_string(row(doc)))
                for number, doc in enumerate(islice(task.eval_docs, limit))
            ]
            for name, task in self.loaded["tasks"].items()
        }

    def prompts(self, limit: int | None) -> dict[str, list[str]]:
        """By task, the text of each question as it is asked, in the order of the samples.

        Of tasks with a context for each choice it is all contexts and what follows them.
        """
        with compiled_once():
            return {
                name: [
                    " ".join(part for parts in _parts(task, doc) for part in parts)
                    if task.multiple_input
                    else str(task.doc_to_text(doc))
                    for doc in islice(task.eval_docs, limit)
                ]
                for name, task in self.loaded["tasks"].items()
            }

    def fingerprints(self) -> dict[str, str]:
        """By task, SHA-256 of all its questions, before any limit."""
        return {
            name: hashlib.sha256(
                "\n".join(json.dumps(doc, sort_keys=True, default=str) for doc in task.eval_docs).encode()
            ).hexdigest()
            for name, task in self.loaded["tasks"].items()
        }


@compiled_once()
def load_tasks(names: Sequence[str], data: Mapping[str, Path], sources: Mapping[str, str]) -> Tasks:
    """Loads lm-eval's tasks, from a local file in the task's own schema where one is given.

    Args:
        names: lm-eval's tasks or groups of tasks.
        data: By task, a local file with its questions.
        sources: By task, the name of that file in messages and in the manifest.

    Raises:
        SettingsError: A task is unknown, or does not ask multiple-choice questions with one accuracy.
        DataError: A file does not fit its task.
        Unreachable: A task's questions have to be downloaded from the hub, and it did not answer.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _index((*names, *data))
    _check_names(manager.task_index, names, data)
    rows = {name: _read_questions(data[name], sources[name]) for name in names if name in data}
    local = {name: _with_rows(manager, name, rows[name], sources[name]) for name in rows}
    with hub_errors(f"questions of {', '.join(name for name in names if name not in local)}"):
        loaded = manager.load([local.get(name, name) for name in names])
    tasks = loaded["tasks"]
    if wrong := [problem for name, task in tasks.items() if (problem := _unfit(name, task))]:
        raise SettingsError(wrong)
    if few := [
        Problem(sources[name], "holds one question; a comparison needs two") for name in rows if not rows[name][1:]
    ]:
        raise DataError(few)
    if misfits := [problem for name in rows for problem in _misfits(tasks[name], rows[name], sources[name])]:
        raise DataError(misfits)
    return Tasks(loaded, {name: sources.get(name, str(task.config.dataset_path)) for name, task in tasks.items()})


def check_tasks(names: Sequence[str], data: Iterable[str]) -> None:
    """Refuses unknown tasks and tasks without multiple-choice questions, without fetching anything.

    Args:
        names: Tasks or groups of lm-eval.
        data: Tasks for which the user gives a file of questions.

    Raises:
        SettingsError: With all that is wrong.
    """
    if _are_known(frozenset((*names, *data))):
        return
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    _check_names(_index((*names, *data)).task_index, names, data)


@compiled_once()
def count_questions(tasks: Tasks, tokenizer: Any, limit: int | None) -> tuple[int, int, int]:
    """(questions, tokens in packed sequences, positions at which logits are needed), without scoring anything.

    Raises:
        DataError: The tokenizer makes no tokens of a question or a choice.
    """
    total = tokens = reads = 0
    for task in tasks.loaded["tasks"].values():
        for doc in islice(task.eval_docs, limit):
            choices = [
                len(tokenizer.encode(f" {choice}", add_special_tokens=False)) for choice in task.doc_to_choice(doc)
            ]
            context = len(tokenizer.encode(str(task.doc_to_text(doc))))
            if not context or 0 in choices:
                raise DataError(
                    [Problem(f"question {question_id(doc, total)}", "the tokenizer makes no tokens of a part of it")]
                )
            total += 1
            tokens += context + sum(choices) - len(choices)
            reads += sum(choices)
    return total, tokens, reads


MAX_CHOICES = 1_000
"""Of one question."""
MAX_BYTES = 1 << 20
"""Of one question with its choices, as a row."""
_SLACK_BYTES = 512
"""What a task's template may add to a row, and a tokenizer to its bytes."""


@compiled_once()
def check_lengths(
    tasks: Tasks, tokenizer: Any, *, limit: int | None, max_length: int, cut: bool, vocabulary: int | None
) -> None:
    """Refuses questions that the model cannot score: too long with a choice, too many choices, unknown tokens.

    A token has at least one byte, so most questions are known to fit without being rendered.

    Args:
        tasks: From `load_tasks`.
        tokenizer: The model's.
        limit: The first so many questions of each task; None for all.
        max_length: The most tokens of a question with one of its choices, which is also that of a training example.
        cut: Whether a longer question loses its beginning, as lm-eval has it, instead of being refused.
        vocabulary: Rows of the model's embedding; None if that is not known.

    Raises:
        DataError: With the first 20 of them, and their number.
    """
    problems: list[Problem] = []
    known = len(tokenizer) if vocabulary is None else vocabulary
    for name, task in tasks.loaded["tasks"].items():
        extra = len(str(task.config.description or "").encode()) + _SLACK_BYTES
        for number, doc in enumerate(islice(task.eval_docs, limit)):
            size = len(json.dumps(doc, default=str, ensure_ascii=False).encode(errors="surrogatepass"))
            what = None
            if size + extra > max_length or known < len(tokenizer):
                what = _too_large(task, doc, size) or _too_long(task, doc, tokenizer, max_length, cut=cut)
                what = what or _unknown_token(task, doc, tokenizer, known)
            if what is not None:
                problems.append(Problem(f"{tasks.sources[name]} question {question_id(doc, number)[:80]}", what))
    if problems:
        raise DataError(problems)


def _parts(task: Any, doc: Any) -> tuple[list[str], list[str]]:
    """The contexts of a question, and the continuations of each; some tasks have a context for each choice."""
    choices, text = [str(choice) for choice in task.doc_to_choice(doc)], str(task.doc_to_text(doc))
    return (choices, [text]) if task.multiple_input else ([text], choices)


def _too_large(task: Any, doc: Any, size: int) -> str | None:
    """Why tokenizing a question would take minutes, as a message; None if it would not."""
    if size > MAX_BYTES:
        return f"has {size:,} bytes, {MAX_BYTES:,} are the most"
    count = len(task.doc_to_choice(doc))
    return f"has {count:,} choices, {MAX_CHOICES:,} are the most" if count > MAX_CHOICES else None


def _too_long(task: Any, doc: Any, tokenizer: Any, max_length: int, *, cut: bool) -> str | None:
    """A message if a question has more tokens than are allowed, else None."""
    contexts, endings = _parts(task, doc)
    ending = max(endings, key=len)
    texts = [ending] if cut else [f"{context} {ending}" for context in contexts]
    longest = max(len(tokenizer.encode(text)) for text in texts)
    if longest <= max_length:
        return None
    remedy = "" if cut else "; JOB_EVAL__LONG_QUESTIONS=cut leaves out their beginning, as lm-eval does"
    return f"is {longest} tokens long with its longest choice, {max_length} are allowed (JOB_TRAIN__MAX_LENGTH){remedy}"


def _unknown_token(task: Any, doc: Any, tokenizer: Any, vocabulary: int) -> str | None:
    """A message if a question has a token without an embedding in the model, else None."""
    found = {token for texts in _parts(task, doc) for text in texts for token in tokenizer.encode(text)}
    if (beyond := max(found, default=0)) < vocabulary:
        return None
    word = tokenizer.convert_ids_to_tokens(beyond)
    return f"has the token {word!r} (number {beyond}), and the model has embeddings of {vocabulary} tokens"


@cache
def _are_known(names: frozenset[str]) -> bool:
    """Whether lm-eval has a multiple-choice task of each name in a file of that name; False where that is not certain.

    The files are read without importing lm-eval, which takes over two seconds of CPU time, before a run's first answer.
    """
    spec = find_spec("lm_eval")
    folders = spec.submodule_search_locations if spec else None
    known = set()
    for file in Path(folders[0], "tasks").rglob("*.yaml") if folders else ():
        if file.stem in names:
            try:
                found = yaml.safe_load(file.read_bytes())
            except (OSError, ValueError, yaml.YAMLError):
                continue  # not certain, for instance because of lm-eval's own tags, such as !function
            own = isinstance(found, dict) and found.get("task") == file.stem and not {"class", "group"} & found.keys()
            if own and found.get("output_type") == MULTIPLE_CHOICE:
                known.add(file.stem)
    return known == names


@cache
def _index(names: tuple[str, ...]) -> Any:
    """lm-eval's index of tasks, made from the folders with files of these names only, if that finds all of them.

    A full index reads 14,000 files in six seconds, at every restart; names are checked first, and loaded later.
    """
    from lm_eval import tasks

    root = Path(tasks.__file__).parent
    folders = sorted({file.parent for file in root.rglob("*.yaml") if file.stem in names})
    manager = tasks.TaskManager(include_path=folders, include_defaults=False)
    found = (manager.task_index.get(name) for name in names)
    return manager if all(entry and entry.kind.name == "TASK" for entry in found) else tasks.TaskManager()


def _check_names(index: Mapping[str, Any], names: Sequence[str], data: Iterable[str]) -> None:
    """Raises SettingsError for names that are unknown or not multiple-choice, with the nearest known name."""
    problems = []
    for name in dict.fromkeys([*names, *data]):
        if name not in index:
            near = get_close_matches(name, index, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            problems.append(Problem("JOB_EVAL__TASKS", f"lm-eval has no task {name!r}{hint}"))
        elif (index[name].cfg or {}).get("output_type", MULTIPLE_CHOICE) != MULTIPLE_CHOICE:
            problems.append(Problem("JOB_EVAL__TASKS", f"{name} does not ask multiple-choice questions"))
        elif name in data and index[name].kind.name != "TASK":
            problems.append(Problem("JOB_EVAL__DATA", f"{name} is not one task; give a file for each of its tasks"))
    if problems:
        raise SettingsError(problems)


def _unfit(name: str, task: Any) -> Problem | None:
    """Why the results of a loaded task cannot be paired by question; None if they can."""
    if task.OUTPUT_TYPE != MULTIPLE_CHOICE:
        return Problem("JOB_EVAL__TASKS", f"{name} does not ask multiple-choice questions")
    if "acc" not in {metric["metric"] for metric in task.config.metric_list or []}:
        return Problem("JOB_EVAL__TASKS", f"{name} has no accuracy (acc); choose a task that has")
    return None


def find_questions(place: str) -> Path:
    """The file of a task's questions. Raises DataError, naming JOB_EVAL__DATA, where there is none that is read."""
    with named_by("JOB_EVAL__DATA"):
        return find_file(place)


def _read_questions(path: Path, name: str) -> list[Row]:
    """All rows of a file of questions. Raises DataError with every row that cannot be read."""
    rows = list(read_rows(find_questions(str(path)), name))
    faults = [Problem(row.where, row.what) for row in rows if isinstance(row, RowError)]
    if faults or not rows:
        raise DataError(faults or [Problem(name, "holds no questions")])
    return [row for row in rows if isinstance(row, Row)]


def _with_rows(manager: Any, name: str, rows: Sequence[Row], source: str) -> Any:
    """The task of lm-eval, its questions replaced by `rows`."""
    from datasets import Dataset
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        questions = Dataset.from_list([row.fields for row in rows])
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError([Problem(source, f"its rows do not have fields of the same types: {error}")]) from error
    config = load_yaml(manager.task_index[name].yaml_path, resolve_func=True)
    split = config.get("test_split") or config.get("validation_split")
    unused = dict.fromkeys(("training_split", "fewshot_split", "validation_split"))
    config |= {**unused, "test_split": split, "custom_dataset": lambda **_: {split: questions}}
    try:
        return manager.load([config])["tasks"][name]
    except Exception as error:  # a task renders its templates on the first row, and these may raise anything
        raise DataError([_misfit(rows[0].where, name, error)]) from error


def _misfit(where: str, name: str, error: Exception) -> Problem:
    what = f"does not fit the task {name}: {type(error).__name__}: {error}"
    return Problem(where, f"{what}; a row needs the fields and values of the task's own data set")


def _misfits(task: Any, rows: Sequence[Row], source: str) -> Iterator[Problem]:
    """Rows of which the task cannot make a question with one right choice or more."""
    docs = list(task.eval_docs)
    # a task may filter rows, and then a question's number is all that is known of its place
    locations = (
        [row.where for row in rows]
        if len(docs) == len(rows)
        else [f"{source}:question {n + 1}" for n in range(len(docs))]
    )
    for where, doc in zip(locations, docs, strict=True):
        # The data set fills fields that a row lacks with null, which a template would render as "None".
        given = {field: value for field, value in doc.items() if value is not None}
        try:
            text, choices, target = task.doc_to_text(given), task.doc_to_choice(given), task.doc_to_target(given)
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
                what = "has no question, fewer than two choices, an empty one, or no right one"
                yield Problem(where, f"{what} for {task.task_name}")
            elif not _labelled(given.get("choices")):
                yield Problem(where, "has choices.label that does not name each of choices.text once")


def _labelled(choices: Any) -> bool:
    """Whether choices of ARC's kind, texts beside their labels, have one label each: the answer names one."""
    texts, labels = (choices.get(name) if isinstance(choices, dict) else None for name in ("text", "label"))
    if not isinstance(texts, list) or not isinstance(labels, list):
        return True  # another task's kind
    return len(texts) == len(labels) == len(set(labels))


def question_id(doc: Mapping[str, Any], number: int) -> str:
    """The row's own id, else its number."""
    return str(doc.get("id", number))
