"""What a platform collects: a complete run's files, each in its place and as the manifest lists it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.common.hashing import hash_file
from job.errors import DataError
from job.platforms.detect import Delivery
from job.results.delivery import deliver
from job.storage.local import LocalStore

FILES = {
    "artifacts/adapter/adapter_model.safetensors": b"weights",
    "artifacts/adapter/README.md": b"card",
    "artifacts/report.html": b"<html>",
    "artifacts/metrics.jsonl": b"{}\n",
    "artifacts/evaluation/arc_easy.base.jsonl": b"{}\n",
}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A run's store with everything published."""
    store = LocalStore(tmp_path / "run")
    for key, data in FILES.items():
        store.write(key, data)
    store.write("results.json", json.dumps(manifest(store)).encode())
    return store


@pytest.fixture
def folders(tmp_path: Path) -> Delivery:
    """Where it shall go."""
    return Delivery(model=tmp_path / "model", data=tmp_path / "data")


def manifest(store: LocalStore) -> dict[str, Any]:
    """As much of a manifest as delivering reads."""
    root = Path(store.uri)
    entries = [{"path": key, "bytes": len(data), "sha256": hash_file(root / key)} for key, data in FILES.items()]
    return {"artifacts": entries}


def files(folder: Path) -> dict[str, bytes]:
    """What lies in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_places(store: LocalStore, folders: Delivery) -> None:
    """The adapter's files lie at the top of the model folder, beside manifest and report; the rest is data."""
    deliver(store, manifest(store), folders)
    assert files(folders.model) == {
        "adapter_model.safetensors": b"weights",
        "README.md": b"card",
        "report.html": b"<html>",
        "results.json": json.dumps(manifest(store)).encode(),
    }
    assert files(folders.data) == {"metrics.jsonl": b"{}\n", "evaluation/arc_easy.base.jsonl": b"{}\n"}


def test_delivered_twice(store: LocalStore, folders: Delivery) -> None:
    """What lies there already is replaced: an attempt may have been struck while it delivered."""
    folders.model.mkdir()
    (folders.model / "README.md").write_bytes(b"half a ca")
    deliver(store, manifest(store), folders)
    deliver(store, manifest(store), folders)
    assert files(folders.model)["README.md"] == b"card"


def test_what_is_not_whole(store: LocalStore, folders: Delivery) -> None:
    """All that is missing or altered is named, and the manifest is not delivered."""
    results = manifest(store)
    store.delete("artifacts/report.html")
    store.write("artifacts/metrics.jsonl", b"[]\n")
    with pytest.raises(DataError) as caught:
        deliver(store, results, folders)
    assert [str(problem) for problem in caught.value.problems] == [
        "artifacts/report.html: is in the manifest, but not in the store",
        "artifacts/metrics.jsonl: is damaged: its SHA-256 is not that of the manifest",
    ]
    assert not (folders.model / "results.json").exists()


@pytest.mark.parametrize(
    "path", ["artifacts/../../evil", "/etc/evil", "artifacts/adapter/../../evil", "lease.json", "artifacts"]
)
def test_names_that_lead_elsewhere(store: LocalStore, folders: Delivery, tmp_path: Path, path: str) -> None:
    """A manifest with malicious names writes nothing outside the two folders."""
    results = manifest(store)
    results["artifacts"][0]["path"] = path
    with pytest.raises(DataError, match="lists an artifact with an invalid path"):
        deliver(store, results, folders)
    assert list(tmp_path.rglob("evil")) == []
