"""The earlier run that the quality gate looks back to: read and checked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.errors import DataError, Problem, SettingsError, VerificationError
from job.evaluation import comparison
from job.records import TaskScores
from job.results.reader import adapter_scores, open_run, read_answers, read_published
from job.storage.open import StorageOptions

SETTING = "gate.baseline"


@dataclass(frozen=True)
class Baseline:
    """An earlier run's adapter: by task, its scores, its records as a file, and id and row hash of each question."""

    run: str
    results: str
    sha256: str
    scores: Mapping[str, TaskScores]
    files: Mapping[str, bytes]
    questions: Mapping[str, Sequence[tuple[str, str]]]

    def compared(self, adapter: Mapping[str, TaskScores]) -> dict[str, Any]:
        """The manifest's record of the baseline, and of how this run's adapter compares with it."""
        tasks = comparison.compare_tasks({task: self.scores[task] for task in adapter}, adapter)
        return {"run": self.run, "results": self.results, "sha256": self.sha256, "tasks": tasks}


def read_baseline(where: str, storage: StorageOptions) -> Baseline:
    """Reads an earlier run.

    Args:
        where: Its folder or its `results.json`, path or URI.
        storage: How to reach its store.

    Raises:
        SettingsError: There is none.
        DataError: It is not what it says.
    """
    try:
        run = read_published(open_run(where, storage))
        answers = read_answers(run)
    except (SettingsError, VerificationError) as error:
        kind = SettingsError if isinstance(error, SettingsError) else DataError
        raise kind([Problem(SETTING, str(problem)) for problem in error.problems]) from None
    return Baseline(
        run=run.id,
        results=where,
        sha256=run.sha256,
        scores=adapter_scores(run, answers),
        files={task: data for task, (data, _) in answers.items()},
        questions={task: [(r.id, r.doc_hash) for r in records] for task, (_, records) in answers.items()},
    )


def check_questions(baseline: Baseline, questions: Mapping[str, Sequence[tuple[str, str]]], metric: str) -> None:
    """Refuses a baseline that this run's answers cannot be paired with.

    Args:
        baseline: It.
        questions: By task: id and row hash of each question of this run.
        metric: The gate's.

    Raises:
        DataError: With what differs, by task.
    """
    wrong = []
    for task, asked in questions.items():
        scores = baseline.scores.get(task)
        if scores is None:
            wrong.append(f"run {baseline.run} was not asked {task}")
        elif list(baseline.questions[task]) != list(asked):
            wrong.append(f"{task}: {_first_difference(baseline.questions[task], asked)}")
        elif metric == "acc_norm" and scores.correct_norm is None:
            wrong.append(f"{task} has no acc_norm")
    _refuse(wrong)


def check_tasks(baseline: Baseline, base: Mapping[str, TaskScores]) -> None:
    """Refuses a baseline that was asked the same questions in other words, as another version of lm-eval may.

    Raises:
        DataError: With the tasks.
    """
    other = [task for task, scores in base.items() if scores.task_hash != baseline.scores[task].task_hash]
    _refuse([f"{task}: run {baseline.run} was asked the same questions in other words" for task in other])


def _first_difference(before: Sequence[tuple[str, str]], now: Sequence[tuple[str, str]]) -> str:
    if len(before) != len(now):
        return f"{len(before)} questions there and {len(now)} here"
    number = next(n for n, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1])
    there, here = before[number][0], now[number][0]
    what = f"{there!r} there and {here!r} here" if there != here else f"{here!r} reads differently there"
    return f"other questions: number {number + 1} is {what}"


def _refuse(wrong: Sequence[str]) -> None:
    if wrong:
        raise DataError([Problem(SETTING, f"{what}, so the two runs cannot be compared") for what in wrong])
