"""The files of an exported format: hashed on this machine's disk, the same on all machines, published."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job.common.hashing import hash_files
from job.errors import Unreachable
from job.records import Artifact, Uploaded
from job.runs.attempt import Attempt
from job.runs.layout import UPLOADED, export_folder


@dataclass(frozen=True)
class ExportFiles:
    """Files on this machine's disk: their folder, and by name their SHA-256."""

    folder: Path
    hashes: Mapping[str, str]

    @classmethod
    def of(cls, folder: Path) -> ExportFiles:
        """All files of a folder, which has no folders in it."""
        files = sorted(folder.iterdir())
        return cls(folder, {path.name: sha256 for path, sha256 in zip(files, hash_files(files), strict=True)})

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> ExportFiles:
        """The files that another process of this machine has described by `as_json`."""
        return cls(Path(tree["folder"]), tree["hashes"])

    def as_json(self) -> dict[str, Any]:
        """The files as JSON, which the machine's other processes read by `from_json`."""
        return {"folder": str(self.folder.absolute()), "hashes": dict(self.hashes)}

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum((self.folder / name).stat().st_size for name in self.hashes)


def require_same_files(attempt: Attempt, name: str, candidates: Sequence[ExportFiles]) -> None:
    """Refuses files that differ between machines, since each scores a part of the questions. All processes call it.

    Args:
        attempt: Its processes compare the hashes of their files.
        name: The format, for the error.
        candidates: The files of each candidate.

    Raises:
        Unreachable: They differ.
    """
    mine = [dict(files.hashes) for files in candidates]
    if any(other != mine for other in attempt.processes.gather(f"files of {name}", mine)):
        raise Unreachable(
            f"the machines of this run computed different bytes of {name}; use the same kind of GPU in all"
        )


def publish_files(attempt: Attempt, files: ExportFiles, name: str) -> list[Artifact]:
    """Uploads the files of a format, without those that an earlier attempt uploaded. Process 0 calls it."""
    earlier = attempt.recorded(UPLOADED, Uploaded) or Uploaded([])
    damaged = set(attempt.damaged(earlier.artifacts))
    uploaded = {artifact.path: artifact for artifact in earlier.artifacts if artifact.path not in damaged}
    artifacts = []
    for file, sha256 in files.hashes.items():
        attempt.check_stop()
        key = export_folder(name) + file
        if key not in uploaded or uploaded[key].sha256 != sha256:
            uploaded[key] = attempt.publish(files.folder / file, key)
            attempt.write_record(UPLOADED, json.dumps(asdict(Uploaded(list(uploaded.values())))))
        artifacts.append(uploaded[key])
    return artifacts
