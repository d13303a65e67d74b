"""The safety screen: finds the classifier of JOB_DATA__SAFETY_MODEL, and scores training rows and generated answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from job.audit.safety import SETTING, Screen, Texts, unsafe_labels
from job.common.hashing import code_hashes
from job.common.out_of_memory import memory_errors
from job.errors import naming
from job.evaluation.resumable import complete
from job.evaluation.score_cache import ScoreCache, score_conditions
from job.model.device import choose_device
from job.model.files import fingerprint
from job.model.text_classifier import Labels, TextClassifier
from job.records import SafetyRecord
from job.runs.attempt import Attempt
from job.runs.layout import SCORES
from job.settings.schema import Data, Run
from job.stages.progress import counted
from job.storage.hub import download_model, local_model
from job.storage.open import ObjectStore

_CODE = ("job.model.text_classifier", "job.audit.safety")
"""Modules whose code decides a score, besides those of all scores."""


@dataclass(frozen=True)
class SafetyModel:
    """The classifier's files, and the record of it."""

    folder: Path
    record: SafetyRecord


def find_safety_model(data: Data, source: str, model: str) -> SafetyModel:
    """The classifier, downloaded where it is on the hub, and checked as far as its weights are not needed.

    Args:
        data: Revision, labels and threshold.
        source: Hub id, or the path of a copy.
        model: `JOB_DATA__SAFETY_MODEL`, for the record.

    Raises:
        DataError, SettingsError: It is not there, or is no classifier whose labels say what is unsafe.
        Unreachable, AccessDenied: The hub cannot be used.
    """
    with naming(SETTING):
        folder, revision = download_model(source, data.safety_revision)
        labels = check_labels(folder, data)
        return SafetyModel(
            folder, SafetyRecord(model, revision, fingerprint(folder), list(labels), data.unsafe_threshold)
        )


def check_labels(folder: Path, data: Data) -> tuple[str, ...]:
    """The labels of the classifier in a folder that mean unsafe.

    Raises:
        DataError, SettingsError: It is no classifier, or its labels do not say it.
    """
    labels = Labels(folder, SETTING)
    return unsafe_labels(labels.names, data.unsafe_labels, exclusive=labels.exclusive)


def check_local(data: Data) -> None:
    """`check_labels` of a classifier that is named by its path; one on the hub is not looked up.

    Raises:
        DataError, SettingsError: As `check_labels`, or the folder does not exist.
    """
    with naming(SETTING):
        folder = None if data.safety_model is None else local_model(data.safety_model)
    if folder is not None:
        check_labels(folder, data)


def screen_rows(attempt: Attempt, safety: SafetyModel, settings: Run, shared: ObjectStore) -> Screen:
    """A function that scores the rows' texts. The classifier is in memory only while it does.

    Args:
        attempt: Its watchdog is reset, and its count of questions grows, while rows are scored.
        safety: The classifier.
        settings: The device, and the run's id.
        shared: The store that contains all runs: a restart, or another run with the same rows, reuses the scores.
    """
    return partial(_screen, attempt, safety, settings, shared)


@memory_errors("scoring rows with JOB_DATA__SAFETY_MODEL", "take a smaller classifier")
def _screen(attempt: Attempt, safety: SafetyModel, settings: Run, shared: ObjectStore, texts: Texts) -> list[float]:
    sizes = texts.sizes
    conditions = {**score_conditions({"classifier": _facts(safety)}), "classifier code": code_hashes(*_CODE)}
    cache = ScoreCache(shared, SCORES, settings.id, conditions)
    known_chances = cache.load_chances(texts.sha256, sizes)
    with counted(attempt, "rows scored", len(texts)) as on_progress:

        def compute() -> Iterator[tuple[int, list[float]]]:
            if len(known_chances) == len(sizes):
                return
            classifier = _load(safety, settings.device)
            try:
                for number, chunk in enumerate(texts.chunks()):
                    if number not in known_chances:
                        yield number, classifier.scores(chunk, attempt.check_stop)
            finally:
                classifier.release()

        # Every machine of the run scores the same rows; only one of them writes the scores to the store.
        scored = complete(dict(known_chances), compute(), cache if attempt.processes.leads else None, on_progress)
    return [score for number in range(len(sizes)) for score in scored[number]]


def score_answers(safety: SafetyModel, answers: Sequence[str], check_stop: Callable[[], None]) -> list[float]:
    """The probability that each of a few answers is unsafe.

    Computed on the CPU: the GPU then holds the base, and its free memory is needed for training.

    Raises:
        DataError, SettingsError: The classifier cannot be loaded.
    """
    with memory_errors("scoring answers with JOB_DATA__SAFETY_MODEL", "take a smaller classifier"):
        return _load(safety, "cpu").scores(answers, check_stop)


def _load(safety: SafetyModel, device: str) -> TextClassifier:
    labels = Labels(safety.folder, SETTING)
    return TextClassifier(safety.folder, labels, safety.record.unsafe_labels, choose_device(device), SETTING)


def _facts(safety: SafetyModel) -> dict[str, object]:
    """What determines a score: the model's files, and the labels that mean unsafe; not the threshold."""
    return {"sha256": safety.record.sha256, "labels": safety.record.unsafe_labels}
