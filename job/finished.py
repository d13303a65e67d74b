"""A finished run, wherever it lies: its manifest, and its files, of which every byte is checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job import manifest
from job.errors import DataError, Problem, SettingsError
from job.hashes import hash_file
from job.objects import ObjectStore, TooLarge, open_store
from job.records import Artifact

RESULTS = "results.json"


@dataclass(frozen=True)
class Finished:
    """A run's store, and what its manifest says."""

    store: ObjectStore
    results: dict[str, Any]


def open_finished(where: str, **storage_options: Any) -> Finished:
    """The finished run at `where`: its folder (path or `s3://` URI), or the `results.json` in it.

    Raises:
        SettingsError: There is no finished run.
        DataError: Its manifest is not one.
    """
    folder, _, name = where.rpartition("/")
    store = open_store((folder or ".") if name == RESULTS else where, **storage_options)
    stored = store.read(RESULTS)
    if stored is None:
        raise SettingsError([Problem(where, f"there is no {RESULTS}: the run is not finished, or lies elsewhere")])
    try:
        results: dict[str, Any] = json.loads(stored.data)
        manifest.validate(results)
    except ValueError as error:
        problems = [Problem(f"{store.uri}/{RESULTS}", line) for line in str(error).splitlines()]
        raise DataError(problems) from error
    return Finished(store, results)


def fetch_artifact(store: ObjectStore, artifact: Artifact, folder: Path) -> Path:
    """Downloads a published file below `folder`, verified.

    Raises:
        DataError: It is gone, or not what was published.
    """
    path = folder / artifact.path
    try:
        store.download(artifact.path, path, max_bytes=artifact.bytes)
    except FileNotFoundError:
        raise DataError([Problem(artifact.path, "was published and is gone")]) from None
    except (TooLarge, ValueError) as error:
        raise DataError([Problem(artifact.path, f"is not what was published: {error}")]) from error
    if hash_file(path) != artifact.sha256:
        raise DataError([Problem(artifact.path, "is not what was published: its SHA-256 differs")])
    return path
