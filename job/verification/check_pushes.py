"""Checks the records of pushes: each is sealed, and lists the files that the manifest lists.

The digest of an image is recomputed from the files. `verify` reads only the run's folder, so it does not check whether
the hub or the registry still has the files; `qlora-job push` does, and pushes missing files again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from job.common.formatting import count
from job.errors import DataError
from job.push.files import files_sha256, files_to_push
from job.push.oci import OciTarget
from job.push.oci_image import image_digest
from job.results.after_run import parse_push
from job.runs.layout import PUSHED, pushed_key
from job.storage.open import ObjectStore
from job.verification.differences import CheckResult, Copies, Difference, find_differences, show
from job.verification.sealed_records import read_sealed


def check_pushes(
    results: Mapping[str, Any], store: ObjectStore, listed: Mapping[str, int], copies: Copies
) -> CheckResult | None:
    """Checks every record below `pushed/`; None if there is none.

    Args:
        results: The manifest.
        store: The run's store.
        listed: Path -> bytes of every file in the store.
        copies: Local copies by path.
    """
    keys = sorted(key for key in listed if key.startswith(PUSHED))
    if not keys:
        return None
    differences, notes = list[Difference](), []
    try:
        files = files_to_push(results)
        expected = files_sha256(files)
    except DataError as error:
        return CheckResult("pushes", count(len(keys), "record"), (Difference(PUSHED, "of files", str(error)),))
    for key, record in read_sealed(store, keys, parse_push, "the record of a push", differences):
        if key != pushed_key(record.target, record.place):
            differences.append(Difference(key, "the record of this place", show(record.place)))
        elif record.files_sha256 != expected:
            differences.append(Difference(f"{key} files_sha256", show(record.files_sha256), show(expected)))
        elif record.target == OciTarget.kind and all(file.artifact.path in copies for file in files):
            paths = {file.path: copies[file.artifact.path] for file in files}
            digest = image_digest(files, paths, results["run"]["id"], expected)
            differences += find_differences(f"{key} id", record.id, digest)
            notes.append(f"oci: the files' digest is {digest}; not checked whether {record.place} still has it")
        else:
            notes.append(
                f"{record.target}: pushed to {record.place} as {record.id}; not checked whether it is still there"
            )
    return CheckResult("pushes", count(len(keys), "record"), tuple(differences), tuple(notes))
