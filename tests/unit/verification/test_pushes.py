"""Records of pushes: `verify` compares them with the run's files, and says where the run was pushed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from job.common.hashing import sealed
from job.push.files import files_to_push
from job.push.oci_image import image_digest
from job.records import Pushed
from job.runs.layout import PUSHED, pushed_key
from job.storage.local import LocalStore
from job.verification.check_pushes import check_pushes
from job.verification.differences import CheckResult
from tests.published_run import pairs, publish_run

HUB, REGISTRY = "me/model@main", "ghcr.io/me/model:first"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """A run with an adapter and a merged model. Tests remove what they write below `pushed/`."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    return LocalStore(publish_run(folder, {"quiz": pairs(12)}, exported={"original": [True] * 12}))


def manifest(run: LocalStore) -> dict[str, Any]:
    """Its manifest."""
    results: dict[str, Any] = json.loads(Path(run.uri, "results.json").read_bytes())
    return results


def content(run: LocalStore) -> str:
    """The hash of all pushed files, as `sha256sum` would make and hash its list in the layout of the target."""
    artifacts = {entry["path"]: entry["sha256"] for entry in manifest(run)["artifacts"]}
    adapter, merged = "artifacts/adapter/", "artifacts/export/"
    paths = {
        path.removeprefix(adapter).removeprefix(merged): sha256
        for path, sha256 in artifacts.items()
        if path.startswith((adapter, merged))
    }
    return hashlib.sha256("".join(f"{paths[path]}  {path}\n" for path in sorted(paths)).encode()).hexdigest()


def digest(run: LocalStore) -> str:
    """Of the run's image; tests/unit/push/test_oci.py names one."""
    files = files_to_push(manifest(run))
    copies = {file.path: Path(run.uri, file.artifact.path) for file in files}
    return image_digest(files, copies, "first", content(run))


def checked(run: LocalStore, records: dict[str, bytes], *, without: str = "") -> CheckResult | None:
    """What the check says of records; without the copies whose path ends in `without`."""
    for key, data in records.items():
        run.write(key, data)
    try:
        listed = {info.key: info.bytes for info in run.list()}
        copies = {key: Path(run.uri, key) for key in listed if not without or not key.endswith(without)}
        return check_pushes(manifest(run), run, listed, copies)
    finally:
        for key in records:
            run.delete(key)


def record(target: str, place: str, version: str, files: str) -> dict[str, bytes]:
    """The record of a push, at its key."""
    return {pushed_key(target, place): sealed(asdict(Pushed(target, place, version, files)))}


def test_records_that_agree(run: LocalStore) -> None:
    """A commit of a hub is named as not checked; the digest of an image is computed from the files."""
    assert checked(run, {}) is None
    hub, oci = record("hub", HUB, "c" * 40, content(run)), record("oci", REGISTRY, digest(run), content(run))
    found = checked(run, {**hub, **oci})
    assert found is not None
    assert (found.what, found.extent, found.differences) == ("pushes", "2 records", ())
    assert found.notes == (
        f"hub: pushed to {HUB} as {'c' * 40}; not checked whether it is still there",
        f"oci: the files' digest is {digest(run)}; not checked whether {REGISTRY} still has it",
    )
    unread = checked(run, oci, without="merged/config.json")  # reported by the check of the files
    assert unread is not None
    assert unread.differences == ()
    assert unread.notes == (f"oci: pushed to {REGISTRY} as {digest(run)}; not checked whether it is still there",)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda found: {**found, "id": "sha256:" + "0" * 64}, "{key} id"),
        (lambda found: {**found, "files_sha256": "0" * 64}, "{key} files_sha256"),
        (lambda found: {**found, "place": "ghcr.io/others/model:first"}, "{key}"),
        (lambda found: {**found, "target": "hub"}, "{key}"),
        (lambda found: {**found, "more": 1}, "{key}"),
        (lambda found: {**found, "place": 5}, "{key}"),
        (lambda found: {**found, "place": "\ud800"}, "{key}"),
    ],
)
def test_records_that_do_not(run: LocalStore, change: Any, where: str) -> None:
    """Another digest, other files, another place or target than that of its key, other fields or types."""
    key = pushed_key("oci", REGISTRY)
    agreeing = asdict(Pushed("oci", REGISTRY, digest(run), content(run)))
    found = checked(run, {key: sealed(change(agreeing))})
    assert found is not None
    assert [difference.where for difference in found.differences] == [where.format(key=key)]


def test_a_run_without_adapter_files(run: LocalStore) -> None:
    """It has nothing that could have been pushed."""
    key = pushed_key("hub", HUB)
    found = check_pushes({"run": {"id": "first"}, "artifacts": []}, run, {key: 1}, {})
    assert found is not None
    (difference,) = found.differences
    assert (difference.where, difference.claimed) == (PUSHED, "of files")
    assert "nothing to push" in difference.found
