"""Checks the signatures of a run. Without the private key, hashes and seals can be forged, but not signatures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from job.errors import SettingsError
from job.results.signing import files_of, files_of_run, key_id, signed_files, signed_folders
from job.runs.layout import RESULTS, SIGNATURE
from job.storage.base import read_record
from job.storage.open import ObjectStore
from job.verification.differences import CheckResult, Copies, Difference, find_differences


def check_signature(
    results: Mapping[str, Any], manifest: bytes, store: ObjectStore, copies: Copies, key: str | None
) -> CheckResult | None:
    """Checks that each signature is by the key and covers exactly the listed files, and the run's also the manifest.

    Args:
        results: The manifest.
        manifest: The bytes of `results.json`.
        store: The run's store.
        copies: Local copies of the artifacts.
        key: The signer's public key in PEM; None to use the one in the manifest, which shows that the files belong
            together, but not who signed them.

    Returns:
        None if the run is not signed and no key is given.
    """
    claimed = results.get("signing")
    if claimed is None:
        if key is None:
            return None
        missing = Difference(SIGNATURE, "a signature by the key given", "none: the run is not signed")
        return CheckResult("signature", "none", (missing,))
    public_key = key or claimed["public_key"]
    where = f"{RESULTS} signing"
    expected = {"public_key": public_key, "key_sha256": key_id(public_key), "signatures": signature_paths(results)}
    differences = list(find_differences(where, claimed, expected))
    try:
        differences += _differences(results, manifest, store, copies, public_key)
    except SettingsError as error:
        if key is not None:
            raise
        return CheckResult("signature", "not checked", (), tuple(str(problem) for problem in error.problems))
    notes = (
        ()
        if key
        else ("checked by the key in the manifest, which is not authenticated; use --key with the signer's key",)
    )
    return CheckResult("signature", f"by key {key_id(public_key)[:12]}", tuple(differences), notes)


def signature_paths(results: Mapping[str, Any]) -> list[str]:
    """The signatures of a signed run: one in the run's folder, and one in each folder that is used alone."""
    return [SIGNATURE, *(f"{folder}{SIGNATURE}" for folder in signed_folders(results))]


def _differences(
    results: Mapping[str, Any], manifest: bytes, store: ObjectStore, copies: Copies, key: str
) -> Iterator[Difference]:
    for path in signature_paths(results):
        folder = path.removesuffix(SIGNATURE)
        expected = files_of(results, folder) if folder else files_of_run(results, manifest)
        try:
            signed = signed_files(_bytes(path, store, copies), key)
        except ValueError as error:
            yield Difference(path, f"a signature by key {key_id(key)[:12]}", str(error))
        else:
            yield from find_differences(f"{path} signed", signed, expected)


def _bytes(path: str, store: ObjectStore, copies: Copies) -> bytes:
    """The content of a file. Raises ValueError if there is none."""
    if path in copies:
        return copies[path].read_bytes()
    stored = read_record(store, path) if path == SIGNATURE else None
    if stored is None:
        raise ValueError("no readable file")
    return stored.data
