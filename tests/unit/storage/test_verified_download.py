"""Every byte of a published file is verified when it is downloaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from job.errors import DataError
from job.records import Artifact
from job.storage.local import LocalStore
from job.storage.verified_download import fetch_artifact

CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A run with one published file."""
    store = LocalStore(tmp_path / "run")
    store.write("artifacts/file", CONTENT)
    return store


def test_what_was_published_is_what_is_read(store: LocalStore, tmp_path: Path) -> None:
    """The file, whole."""
    path = fetch_artifact(store, Artifact("artifacts/file", len(CONTENT), SHA256), tmp_path / "copy")
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("artifact", "why"),
    [
        (Artifact("artifacts/gone", 7, SHA256), "is missing"),
        (Artifact("artifacts/file", 6, SHA256), "is damaged"),
        (Artifact("artifacts/file", 7, "0" * 64), "its SHA-256 is not the published one"),
        (Artifact("../outside", 7, SHA256), "is damaged"),
    ],
)
def test_anything_else_is_named(store: LocalStore, tmp_path: Path, artifact: Artifact, why: str) -> None:
    """Gone, longer, other than it was, or out of the folder: an error of the data, and nothing outside."""
    with pytest.raises(DataError, match=why):
        fetch_artifact(store, artifact, tmp_path / "copy")
    assert not (tmp_path / "outside").exists()
