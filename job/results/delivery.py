"""Copies results from the store to the folders from which a platform collects them, once the run is complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job import log
from job.common.hashing import hash_file
from job.errors import DataError, Problem
from job.platforms.detect import Delivery
from job.runs.layout import ARTIFACTS, REPORT, RESULTS
from job.storage.open import ObjectStore, check_key


def deliver(store: ObjectStore, results: Mapping[str, Any], folders: Delivery) -> None:
    """Copies a complete run: adapter, exports, results and report to `folders.model`, all else to `folders.data`.

    The adapter goes to the top of `model`, where tools that load or serve a model look for it, and an exported format
    into a folder of its name there.

    Raises:
        DataError: An artifact is missing, or not what the manifest says.
    """
    problems = []
    for artifact in results["artifacts"]:
        target = _delivered_path(artifact["path"], folders)
        try:
            store.download(artifact["path"], target, max_bytes=artifact["bytes"])
        except FileNotFoundError:
            problems.append(Problem(artifact["path"], "is in the manifest, but not in the store"))
            continue
        if hash_file(target) != artifact["sha256"]:
            problems.append(Problem(artifact["path"], "is damaged: its SHA-256 is not that of the manifest"))
    if problems:
        raise DataError(problems)
    store.download(RESULTS, folders.model / RESULTS)  # last: when it exists, so do all other files
    log.get_logger().info("results are delivered", model=str(folders.model), data=str(folders.data))


def model_path(path: str) -> str | None:
    """Where an artifact goes in a folder or repository of a model; None for one that is no part of the model.

    The adapter is at the top, where tools that load or serve a model look for it, and each exported format in a
    folder of its name.

    Raises:
        DataError: Its path is not one of an artifact.
    """
    try:
        parts = check_key(path).split("/")
    except ValueError:
        parts = []
    match parts:
        case ["artifacts", "export", _, _, *_]:
            return "/".join(parts[2:])
        case ["artifacts", "adapter", _, *_]:
            return "/".join(parts[2:])
        case ["artifacts", _, *_]:
            return None
    raise DataError([Problem(RESULTS, f"lists an artifact with an invalid path: {path[:80]!r}")])


def _delivered_path(path: str, folders: Delivery) -> Path:
    """The local path of an artifact.

    Raises:
        DataError: Its path is not one of an artifact.
    """
    if (inside := model_path(path)) is not None:
        return folders.model / inside
    return (folders.model if path == REPORT else folders.data) / path.removeprefix(ARTIFACTS)
