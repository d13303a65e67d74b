"""A published file, downloaded from its store and verified by size and SHA-256."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from job.common.hashing import hash_file
from job.errors import DataError, Problem
from job.records import Artifact
from job.storage.open import ObjectStore, TooLarge


def altered(
    store: ObjectStore, artifacts: Iterable[Artifact], folder: Path, check_stop: Callable[[], None] = lambda: None
) -> list[str]:
    """Those of the artifacts, by path, whose bytes are not what was published; they are downloaded below `folder`.

    `check_stop` is called before each.
    """
    paths = []
    for artifact in artifacts:
        check_stop()
        try:
            fetch_artifact(store, artifact, folder).unlink()
        except DataError:
            paths.append(artifact.path)
    return paths


def fetch_artifact(store: ObjectStore, artifact: Artifact, folder: Path) -> Path:
    """Downloads a published file below `folder`, verified.

    Raises:
        DataError: The file is missing, or differs from what was published.
    """
    path = folder / artifact.path
    try:
        store.download(artifact.path, path, max_bytes=artifact.bytes)
    except FileNotFoundError:
        raise DataError([Problem(artifact.path, "was published, but is missing")]) from None
    except (TooLarge, ValueError) as error:
        raise DataError([Problem(artifact.path, f"is damaged: {error}")]) from error
    if hash_file(path) != artifact.sha256:
        raise DataError([Problem(artifact.path, "is damaged: its SHA-256 is not the published one")])
    return path
