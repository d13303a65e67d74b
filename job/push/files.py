"""The files of a run that are pushed, where each of them goes, and their verified copies."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import DataError, Problem
from job.records import Artifact
from job.results.delivery import model_path
from job.runs.layout import RESULTS


@dataclass(frozen=True)
class PushFile:
    """A file of the run, and its path in the target: the adapter at the top, each exported format in a folder."""

    artifact: Artifact
    path: str

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.artifact.bytes

    @property
    def sha256(self) -> str:
        """Its hash, from the manifest."""
        return self.artifact.sha256


Fetch = Callable[[PushFile, Path], Path]
"""(file, folder) -> its copy below the folder, whose size and SHA-256 are those of the manifest."""


@dataclass(frozen=True)
class PushContent:
    """What is pushed of one run.

    Attributes:
        run: Id of the run.
        files: Sorted by path.
        fetch: Gets a verified copy of a file.
        check_stop: Called between files; may raise what ends the job.
        work: Folder for copies.
    """

    run: str
    files: tuple[PushFile, ...]
    fetch: Fetch
    check_stop: Callable[[], None]
    work: Path

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def sha256(self) -> str:
        """A name for exactly this content; see `files_sha256`."""
        return files_sha256(self.files)


def files_to_push(results: Mapping[str, Any]) -> tuple[PushFile, ...]:
    """The adapter, its card and the exported formats, as the manifest lists them.

    Raises:
        DataError: The manifest lists none, or a path that is not one of an artifact.
    """
    artifacts = [(Artifact(**entry), model_path(entry["path"])) for entry in results["artifacts"]]
    files = sorted((PushFile(artifact, path) for artifact, path in artifacts if path), key=lambda file: file.path)
    if not files:
        raise DataError([Problem(RESULTS, "lists no adapter files, so there is nothing to push")])
    return tuple(files)


def files_sha256(files: Sequence[PushFile]) -> str:
    """SHA-256 of the hashes and paths of all files, a line for each, as `sha256sum` lists them."""
    return hashlib.sha256("".join(f"{file.sha256}  {file.path}\n" for file in files).encode()).hexdigest()
