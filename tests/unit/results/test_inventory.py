"""Which record lists each file of a run."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from job.results.inventory import collect, is_leftover
from job.storage.local import LocalStore

FILES = {
    "settings.json": True,
    "stages/pull.json": True,
    "attempts/0001.json": True,
    "attempts/0002.json": False,  # the attempt that publishes
    "scores/ab/cd.jsonl": True,
    "faults/kill@step=3": True,
    "checkpoints/step-00000004/COMMITTED.json": True,
    "checkpoints/step-00000004/0001/adapter.safetensors": False,
    "lease.json": False,
    "results.json": False,
    "artifacts/metrics.jsonl": False,
    ".probe-0123": False,
}


def test_the_manifest_vouches_for_what_nothing_else_does(tmp_path: Path) -> None:
    """It lists everything except artifacts, checkpoints' own files, and what is written last and sealed."""
    store = LocalStore(tmp_path / "run")
    for key in FILES:
        store.write(key, key.encode())
    found = collect(store, tmp_path / "work", last_attempt=2)
    assert {file.path for file in found} == {key for key, vouched in FILES.items() if vouched}
    for file in found:
        assert file.bytes == len(file.path)
        assert file.sha256 == hashlib.sha256(file.path.encode()).hexdigest()
    assert not [path for path in (tmp_path / "work").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("key", "leftover"),
    [
        (".probe-0123", True),
        ("checkpoints/step-00000004/0001/adapter.safetensors", True),
        ("checkpoints/step-00000004/COMMITTED.json", False),
        ("notes.txt", False),
        ("artifacts/adapter/adapter_model.bin", False),
    ],
)
def test_leftovers(key: str, leftover: bool) -> None:  # noqa: FBT001
    """What killed attempts leave is told apart from what nobody of the job's wrote."""
    assert is_leftover(key) is leftover
