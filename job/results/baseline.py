"""JOB_GATE__BASELINE: an earlier run to compare with, read and checked before training starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from job.errors import DataError, Problem, SettingsError, VerificationError
from job.evaluation import comparison
from job.log import get_logger
from job.records import TaskScores
from job.results.reader import TaskSamples, open_run, read_published, read_samples, scored_in
from job.storage.open import StorageOptions

SETTING = "JOB_GATE__BASELINE"


@dataclass(frozen=True)
class Baseline:
    """An earlier run's adapter.

    Attributes:
        run: The run's id.
        results: Its results as the user named them.
        sha256: SHA-256 of its manifest.
        tasks: Its samples by task.
        dtype: What they were scored in.
    """

    run: str
    results: str
    sha256: str
    tasks: Mapping[str, TaskSamples]
    dtype: str

    def compared(self, scores: Mapping[str, TaskScores]) -> dict[str, Any]:
        """The manifest's record of the baseline, with the comparison of `scores`, which the gate judges, by task."""
        tasks = comparison.compare_tasks({task: self.tasks[task].scores for task in scores}, scores)
        return {
            "run": self.run,
            "results": self.results,
            "sha256": self.sha256,
            "dtype": self.dtype,
            "tasks": tasks,
        }


def read_baseline(where: str, storage: StorageOptions) -> Baseline:
    """Reads an earlier run.

    Args:
        where: Its folder or its `results.json`, path or URI.
        storage: How to reach its store.

    Raises:
        SettingsError: There is no run there.
        DataError: Its files are not what its manifest says.
    """
    with _naming_setting():
        run = read_published(open_run(where, storage))
        return Baseline(run.id, where, run.sha256, read_samples(run), scored_in(run.results)["dtype"])


def check_run(where: str) -> None:
    """Refuses a path where no published run is.

    Raises:
        SettingsError: There is no run there.
        DataError: Its manifest is missing, or not what the job wrote.
    """
    with _naming_setting():
        read_published(open_run(where))


@contextmanager
def _naming_setting() -> Iterator[None]:
    """Context manager: errors name JOB_GATE__BASELINE, and those about the baseline's files are DataError."""
    try:
        yield
    except (SettingsError, VerificationError) as error:
        kind = SettingsError if isinstance(error, SettingsError) else DataError
        raise kind([Problem(SETTING, str(problem)) for problem in error.problems]) from None


def check_questions(baseline: Baseline, questions: Mapping[str, Sequence[tuple[str, str]]], metric: str) -> None:
    """Refuses a baseline whose questions are not exactly this run's.

    Args:
        baseline: The earlier run.
        questions: By task, (id, row hash) of each question of this run.
        metric: `acc` or `acc_norm`: the gate's.

    Raises:
        DataError: With the first difference of each task.
    """
    faults = []
    for task, own_questions in questions.items():
        earlier = baseline.tasks.get(task)
        if earlier is None:
            faults.append(f"run {baseline.run} was not asked {task}")
        elif earlier.questions != list(own_questions):
            faults.append(f"{task}: {_first_difference(earlier.questions, own_questions)}")
        elif metric == "acc_norm" and earlier.scores.correct_norm is None:
            faults.append(f"{task} has no acc_norm")
    _refuse(faults)


def check_prompts(baseline: Baseline, base: Mapping[str, TaskScores]) -> None:
    """Refuses a baseline with the same questions but other prompts, which another version of lm-eval may make.

    Raises:
        DataError: With the tasks.
    """
    differing_tasks = [
        task for task, scores in base.items() if scores.task_hash != baseline.tasks[task].scores.task_hash
    ]
    _refuse([f"{task}: run {baseline.run} was asked the same questions in another wording" for task in differing_tasks])


def warn_of_other_dtype(baseline: Baseline, dtype: str) -> None:
    """Warns if this run is scored in another dtype than the baseline: the gate's difference then includes theirs."""
    if baseline.dtype != dtype:
        what = "the baseline was scored in another dtype, so what the gate compares includes the difference of the two"
        get_logger().warning(what, setting=SETTING, baseline=baseline.dtype, dtype=dtype)


def _first_difference(baseline_questions: Sequence[tuple[str, str]], own_questions: Sequence[tuple[str, str]]) -> str:
    if len(baseline_questions) != len(own_questions):
        return f"{len(baseline_questions)} questions there and {len(own_questions)} here"
    number = next(n for n, pair in enumerate(zip(baseline_questions, own_questions, strict=True)) if pair[0] != pair[1])
    baseline_id, own_id = baseline_questions[number][0], own_questions[number][0]
    what = (
        f"{baseline_id!r} there and {own_id!r} here" if baseline_id != own_id else f"{own_id!r} reads differently there"
    )
    return f"other questions: number {number + 1} is {what}"


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise DataError([Problem(SETTING, f"{what}, so the two runs cannot be compared") for what in faults])
