"""Copies for verification: never larger than claimed, never outside their folder, every difference reported."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from job.errors import Unreachable
from job.records import Artifact
from job.storage.local import LocalStore
from job.verification.fetch_files import fetch_files

DATA = b'{"a": 1, "measured": 2}\n'
SHA256 = hashlib.sha256(DATA).hexdigest()
FACTS = hashlib.sha256(b'{"a": 1}\n').hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A store with one file."""
    made = LocalStore(tmp_path / "run")
    made.write("file", DATA)
    return made


def brought(store: LocalStore, folder: Path, *claims: Artifact) -> tuple[dict[str, Path], list[str]]:
    """Copies by path, and differences as they are told."""
    folder.mkdir(exist_ok=True)
    listed = {info.key: info.bytes for info in store.list()}
    copies, differences = fetch_files(store, claims, listed, folder)
    return copies, [str(difference) for difference in differences]


def test_what_is_as_claimed_is_copied(store: LocalStore, tmp_path: Path) -> None:
    """The bytes are there, and nothing differs."""
    copies, differences = brought(store, tmp_path / "work", Artifact("file", len(DATA), SHA256, FACTS))
    assert copies["file"].read_bytes() == DATA
    assert differences == []


@pytest.mark.parametrize(
    ("claim", "told"),
    [
        (Artifact("other", 3, SHA256), "other: claimed 3 bytes, found no such file"),
        (Artifact("file", 3, SHA256), "file: claimed 3 bytes, found 24 bytes"),
        (Artifact("file", 10**15, SHA256), f"file: claimed {10**15} bytes, found 24 bytes"),
        (Artifact("file", 24, "0" * 64), f"file: claimed SHA-256 {'0' * 64}, found SHA-256 {SHA256}"),
        (Artifact("file", 24, SHA256, "0" * 64), f"file facts: claimed {'0' * 64}, found {FACTS}"),
        (
            Artifact("../run/file", 24, SHA256),
            "../run/file: claimed 24 bytes, found a path that is not allowed in a run",
        ),
        (
            Artifact("/etc/hostname", 24, SHA256),
            "/etc/hostname: claimed 24 bytes, found a path that is not allowed in a run",
        ),
        (Artifact("", 24, SHA256), ": claimed 24 bytes, found a path that is not allowed in a run"),
    ],
    ids=str,
)
def test_what_is_not_as_claimed_is_told(store: LocalStore, tmp_path: Path, claim: Artifact, told: str) -> None:
    """Absence, size, content, facts, and names that are no places in the run's folder."""
    assert brought(store, tmp_path / "work", claim)[1] == [told]


def test_what_changed_is_copied_all_the_same(store: LocalStore, tmp_path: Path) -> None:
    """A changed file is copied, so that the difference can be inspected."""
    copies, _ = brought(store, tmp_path / "work", Artifact("file", len(DATA), "0" * 64))
    assert copies["file"].read_bytes() == DATA


@pytest.mark.parametrize("data", [b"[1]\n", b"\xff", b"no JSON"])
def test_facts_of_what_has_none(store: LocalStore, tmp_path: Path, data: bytes) -> None:
    """A file whose lines are not JSON cannot have the facts that were claimed."""
    store.write("file", data)
    claim = Artifact("file", len(data), hashlib.sha256(data).hexdigest(), FACTS)
    found = f"file facts: claimed {FACTS}, found lines that are not JSON"
    assert brought(store, tmp_path / "work", claim)[1] == [found]


def test_a_file_that_grows_is_cut_off(store: LocalStore, tmp_path: Path) -> None:
    """What became larger after it was listed is not read to its end."""
    listed = {"file": len(DATA)}
    store.write("file", DATA * 2)
    copies, (difference,) = fetch_files(store, [Artifact("file", len(DATA), SHA256)], listed, tmp_path)
    assert copies == {}
    assert difference.found == "a file that changed while it was read"


@pytest.mark.parametrize("limit", [len(DATA) - 1, len(DATA)])
def test_a_large_file_is_copied_as_it_comes(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """What is larger than an object that is read at once is not in memory as a whole, and never longer than claimed."""
    monkeypatch.setattr("job.verification.fetch_files.MAX_READ_BYTES", limit)
    monkeypatch.setattr(store, "read" if limit < len(DATA) else "download", None)
    claim = Artifact("file", len(DATA), SHA256, FACTS)
    copies, differences = brought(store, tmp_path / "work", claim)
    assert copies["file"].read_bytes() == DATA
    assert differences == []
    store.write("file", DATA * 2)
    _, (difference,) = fetch_files(store, [claim], {"file": len(DATA)}, tmp_path)
    assert difference.found == "a file that changed while it was read"


@pytest.mark.parametrize("limit", [len(DATA) - 1, len(DATA)])
def test_a_file_that_is_deleted_meanwhile(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """It was listed, and is no more there; the others are copied."""
    monkeypatch.setattr("job.verification.fetch_files.MAX_READ_BYTES", limit)
    claims = [Artifact("gone", len(DATA), SHA256), Artifact("file", len(DATA), SHA256)]
    copies, (difference,) = fetch_files(store, claims, {"gone": len(DATA), "file": len(DATA)}, tmp_path)
    assert str(difference) == "gone: claimed 24 bytes, found a file that changed while it was read"
    assert list(copies) == ["file"]


def test_a_disk_that_is_too_small(store: LocalStore, tmp_path: Path) -> None:
    """Sizes are added up before anything is copied."""
    with pytest.raises(Unreachable, match="of disk are free"):
        fetch_files(store, [Artifact("file", 10**18, SHA256)], {"file": 10**18}, tmp_path)
