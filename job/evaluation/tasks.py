"""lm-eval's tasks: found by name, loaded (with the user's own questions where given), and validated before scoring."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from jinja2.sandbox import SandboxedEnvironment

from job.data.files import find_file
from job.data.formats import Row, RowError, read_rows
from job.errors import DataError, Problem, SettingsError, named_by
from job.evaluation.groups import CHOICE_METRICS, read_groups
from job.evaluation.measured import how_to_generate, metrics_of
from job.evaluation.policy import CHOICES, Policy, check_policy, named
from job.evaluation.task_files import GroupFile, TaskFile, is_task_file, own_tasks, read_task_file
from job.log import get_logger
from job.records import GroupSpec, Metric
from job.storage.hub import hub_errors

MULTIPLE_CHOICE = "multiple_choice"
MEASURED = ("generate_until", "loglikelihood_rolling", "loglikelihood")
"""Kinds of tasks that are measured by metrics of their own, such as exact_match or perplexity: see `measured`."""
KINDS = (MULTIPLE_CHOICE, *MEASURED)
FEWSHOT_SEED = 1234
"""With it the examples in a prompt are drawn; lm-eval's own default."""


@contextmanager
def compiled_once() -> Iterator[None]:
    """Caches lm-eval's compiled Jinja templates while the context is open, and renders them in Jinja's sandbox.

    lm-eval compiles a template for every use, eight times a question: 8 of 32 ms a question on a CPU.
    """
    from lm_eval.utils import env

    if "from_string" in vars(env):  # the context is open already
        yield
        return
    # A template of a user's task file could reach all of Python by its values' attributes; in a sandbox it cannot.
    sandbox = SandboxedEnvironment(loader=env.loader, undefined=env.undefined, keep_trailing_newline=True)
    sandbox.filters.update(env.filters)
    env.from_string = cache(sandbox.from_string)
    try:
        yield
    finally:
        del env.from_string  # the instance's attribute hid the method of the class


@dataclass(frozen=True)
class Tasks:
    """The loaded tasks, and for each where its questions come from."""

    loaded: Any
    sources: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)
    """By task of a user's own file, or of a user's own group, the SHA-256 of the file, or of both."""
    groups: Mapping[str, GroupSpec] = field(default_factory=dict)
    """The groups that have figures of their own."""

    def metrics(self) -> dict[str, dict[str, Metric]]:
        """By task, what is compared, by lm-eval's name of metric and filter, such as `acc,none`."""
        return {name: _named_metrics(task) for name, task in self.loaded["tasks"].items()}

    def only(self, *kinds: str) -> Tasks:
        """The tasks of some kinds, without groups."""
        tasks = {name: task for name, task in self.loaded["tasks"].items() if task.OUTPUT_TYPE in kinds}
        return replace(self, loaded={"tasks": tasks, "groups": {}, "group_map": {}})

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
                name: [_asked(task, doc) for doc in islice(task.eval_docs, limit)]
                for name, task in self.loaded["tasks"].items()
            }

    def fingerprints(self) -> dict[str, str]:
        """By task, SHA-256 of all its questions, before any limit, and of the file that describes the task."""
        return {
            name: hashlib.sha256(
                "\n".join(
                    [json.dumps(doc, sort_keys=True, default=str) for doc in task.eval_docs]
                    + ([self.files[name]] if name in self.files else [])
                ).encode()
            ).hexdigest()
            for name, task in self.loaded["tasks"].items()
        }


@compiled_once()
def load_tasks(
    names: Sequence[str], data: Mapping[str, Path], sources: Mapping[str, str], num_fewshot: int | None = None
) -> Tasks:
    """Loads lm-eval's tasks, from a local file in the task's own schema where one is given, and users' own tasks.

    Args:
        names: lm-eval's tasks or groups of tasks, and files that describe a task (see `task_files`).
        data: By task, a local file with its questions.
        sources: By task, the name of that file in messages and in the manifest.
        num_fewshot: Examples in every prompt; None for as many as each task says. Perplexity tasks have none.

    Raises:
        SettingsError: A task is unknown, has no metric that can be compared, or no examples for its prompts.
        DataError: A file does not fit its task.
        Unreachable: A task's questions have to be downloaded from the hub, and it did not answer.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names, own = _read_files(names)
    _check_data((*names, *_members(own), *_ours(own)), data)
    texts = {name: _read_questions(data[name], sources[name]) for name in data if name in own_tasks()}
    data = {name: path for name, path in data.items() if name not in texts}
    own = [_with_texts(task, texts, sources) for task in own]
    manager = _index((*names, *_members(own), *data))
    _check_names(manager.task_index, (*names, *_members(own)), data)
    if twice := _twice([*names, *(one.name for one in own), *(task.name for task in _member_files(own))]):
        raise SettingsError([Problem("JOB_EVAL__TASKS", f"names {name} twice") for name in twice])
    rows = {name: _read_questions(data[name], sources[name]) for name in (*names, *_members(own)) if name in data}
    local = {name: _with_rows(manager, name, rows[name], sources[name]) for name in rows}
    with hub_errors(f"questions of {', '.join(name for name in (*names, *_members(own)) if name not in local)}"):
        loaded = _load(manager, [*(local.get(name, name) for name in names), *(_built(manager, o, local) for o in own)])
    tasks, rows = loaded["tasks"], rows | texts
    _set_shots(tasks, num_fewshot)
    wrong = [
        problem for name, task in tasks.items() if (problem := _unfit(name, task) or _without_examples(name, task))
    ]
    if wrong:
        raise SettingsError(wrong)
    if few := [
        Problem(sources[name], "holds one question; a comparison needs two") for name in rows if not rows[name][1:]
    ]:
        raise DataError(few)
    if misfits := [problem for name in rows for problem in _misfits(tasks[name], rows[name], sources[name])]:
        raise DataError(misfits)
    users = [*(one for one in own if isinstance(one, TaskFile)), *_member_files(own)]
    places = dict(sources) | {task.name: task.source for task in users}
    files = {task.name: task.sha256 for task in users}
    for group in own:
        if isinstance(group, GroupFile):
            members = loaded["groups"][group.name].get_all_tasks()
            files |= {task.task_name: files.get(task.task_name, "") + group.sha256 for task in members}
    metrics = {name: _named_metrics(task) for name, task in tasks.items()}
    where = {name: places.get(name, str(task.config.dataset_path)) for name, task in tasks.items()}
    return Tasks(loaded, where, files, read_groups(loaded["groups"], metrics))


def _with_texts(
    task: TaskFile | GroupFile, texts: Mapping[str, list[Row]], sources: Mapping[str, str]
) -> TaskFile | GroupFile:
    """A task of this job with the user's own rows, if there are any."""
    if isinstance(task, GroupFile) or task.name not in texts:
        return task
    return replace(task, rows=dict.fromkeys(task.rows, texts[task.name]), source=sources[task.name])


def _read_files(names: Sequence[str]) -> tuple[list[str], list[TaskFile | GroupFile]]:
    """The names of lm-eval's tasks and groups, and what the users' files describe."""
    files = [read_task_file(name) for name in names if is_task_file(name)]
    return [name for name in names if not is_task_file(name)], files


def _ours(own: Sequence[TaskFile | GroupFile]) -> list[str]:
    """The names of tasks that come with this job."""
    return [task.name for task in own if task.name in own_tasks()]


def _members(own: Sequence[TaskFile | GroupFile]) -> list[str]:
    """lm-eval's tasks and groups that users' groups name."""
    return [name for group in own if isinstance(group, GroupFile) for name in group.members if isinstance(name, str)]


def _member_files(own: Sequence[TaskFile | GroupFile]) -> list[TaskFile]:
    """The tasks of files that users' groups name."""
    groups = [group for group in own if isinstance(group, GroupFile)]
    return [task for group in groups for task in group.members if isinstance(task, TaskFile)]


def _built(manager: Any, own: TaskFile | GroupFile, local: Mapping[str, Any]) -> Any:
    """lm-eval's task or group of a user's file. Raises DataError where a template does not fit its first row."""
    from lm_eval.api.group import Group

    if isinstance(own, TaskFile):
        return _from_file(manager, own)
    group = Group.from_config(dict(own.config))
    for member in own.members:
        if isinstance(member, TaskFile):
            group.add(_from_file(manager, member))
            continue
        loaded = _load(manager, [local.get(member, member)])
        for task in [loaded["groups"][member]] if member in loaded["groups"] else loaded["tasks"].values():
            group.add(task)  # of a tag, all its tasks
    return group


def _load(manager: Any, what: list[Any]) -> Any:
    """lm-eval's tasks and groups. Raises SettingsError where a task is named twice, for instance by two groups."""
    try:
        return manager.load(what)
    except ValueError as error:
        if str(error).startswith("Duplicate task"):
            raise SettingsError([Problem("JOB_EVAL__TASKS", f"asks a task twice: {error}")]) from error
        raise


def _named_metrics(task: Any) -> dict[str, Metric]:
    """What is compared of a task, by lm-eval's name of metric and filter."""
    if task.OUTPUT_TYPE != MULTIPLE_CHOICE:
        filters = [one.name for one in task._filters]  # noqa: SLF001 - lm-eval has no public name for them
        return {f"{name},{one}": metric for one in filters for name, metric in metrics_of(task).items()}
    named = {metric["metric"] for metric in task.config.metric_list or []}
    return {name: Metric("mean", True) for name in CHOICE_METRICS if name.partition(",")[0] in named}  # noqa: FBT003


def check_choices(tasks: Tasks, needed_by: Sequence[str]) -> None:
    """Refuses settings that are about the accuracy of choices where no task has any; logs the tasks they leave out.

    Raises:
        SettingsError: With all of them.
    """
    if not tasks.only(MULTIPLE_CHOICE).loaded["tasks"]:
        what = "is about accuracy, and JOB_EVAL__TASKS has no multiple-choice task; add one, or leave this setting out"
        if wrong := [Problem(setting, what) for setting in needed_by]:
            raise SettingsError(wrong)
    others = list(tasks.only(*MEASURED).loaded["tasks"])
    for setting in needed_by if others else ():
        note = "does not judge or score tasks without choices"
        get_logger().info("tasks are left out", setting=setting, tasks=others, why=note)


def check_gate(tasks: Tasks, metric: str, policy: Policy | None, path: str | None, only: str) -> None:
    """Refuses a gate on what the run does not compare.

    Args:
        tasks: From `load_tasks`.
        metric: Of the thresholds, where there is no policy.
        policy: The rules of `path`; None for thresholds, or no gate at all.
        path: The file of the policy.
        only: Why only tasks of choices are compared, if that is so.

    Raises:
        SettingsError: With everything that is wrong.
    """
    known = tasks.metrics() | {name: dict.fromkeys(group.metrics) for name, group in tasks.groups.items()}
    if policy is not None:
        groups = {name: group.tasks for name, group in tasks.groups.items()}
        check_policy(policy, path or "", {name: list(found) for name, found in known.items()}, groups=groups, only=only)
    elif metric not in CHOICES:
        measured = tasks.only(*MEASURED).metrics()
        if only:
            raise SettingsError([Problem("JOB_GATE__METRIC", f"is {metric}, which is not compared there: {only}")])
        having = {name: named(metric, found) for name, found in measured.items()}
        if not any(having.values()):
            has = ", ".join(sorted({name for found in measured.values() for name in found})) or "none"
            what = f"is {metric}, which no task of this run has; tasks without choices have {has}"
            raise SettingsError([Problem("JOB_GATE__METRIC", what)])
        if several := [name for name, found in having.items() if len(found) > 1]:
            which = f"is {metric}, of which {several[0]} has several: {', '.join(having[several[0]])}"
            what = f"{which}; name one of them, or name one for each task in JOB_GATE__POLICY"
            raise SettingsError([Problem("JOB_GATE__METRIC", what)])


def _twice(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _from_file(manager: Any, task: TaskFile) -> Any:
    """A user's own task. Raises DataError where its templates do not fit its first row."""
    splits = {split: _dataset(rows, task.source) for split, rows in task.rows.items()}
    try:
        return manager.load([{**task.config, "custom_dataset": lambda **_: splits}])["tasks"][task.name]
    except Exception as error:  # templates may raise anything, and a field may be of another kind than lm-eval expects
        first = (str(error).splitlines() or [""])[0][:300]
        raise DataError([Problem(task.path, f"is no task of lm-eval: {type(error).__name__}: {first}")]) from error


def _set_shots(tasks: Mapping[str, Any], num_fewshot: int | None) -> None:
    """Sets how many examples each task's prompts have. A text whose perplexity is measured has no prompt."""
    for task in tasks.values():
        own = task.config.num_fewshot or 0
        shots = own if num_fewshot is None else num_fewshot
        task.set_config(key="num_fewshot", value=0 if task.OUTPUT_TYPE == "loglikelihood_rolling" else shots)


def _without_examples(name: str, task: Any) -> Problem | None:
    """Why a task's prompts cannot have their examples; None if they can.

    lm-eval would take the questions themselves, and show a question with its answer in its own prompt.
    """
    if not (shots := task.config.num_fewshot):
        return None
    few = task.fewshot_cfg
    if few.split is None and few.samples is None and not (task.has_training_docs() or task.has_validation_docs()):
        what = f"{name} is asked with {shots} examples, and there are none, only the questions"
        return Problem("JOB_EVAL__NUM_FEWSHOT", f"{what}; 0 asks without examples, which is another task than {name}")
    if (there := len(list(task.fewshot_docs()))) <= shots:
        what = f"{name} is asked with {shots} examples, and there are {there}; one more than that is needed"
        return Problem("JOB_EVAL__NUM_FEWSHOT", what)
    return None


def restart_examples(task: Any) -> None:
    """Has the task draw the same examples as the last time: they are drawn question by question."""
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def check_tasks(names: Sequence[str], data: Iterable[str]) -> None:
    """Refuses unknown tasks and tasks that cannot be compared, without fetching anything.

    Args:
        names: Tasks or groups of lm-eval, or files that describe a task.
        data: Tasks for which the user gives a file of questions.

    Raises:
        SettingsError: With all that is wrong.
        DataError: The data beside a user's own task cannot be read.
    """
    names, own = _read_files(names)
    names += _members(own)
    _check_data((*names, *_ours(own)), data)
    data = [name for name in data if name not in own_tasks()]
    if _are_known(frozenset((*names, *data))):
        return
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    _check_names(_index((*names, *data)).task_index, names, data)


@compiled_once()
def count_questions(tasks: Tasks, tokenizer: Any, limit: int | None) -> tuple[int, int, int]:
    """(questions, tokens in packed sequences, positions at which logits are needed), without scoring anything.

    Of a generated answer the most tokens are counted.

    Raises:
        DataError: The tokenizer makes no tokens of a question or a choice.
    """
    total = tokens = reads = 0
    for task in tasks.loaded["tasks"].values():
        restart_examples(task)
        for doc in islice(task.eval_docs, limit):
            if task.OUTPUT_TYPE != MULTIPLE_CHOICE or task.config.num_fewshot:
                context, answer = _sizes(task, doc, tokenizer)
                total, tokens, reads = total + 1, tokens + context + answer, reads + answer
                continue
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
        restart_examples(task)
        for number, doc in enumerate(islice(task.eval_docs, limit)):
            size = len(json.dumps(doc, default=str, ensure_ascii=False).encode(errors="surrogatepass"))
            what = None
            if task.OUTPUT_TYPE != MULTIPLE_CHOICE or task.config.num_fewshot:
                what = _too_large(task, doc, size) or _does_not_fit(task, doc, tokenizer, max_length, known, cut=cut)
            elif size + extra > max_length or known < len(tokenizer):
                what = _too_large(task, doc, size) or _too_long(task, doc, tokenizer, max_length, cut=cut)
                what = what or _unknown_token(task, doc, tokenizer, known)
            if what is not None:
                problems.append(Problem(f"{tasks.sources[name]} question {question_id(doc, number)[:80]}", what))
    if problems:
        raise DataError(problems)


def _prompt(task: Any, doc: Any) -> str:
    """What a question is asked with, its examples in front."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return str(task.doc_to_target(doc))
    return str(task.fewshot_context(doc, num_fewshot=task.config.num_fewshot or 0))


def _sizes(task: Any, doc: Any, tokenizer: Any) -> tuple[int, int]:
    """Tokens of the prompt, and of all that is predicted after it."""
    context = len(tokenizer.encode(_prompt(task, doc)))
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return 0, context
    if task.OUTPUT_TYPE == "generate_until":
        return context, how_to_generate(task.task_name, task.config.generation_kwargs or {}).max_new_tokens
    endings = task.doc_to_choice(doc) if task.OUTPUT_TYPE == MULTIPLE_CHOICE else [task.doc_to_target(doc)]
    return context, sum(len(tokenizer.encode(f" {ending}", add_special_tokens=False)) for ending in endings)


def _does_not_fit(task: Any, doc: Any, tokenizer: Any, max_length: int, vocabulary: int, *, cut: bool) -> str | None:
    """A message if a prompt with its answer is too long or empty, or has an unknown token, else None.

    A text whose perplexity is measured may have any length: it is read in windows.
    """
    ids = tokenizer.encode(prompt := _prompt(task, doc))
    if not ids or not prompt:
        return "is empty"
    if (beyond := max(ids)) >= vocabulary:
        return f"has the token number {beyond}, and the model has embeddings of {vocabulary} tokens"
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return None
    context, answer = _sizes(task, doc, tokenizer) if task.OUTPUT_TYPE != "generate_until" else (len(ids), 0)
    if task.OUTPUT_TYPE == "generate_until":
        answer = how_to_generate(task.task_name, task.config.generation_kwargs or {}).max_new_tokens
    if answer >= max_length:
        return f"may be answered with {answer} tokens, {max_length} are allowed with the prompt (JOB_TRAIN__MAX_LENGTH)"
    if context + answer <= max_length or cut:
        return None
    remedy = "JOB_EVAL__LONG_QUESTIONS=cut leaves out their beginning, as lm-eval does"
    what = f"is {context} tokens long and may be answered with {answer}, {max_length} are allowed in all"
    return f"{what} (JOB_TRAIN__MAX_LENGTH); {remedy}"


def _asked(task: Any, doc: Any) -> str:
    """The text of a question without examples; of a text whose likelihood is measured, the text."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return str(task.doc_to_target(doc))
    if task.OUTPUT_TYPE == MULTIPLE_CHOICE and task.multiple_input:
        return " ".join(part for parts in _parts(task, doc) for part in parts)
    return str(task.doc_to_text(doc))


def _parts(task: Any, doc: Any) -> tuple[list[str], list[str]]:
    """The contexts of a question, and the continuations of each; some tasks have a context for each choice."""
    choices, text = [str(choice) for choice in task.doc_to_choice(doc)], str(task.doc_to_text(doc))
    return (choices, [text]) if task.multiple_input else ([text], choices)


def _too_large(task: Any, doc: Any, size: int) -> str | None:
    """Why tokenizing a question would take minutes, as a message; None if it would not."""
    if size > MAX_BYTES:
        return f"has {size:,} bytes, {MAX_BYTES:,} are the most"
    count = len(task.doc_to_choice(doc)) if task.OUTPUT_TYPE == MULTIPLE_CHOICE else 0
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


def _check_data(names: Sequence[str], data: Iterable[str]) -> None:
    """Raises SettingsError for questions of tasks that are not asked; the settings do not know the tasks of a file."""
    if other := [name for name in data if name not in names]:
        what = f"gives questions of {', '.join(other)}, and JOB_EVAL__TASKS does not name that task"
        raise SettingsError([Problem("JOB_EVAL__DATA", what)])


def _check_names(index: Mapping[str, Any], names: Sequence[str], data: Iterable[str]) -> None:
    """Raises SettingsError for names that are unknown or of another kind, with the nearest known name."""
    problems = []
    for name in dict.fromkeys([*names, *data]):
        if name not in index:
            near = get_close_matches(name, index, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            problems.append(Problem("JOB_EVAL__TASKS", f"lm-eval has no task {name!r}{hint}"))
        elif (kind := (index[name].cfg or {}).get("output_type", MULTIPLE_CHOICE)) not in KINDS:
            problems.append(Problem("JOB_EVAL__TASKS", f"{name} is of a kind that cannot be evaluated: {kind}"))
        elif name in data and index[name].kind.name != "TASK":
            problems.append(Problem("JOB_EVAL__DATA", f"{name} is not one task; give a file for each of its tasks"))
    if problems:
        raise SettingsError(problems)


def _unfit(name: str, task: Any) -> Problem | None:
    """Why the results of a loaded task cannot be paired by question; None if they can."""
    if task.OUTPUT_TYPE not in KINDS:
        return Problem("JOB_EVAL__TASKS", f"{name} is of a kind that cannot be evaluated: {task.OUTPUT_TYPE}")
    if task.OUTPUT_TYPE != MULTIPLE_CHOICE:
        return _unmeasurable(name, task)
    if "acc" not in {metric["metric"] for metric in task.config.metric_list or []}:
        return Problem("JOB_EVAL__TASKS", f"{name} has no accuracy (acc); choose a task that has")
    return None


def _unmeasurable(name: str, task: Any) -> Problem | None:
    """Why a task without choices cannot be measured; None if it can."""
    if not metrics_of(task):
        named = ", ".join(task.aggregation())
        what = f"{name} has no metric that can be paired by question ({named}); these are averages and perplexities"
        return Problem("JOB_EVAL__TASKS", what)
    if task.OUTPUT_TYPE == "generate_until":
        try:
            how_to_generate(name, task.config.generation_kwargs or {})
        except SettingsError as error:
            return error.problems[0]
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


def _dataset(rows: Sequence[Row], source: str) -> Any:
    """The rows as a data set of `datasets`. Raises DataError where fields are of several types."""
    from datasets import Dataset

    try:
        return Dataset.from_list([row.fields for row in rows])
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError([Problem(source, f"its rows do not have fields of the same types: {error}")]) from error


def _with_rows(manager: Any, name: str, rows: Sequence[Row], source: str) -> Any:
    """The task of lm-eval, its questions replaced by `rows`."""
    from lm_eval.tasks._yaml_loader import load_yaml

    questions = _dataset(rows, source)
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
        if task.OUTPUT_TYPE != MULTIPLE_CHOICE:
            try:
                fits = task.doc_to_text(given) != "" or task.OUTPUT_TYPE == "loglikelihood_rolling"
                task.doc_to_target(given)
            except Exception as error:  # noqa: BLE001 - as below
                yield _misfit(where, task.task_name, error)
            else:
                if not fits:
                    yield Problem(where, f"has no question for {task.task_name}")
            continue
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
