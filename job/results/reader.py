"""Reads a published run from any folder or bucket that a user names; its files are not trusted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pydantic_core import from_json

from job.common.hashing import unsealed
from job.errors import Problem, SettingsError, VerificationError
from job.evaluation import samples
from job.evaluation.samples import Sample
from job.evaluation.task_metrics import measured_from
from job.records import MeasuredScores, TaskScores
from job.results import manifest
from job.runs.layout import RESULTS, answers_key, run_folder
from job.storage.open import ObjectStore, StorageOptions, TooLarge, open_store

MAX_SAMPLES_BYTES = 512 << 20
"""Limit for one task's samples, which are held in memory; several times the largest evaluation known."""
LARGEST_NUMBER = 10**18
"""Largest number in a manifest: far above every size, time and price, and small enough for arithmetic in floats."""
_SHOWN = 3
_UPDATE = "use the newest version of qlora-job"
_LOOKED_AT = 10_000
"""Objects of a store that are looked at for a run, where its own place has none."""


@dataclass(frozen=True)
class PublishedRun:
    """A run's manifest, whose seal was checked, and the store with its other files."""

    store: ObjectStore
    results: dict[str, Any]
    sha256: str

    @property
    def id(self) -> str:
        """The run's id."""
        return str(self.results["run"]["id"])


def open_run(where: str, storage: StorageOptions | None = None) -> ObjectStore:
    """The store of a run, given its folder or the `results.json` in it, as a path or a URI.

    Raises:
        SettingsError: The path or URI, or the options, are invalid.
    """
    return open_store(run_folder(where), storage or StorageOptions())


def read_bytes(store: ObjectStore) -> bytes:
    """The run's `results.json`.

    Raises:
        SettingsError: There is no run here.
        VerificationError: There is one without results, or they are larger than any manifest.
    """
    try:
        stored = store.read(RESULTS)
    except TooLarge as error:
        raise VerificationError([Problem(RESULTS, str(error))]) from None
    if stored is not None:
        return stored.data
    keys = [info.key for info in islice(store.list(), _LOOKED_AT)]
    if run_key := next((key for key in keys if key.count("/") == 1 and key.endswith(f"/{RESULTS}")), None):
        message = (
            "contains runs, but is not a run itself; give one of them, such as "
            f"{store.uri}/{run_key.removesuffix(f'/{RESULTS}')}"
        )
        raise SettingsError([Problem(store.uri, message)])
    if keys:
        message = f"is missing in {store.uri}: the run is not complete (see `qlora-job status`), or it was removed"
        raise VerificationError([Problem(RESULTS, message)])
    what = "is not a run: it does not exist, or is empty; give the folder of a run, or the results.json in it"
    raise SettingsError([Problem(store.uri, what)])


def parse(data: bytes) -> dict[str, Any]:
    """A manifest that fits the schema. The seal is not checked.

    Raises:
        ValueError: It does not, is of a later version, or holds a number beyond `LARGEST_NUMBER`.
    """
    try:
        results = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        what = f"is damaged: no JSON ({error})" if data.strip() else "is empty"
        raise ValueError(f"{what}; copy it again, or start its run again, which repairs it") from None
    if isinstance(results, dict) and results.get("schema_version", manifest.VERSION) != manifest.VERSION:
        version = str(results["schema_version"])[:40]
        raise ValueError(f"is a manifest of version {version}; this job reads version {manifest.VERSION}; {_UPDATE}")
    if (path := _too_large(results)) is not None:
        raise ValueError(f"{path[:200]} is a number above 10^18")
    try:
        manifest.validate(results)
    except ValueError as error:
        lines = [line[:300] for line in str(error).splitlines()]
        newer = f"; {_UPDATE}, in case a later one wrote it" if "Additional properties" in str(error) else ""
        raise ValueError("does not match the schema: " + "; ".join(lines[:_SHOWN]) + newer) from None
    return dict(results)


def _too_large(value: Any, where: str = "") -> str | None:
    """The path of the first number beyond `LARGEST_NUMBER`; None if there is none."""
    if isinstance(value, int | float):
        return where if abs(value) > LARGEST_NUMBER else None
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    paths = (_too_large(part, f"{where}.{name}".lstrip(".")) for name, part in parts)
    return next((path for path in paths if path is not None), None)


def scored_in(results: Mapping[str, Any]) -> dict[str, str]:
    """`dtype` and `sums` of the scores of base and adapter (see `ScoringPrecision`); in older versions training's."""
    precision = results["evaluation"].get("precision")
    if precision is None:
        return dict.fromkeys(("dtype", "sums"), results["model"]["dtype"])
    return {name: precision[name] for name in ("dtype", "sums")}


def read_published(store: ObjectStore) -> PublishedRun:
    """A run's manifest, with schema and seal checked.

    Raises:
        SettingsError: There is no run here.
        VerificationError: The manifest is not what the job wrote.
    """
    data = read_bytes(store)
    try:
        results = parse(data)
        unsealed(data)
    except ValueError as error:
        raise VerificationError([Problem(f"{store.uri}/{RESULTS}", str(error))]) from None
    return PublishedRun(store, results, hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class TaskSamples:
    """The adapter's samples of one task: the published bytes, their content, and the figures that follow."""

    data: bytes
    samples: list[Sample]
    scores: TaskScores

    @property
    def questions(self) -> list[tuple[str, str]]:
        """Id and row hash of each question, in order."""
        return [(sample.id, sample.doc_hash) for sample in self.samples]


def read_samples(run: PublishedRun, side: str = "adapter") -> dict[str, TaskSamples]:
    """By task, the samples of the adapter, or of another side, checked against the hashes of the manifest.

    Raises:
        VerificationError: With everything that is missing, changed or malformed.
    """
    listed = {artifact["path"]: artifact for artifact in run.results["artifacts"]}
    samples_of, problems = {}, []
    for task, claimed in run.results["evaluation"]["tasks"].items():
        path = answers_key(task, side)
        try:
            data = _read_whole(run.store, path, listed.get(path))
            parsed = samples.parse(data)
        except (ValueError, TooLarge) as error:
            problems.append(Problem(f"{run.store.uri}/{path}", str(error)))
        else:
            scores = samples.task_scores(
                parsed,
                task=task,
                source=claimed["source"],
                version=claimed["version"],
                num_fewshot=claimed.get("num_fewshot", 0),
            )
            samples_of[task] = TaskSamples(data, parsed, scores)
    if problems:
        raise VerificationError(problems)
    return samples_of


def read_measured(run: PublishedRun) -> dict[str, MeasuredScores]:
    """By task without choices, the adapter's figures, from samples checked against the hashes of the manifest.

    Raises:
        VerificationError: With everything that is missing, changed or malformed.
    """
    listed = {artifact["path"]: artifact for artifact in run.results["artifacts"]}
    scores_of, problems = {}, []
    for task, claimed in run.results["evaluation"].get("measured", {}).items():
        path = answers_key(task, "adapter")
        try:
            parsed = samples.parse_measured(_read_whole(run.store, path, listed.get(path)))
            scores_of[task] = measured_from(parsed, task, claimed, "adapter")
        except (ValueError, TooLarge) as error:
            problems.append(Problem(f"{run.store.uri}/{path}", str(error)))
    if problems:
        raise VerificationError(problems)
    return scores_of


def _read_whole(store: ObjectStore, path: str, listed: Mapping[str, Any] | None) -> bytes:
    if listed is None:
        raise ValueError("is not among the artifacts of the manifest")
    stored = store.read(path, max_bytes=min(listed["bytes"], MAX_SAMPLES_BYTES))
    if stored is None:
        raise ValueError("is missing")
    if hashlib.sha256(stored.data).hexdigest() != listed["sha256"]:
        raise ValueError("was altered: its SHA-256 is not that of the manifest")
    return stored.data
