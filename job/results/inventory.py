"""The files in a run's folder, and which record holds the SHA-256 of each.

| file | its hash is in |
|---|---|
| `artifacts/...` | `artifacts` of the manifest |
| `checkpoints/step-.../<epoch>/...` | `COMMITTED.json` next to that folder |
| `results.json`, `lease.json`, `attempts/` of the last attempt | itself (a seal): they are written last |
| `model.sig`, a signature | nothing: it is over the manifest and the artifacts |
| `pushed/...`, `served/...`, written after the manifest | itself (a seal) |
| `sft/...`, a first stage | its own manifest, whose hash is in `training` of the manifest |
| everything else | `evidence` of the manifest |

Files that a killed attempt left behind (of a checkpoint, or of a test of the store) are in no record, and never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.common.hashing import hash_file
from job.records import Artifact
from job.runs.layout import (
    ARTIFACTS,
    CHECKPOINTS,
    COMMITTED,
    FIRST_STAGE,
    LEASE,
    PUSHED,
    RESULTS,
    SERVED,
    SIGNATURE,
    attempt_key,
    checkpoint_part,
)
from job.storage.base import PROBE, is_copy_mark
from job.storage.open import ObjectStore, download_listed, is_key


def is_evidence(key: str, last_attempt: int) -> bool:
    """Whether the manifest has to list a file under `evidence`."""
    if is_leftover(key) or key.startswith((FIRST_STAGE, PUSHED, SERVED)):
        return False
    return not key.startswith(ARTIFACTS) and key not in {RESULTS, SIGNATURE, LEASE, attempt_key(last_attempt)}


def is_leftover(key: str) -> bool:
    """Whether a file that no record lists may have been left behind by an attempt that was killed."""
    return key.startswith(PROBE) or (key.startswith(CHECKPOINTS) and not is_marker(key))


def is_marker(key: str) -> bool:
    """Whether a file is the commit marker of a checkpoint."""
    part = checkpoint_part(key)
    return part is not None and part[1] == COMMITTED


def artifacts_of(results: Mapping[str, Any]) -> list[Artifact]:
    """The manifest's `artifacts`."""
    return [Artifact(**entry) for entry in results["artifacts"]]


def evidence_of(results: Mapping[str, Any]) -> list[Artifact]:
    """The manifest's `evidence`, without SageMaker's marks: earlier versions listed them, and S3 does not get them."""
    evidence = [Artifact(**entry) for entry in results["evidence"]]
    return [file for file in evidence if not is_copy_mark(file.path, file.bytes)]


def collect(store: ObjectStore, work: Path, last_attempt: int) -> list[Artifact]:
    """The manifest's `evidence`: reads and hashes every file that belongs there.

    Args:
        store: The run's store.
        work: Folder for temporary copies of the files, which are small.
        last_attempt: Number of the attempt that publishes.
    """
    evidence = []
    for info in store.list():
        if is_key(info.key) and is_evidence(info.key, last_attempt):
            path = work / info.key
            download_listed(store, info, path)
            evidence.append(Artifact(info.key, path.stat().st_size, hash_file(path)))
            path.unlink()
    return evidence
