"""Finds lm-eval's tasks by name, loads them (with the user's own questions, if any), and checks them before scoring."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2.sandbox import SandboxedEnvironment

from job.common.formatting import first_line
from job.common.source_list import EXAMPLES
from job.data.formats import Row
from job.errors import DataError, Problem, SettingsError
from job.evaluation.groups import CHOICE_METRICS, read_groups
from job.evaluation.policy import CHOICES, Policy, check_policy, named
from job.evaluation.question_files import (
    as_dataset,
    find_example_misfits,
    find_misfits,
    find_repeated,
    in_their_groups,
    read_questions,
    task_with_rows,
)
from job.evaluation.task_files import GroupFile, TaskFile, own_tasks
from job.evaluation.task_metrics import generation_options, metrics_of
from job.evaluation.task_names import (
    KINDS,
    MEASURED,
    MULTIPLE_CHOICE,
    bundled_task_names,
    check_data,
    check_names,
    member_files,
    members_of,
    open_index,
    read_files,
    without_examples,
)
from job.log import get_logger
from job.records import GroupSpec, Metric
from job.storage.hub_errors import hub_errors

FEWSHOT_SEED = 1234
"""Seed with which the few-shot examples of a prompt are drawn; lm-eval's default."""


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
    """The loaded tasks, and by task the source of its questions."""

    loaded: Any
    sources: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)
    """For tasks of the user's task or group files, or with the user's examples: SHA-256 of these files, by task."""
    groups: Mapping[str, GroupSpec] = field(default_factory=dict)
    """The groups that have aggregate figures."""

    def metrics(self) -> dict[str, dict[str, Metric]]:
        """Task -> lm-eval's name of metric and filter, such as `acc,none` -> the metric that is compared."""
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
        """By task, the text of each question as the model reads it, in the order of the samples.

        If each choice of a task has its own context, the text has all contexts and their continuations.
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
    """Loads lm-eval's tasks, with questions from local files if any are named, and users' own tasks.

    Args:
        names: lm-eval's tasks or groups of tasks, and files that describe a task (see `task_files`).
        data: Task -> local file with its questions, in the task's schema.
        sources: Task -> name of that file in messages and in the manifest.
        num_fewshot: Few-shot examples in every prompt; None for each task's default. Perplexity tasks have none.

    Raises:
        SettingsError: A task is unknown, has no metric that can be compared, or no examples for its prompts.
        DataError: A file does not have the schema of its task.
        Unreachable: A task's questions must be downloaded from the hub, which did not answer.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names, user_tasks = read_files(names)
    data, examples = without_examples(data)
    check_data((*names, *members_of(user_tasks), *bundled_task_names(user_tasks)), data)
    texts = {name: read_questions(data[name], sources[name]) for name in data if name in own_tasks()}
    data = {name: path for name, path in data.items() if name not in texts}
    user_tasks = [_with_texts(task, texts, sources) for task in user_tasks]
    manager = open_index((*names, *members_of(user_tasks), *data))
    check_names(manager.task_index, (*names, *members_of(user_tasks)), data)
    if twice := _twice(
        [*names, *(user_task.name for user_task in user_tasks), *(task.name for task in member_files(user_tasks))]
    ):
        raise SettingsError([Problem("JOB_EVAL__TASKS", f"names {name} twice") for name in twice])
    rows = {name: read_questions(data[name], sources[name]) for name in data}
    examples_of = {name: read_questions(path, sources[name + EXAMPLES]) for name, path in examples.items()}
    local = {name: task_with_rows(manager, name, rows[name], sources[name], examples_of.get(name)) for name in rows}
    missing = [name for name in (*names, *members_of(user_tasks)) if name not in local]
    with hub_errors(f"questions of {', '.join(missing)}"), in_their_groups(manager, local):
        loaded = _load(
            manager, [*(local.get(name, name) for name in names), *(_built(manager, o, local) for o in user_tasks)]
        )
    tasks, rows = loaded["tasks"], rows | texts
    _set_shots(tasks, num_fewshot)
    wrong = [
        problem for name, task in tasks.items() if (problem := _unfit(name, task) or _without_examples(name, task))
    ]
    if wrong:
        raise SettingsError(wrong)
    if few := [
        Problem(sources[name], "has one question; a comparison needs two") for name in rows if not rows[name][1:]
    ]:
        raise DataError(few)
    misfits = [problem for name in rows for problem in find_misfits(tasks[name], rows[name], sources[name])]
    for name in () if misfits else examples_of:
        misfits += find_example_misfits(tasks[name], examples_of[name], sources[name + EXAMPLES])
    users = [*(user_task for user_task in user_tasks if isinstance(user_task, TaskFile)), *member_files(user_tasks)]
    for user in (user for user in users if user.name not in rows):
        misfits += _file_misfits(tasks[user.name], user)
    if misfits:
        raise DataError(misfits)
    _warn_of_repeated(tasks, rows, sources, users)
    if unshown := [problem for name, task in tasks.items() if (problem := _without_prompt(name, task))]:
        raise SettingsError(unshown)
    source_by_task = dict(sources) | {task.name: task.source for task in users}
    files = {task.name: task.sha256 for task in users} | {name: _hash(rows) for name, rows in examples_of.items()}
    for group in user_tasks:
        if isinstance(group, GroupFile):
            members = loaded["groups"][group.name].get_all_tasks()
            files |= {task.task_name: files.get(task.task_name, "") + group.sha256 for task in members}
    metrics = {name: _named_metrics(task) for name, task in tasks.items()}
    where = {name: source_by_task.get(name, str(task.config.dataset_path)) for name, task in tasks.items()}
    return Tasks(loaded, where, files, read_groups(loaded["groups"], metrics))


def _with_texts(
    task: TaskFile | GroupFile, texts: Mapping[str, list[Row]], sources: Mapping[str, str]
) -> TaskFile | GroupFile:
    """One of this project's tasks, with the user's own rows if there are any."""
    if isinstance(task, GroupFile) or task.name not in texts:
        return task
    return replace(task, rows=dict.fromkeys(task.rows, texts[task.name]), source=sources[task.name])


def _built(manager: Any, user_task: TaskFile | GroupFile, local: Mapping[str, Any]) -> Any:
    """lm-eval's task or group from a user's file. Raises DataError if a template fails on the first row."""
    from lm_eval.api.group import Group

    if isinstance(user_task, TaskFile):
        return _from_file(manager, user_task)
    group = Group.from_config(dict(user_task.config))
    for member in user_task.members:
        if isinstance(member, TaskFile):
            group.add(_from_file(manager, member))
            continue
        loaded = _load(manager, [local.get(member, member)])
        for task in [loaded["groups"][member]] if member in loaded["groups"] else loaded["tasks"].values():
            group.add(task)  # a tag names several tasks
    return group


def _load(manager: Any, names: list[Any]) -> Any:
    """lm-eval's tasks and groups. Raises SettingsError if a task is named twice, for example by two groups."""
    try:
        return manager.load(names)
    except ValueError as error:
        if str(error).startswith("Duplicate task"):
            raise SettingsError([Problem("JOB_EVAL__TASKS", f"names a task twice: {error}")]) from error
        raise


def _named_metrics(task: Any) -> dict[str, Metric]:
    """The metrics of a task that are compared, by lm-eval's name of metric and filter."""
    if task.OUTPUT_TYPE != MULTIPLE_CHOICE:
        filters = [one.name for one in task._filters]  # noqa: SLF001 - lm-eval has no public name for them
        return {f"{name},{one}": metric for one in filters for name, metric in metrics_of(task).items()}
    named = {metric["metric"] for metric in task.config.metric_list or []}
    return {name: Metric("mean", True) for name in CHOICE_METRICS if name.partition(",")[0] in named}  # noqa: FBT003


def check_choices(tasks: Tasks, needed_by: Sequence[str]) -> None:
    """Refuses settings about the accuracy of choices if no task has choices; logs tasks that such settings leave out.

    Raises:
        SettingsError: With all these settings.
    """
    if not tasks.only(MULTIPLE_CHOICE).loaded["tasks"]:
        what = "is about accuracy, and JOB_EVAL__TASKS has no multiple-choice task; add one, or remove this setting"
        if wrong := [Problem(setting, what) for setting in needed_by]:
            raise SettingsError(wrong)
    others = list(tasks.only(*MEASURED).loaded["tasks"])
    for setting in needed_by if others else ():
        note = "does not judge or score tasks without choices"
        get_logger().info("tasks are left out", setting=setting, tasks=others, why=note)


def check_gate(tasks: Tasks, metric: str, policy: Policy | None, path: str | None, only: str) -> None:
    """Refuses a gate on metrics that the run does not compare.

    Args:
        tasks: From `load_tasks`.
        metric: JOB_GATE__METRIC; not used with a policy.
        policy: The rules in the file `path`; None for thresholds, or no gate.
        path: The file of the policy.
        only: Why only multiple-choice tasks are compared; empty if all tasks are.

    Raises:
        SettingsError: With all problems.
    """
    compared = tasks.metrics() | {name: dict.fromkeys(group.metrics) for name, group in tasks.groups.items()}
    if policy is not None:
        groups = {name: group.tasks for name, group in tasks.groups.items()}
        names = {name: list(metrics) for name, metrics in compared.items()}
        check_policy(policy, path or "", names, groups=groups, only=only)
    elif metric not in CHOICES:
        measured = tasks.only(*MEASURED).metrics()
        if only:
            raise SettingsError([Problem("JOB_GATE__METRIC", f"is {metric}, which is not compared there: {only}")])
        matching = {name: named(metric, metrics) for name, metrics in measured.items()}
        if not any(matching.values()):
            has = ", ".join(sorted({name for metrics in measured.values() for name in metrics})) or "none"
            message = f"is {metric}, which no task of this run has; tasks without choices have {has}"
            raise SettingsError([Problem("JOB_GATE__METRIC", message)])
        if several := [name for name, names in matching.items() if len(names) > 1]:
            which = f"is {metric}, of which {several[0]} has several: {', '.join(matching[several[0]])}"
            message = f"{which}; name one of them, or name one for each task in JOB_GATE__POLICY"
            raise SettingsError([Problem("JOB_GATE__METRIC", message)])


def _hash(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps([row.fields for row in rows], sort_keys=True, default=str).encode()).hexdigest()


def _twice(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _from_file(manager: Any, task: TaskFile) -> Any:
    """A user's own task. Raises DataError if a template fails on the first row."""
    splits = {split: as_dataset(rows, task.source) for split, rows in task.rows.items()}
    try:
        loaded = manager.load([{**task.config, "custom_dataset": lambda **_: splits}])["tasks"][task.name]
        for one in (one for chain in loaded._filters for one in chain.filters):  # noqa: SLF001 - as in `_named_metrics`
            one()  # lm-eval makes a filter, with its arguments, when the answers are there
    except Exception as error:  # templates may raise anything, and a field may be of another kind than lm-eval expects
        first = first_line(error, 300)
        raise DataError([Problem(task.path, f"is not a task of lm-eval: {type(error).__name__}: {first}")]) from error
    return loaded


def _file_misfits(task: Any, user: TaskFile) -> Iterator[Problem]:
    """Rows of a task file of which the task cannot make questions, or examples where its prompts have some."""
    split = _scored_split(task)
    yield from find_misfits(task, user.rows[split], user.source)
    few = task.fewshot_cfg
    if not task.config.num_fewshot or few.samples is not None:
        return
    left_out = few.split == task.config.test_split  # then lm-eval never shows a question as its own example
    if few.split != split:
        examples = user.rows.get(few.split or task.config.training_split, ())
        yield from find_example_misfits(task, examples, user.path, apart=not left_out)
    elif not left_out:
        what = f"takes the examples of its prompts from the split of its questions, {split}: a question would be shown"
        yield Problem(user.path, f"{what} with its answer; name that split as test_split instead of validation_split")


def _scored_split(task: Any) -> str:
    return str(task.config.test_split or task.config.validation_split)


def _warn_of_repeated(
    tasks: Mapping[str, Any],
    rows_of: Mapping[str, Sequence[Row]],
    sources: Mapping[str, str],
    users: Sequence[TaskFile],
) -> None:
    """Logs that files ask questions more than once; benchmarks of the hub are taken as they are.

    Args:
        tasks: The tasks by name.
        rows_of: Task -> the rows of its file in JOB_EVAL__DATA.
        sources: Task -> name of that file.
        users: The tasks of users' files.
    """
    of_files = [(name, rows, sources[name]) for name, rows in rows_of.items()]
    own = [user for user in users if user.name not in rows_of]
    of_files += [(user.name, user.rows[_scored_split(tasks[user.name])], user.source) for user in own]
    for name, rows, source in of_files:
        if repeated := find_repeated(tasks[name], rows, source):
            what = "questions are asked more than once, and each time counts in the comparisons; remove the others"
            get_logger().warning(what, task=name, questions=len(rows), repeated=len(repeated), first=repeated[0])


def _set_shots(tasks: Mapping[str, Any], num_fewshot: int | None) -> None:
    """Sets the number of few-shot examples of each task; 0 for perplexity tasks, which have no prompts."""
    for task in tasks.values():
        own = task.config.num_fewshot or 0
        shots = own if num_fewshot is None else num_fewshot
        task.set_config(key="num_fewshot", value=0 if task.OUTPUT_TYPE == "loglikelihood_rolling" else shots)


def _without_examples(name: str, task: Any) -> Problem | None:
    """The problem of a task that has no few-shot examples for its prompts; None if there is none.

    lm-eval would take the questions themselves, and show a question with its answer in its own prompt.
    """
    if not (shots := task.config.num_fewshot):
        return None
    few = task.fewshot_cfg
    if few.split is None and few.samples is None and not (task.has_training_docs() or task.has_validation_docs()):
        message = f"{name} is asked with {shots} examples, but its data has only questions"
        give = f"give a file of examples, JOB_EVAL__DATA={name}{EXAMPLES}=..."
        return Problem(
            "JOB_EVAL__NUM_FEWSHOT",
            f"{message}; {give}; 0 asks without examples, which gives other figures than {name}'s default",
        )
    if (there := len(list(task.fewshot_docs()))) <= shots:
        message = f"{name} is asked with {shots} examples, and there are {there}; one more than that is needed"
        return Problem("JOB_EVAL__NUM_FEWSHOT", message)
    return None


def _without_prompt(name: str, task: Any) -> Problem | None:
    """The problem of a task of whose examples lm-eval makes no prompt, such as one with several right answers each."""
    shots = task.config.num_fewshot
    try:
        if shots:
            task.fewshot_context(next(iter(task.eval_docs)), num_fewshot=shots)
    except Exception as error:  # noqa: BLE001 - a task's templates and functions may raise anything
        said = f"{type(error).__name__}: {first_line(error)}"
        what = f"lm-eval cannot ask {name} with {shots} examples ({said}); 0 asks without examples"
        return Problem("JOB_EVAL__NUM_FEWSHOT", what)
    return None


def restart_examples(task: Any) -> None:
    """Has the task draw the same examples as the last time: they are drawn question by question."""
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _asked(task: Any, doc: Any) -> str:
    """The text of a question without examples; of a text whose likelihood is measured, the text."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return str(task.doc_to_target(doc))
    if task.OUTPUT_TYPE == MULTIPLE_CHOICE and task.multiple_input:
        return " ".join(part for parts in text_parts(task, doc) for part in parts)
    return str(task.doc_to_text(doc))


def text_parts(task: Any, doc: Any) -> tuple[list[str], list[str]]:
    """The contexts of a question without examples, and the continuations of each.

    Some tasks have a context for each choice (Winogrande); their `doc_to_text` is the number of the right one.
    """
    choices = [str(choice) for choice in task.doc_to_choice(doc)]
    if task.multiple_input:
        return choices, [str(task.doc_to_target(doc))]
    return [str(task.doc_to_text(doc))], choices


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
            generation_options(name, task.config.generation_kwargs or {})
        except SettingsError as error:
            return error.problems[0]
    return None


def question_id(doc: Mapping[str, Any], number: int) -> str:
    """The row's own id, else its number."""
    return str(doc.get("id", number))
