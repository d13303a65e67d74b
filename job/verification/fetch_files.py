"""Copies the files of a published run, and compares each with its size and SHA-256 in a record of the run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from job.common.hashing import hash_facts, hash_file
from job.common.resources import check_disk
from job.records import Artifact
from job.storage.base import MAX_READ_BYTES
from job.storage.open import ObjectStore, TooLarge, is_key
from job.verification.differences import Difference

MISSING = "no such file"


def fetch_files(
    store: ObjectStore, claims: Iterable[Artifact], listed: Mapping[str, int], folder: Path
) -> tuple[dict[str, Path], list[Difference]]:
    """Copies files, also those whose content differs, but never more bytes than the record says.

    Args:
        store: The run's store.
        claims: From the manifest or a commit marker; paths and sizes are not trusted.
        listed: Path -> bytes of every file in the store.
        folder: Folder for the copies. A copy is named by a hash of its path, so that no path leads out of the folder.

    Returns:
        The copies by path, and all differences from the claims.

    Raises:
        Unreachable: The disk is too small for the copies.
    """
    accepted, differences = [], []
    for claim in claims:
        size = listed.get(claim.path) if is_key(claim.path) else None
        if size is None:
            reason = MISSING if is_key(claim.path) else "a path that is not allowed in a run"
            differences.append(Difference(claim.path, f"{claim.bytes} bytes", reason))
        elif size != claim.bytes:
            differences.append(Difference(claim.path, f"{claim.bytes} bytes", f"{size} bytes"))
        else:
            accepted.append(claim)
    check_disk(folder, sum(claim.bytes for claim in accepted))
    copies = {}
    for claim in accepted:
        try:
            copies[claim.path] = path = _copy(store, claim, folder)
        except (FileNotFoundError, TooLarge):
            differences.append(Difference(claim.path, f"{claim.bytes} bytes", "a file that changed while it was read"))
        else:
            differences += _compare(claim, path)
    return copies, differences


def _copy(store: ObjectStore, claim: Artifact, folder: Path) -> Path:
    path = folder / hashlib.sha256(claim.path.encode()).hexdigest()
    if claim.bytes > MAX_READ_BYTES:
        store.download(claim.path, path, max_bytes=claim.bytes)
        return path
    stored = store.read(claim.path, max_bytes=claim.bytes)
    if stored is None:
        raise FileNotFoundError(claim.path)
    path.write_bytes(stored.data)
    return path


def _compare(claim: Artifact, path: Path) -> list[Difference]:
    sha256 = hash_file(path)
    if sha256 != claim.sha256:
        return [Difference(claim.path, f"SHA-256 {claim.sha256}", f"SHA-256 {sha256}")]
    if claim.facts_sha256 is None:
        return []
    try:
        facts = hash_facts(path)
    except ValueError:
        facts = "lines that are not JSON"
    return [Difference(f"{claim.path} facts", claim.facts_sha256, facts)] if facts != claim.facts_sha256 else []
