"""A run is complete when its manifest and all files that it lists exist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from job.errors import GateError
from job.results.completed import read_complete, require_gate, withdraw_incomplete
from job.runs.layout import METRICS, RESULTS
from job.storage.base import MAX_READ_BYTES
from job.storage.local import LocalStore
from tests.published_run import pairs, publish_run


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A complete run."""
    return LocalStore(publish_run(tmp_path / "run", {"quiz": pairs(40, improved=10)}))


def test_a_complete_run_is_left_alone(store: LocalStore) -> None:
    """Its manifest is read, and stays."""
    withdraw_incomplete(store)
    results = read_complete(store)
    assert results is not None
    assert METRICS in {artifact["path"] for artifact in results["artifacts"]}


def test_a_manifest_that_lists_more_than_is_there_is_withdrawn(store: LocalStore) -> None:
    """A run that was copied away while it ended is no complete one, and goes on without the manifest."""
    store.delete(METRICS)
    assert read_complete(store) is None
    withdraw_incomplete(store)
    assert store.read(RESULTS) is None


def test_a_file_with_other_bytes_is_published_again(store: LocalStore) -> None:
    """A restart after the end repairs what was damaged since, also where the file's size is as it was."""
    stored = store.read(METRICS)
    assert stored is not None
    store.write(METRICS, bytes([stored.data[0] ^ 1]) + stored.data[1:])
    assert read_complete(store) is None
    withdraw_incomplete(store)
    assert store.read(RESULTS) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b'"delta"', b'"delt!"', 1),
        lambda data: data.replace(b"complete", b"completf", 1),
        lambda data: b"[" + data + b"]",
        lambda data: b'{"artifacts": []}',
        lambda data: b"\xff" + data,
        lambda data: data + bytes(MAX_READ_BYTES),
    ],
)
def test_a_damaged_manifest_is_withdrawn(store: LocalStore, damage: Callable[[bytes], bytes]) -> None:
    """Only a manifest whose seal holds says that a run is complete; any other one is published again."""
    stored = store.read(RESULTS)
    assert stored is not None
    store.write(RESULTS, damage(stored.data))
    assert read_complete(store) is None
    withdraw_incomplete(store)
    assert store.read(RESULTS) is None


def test_a_run_without_a_manifest_goes_on(tmp_path: Path) -> None:
    """Where no attempt has come to an end there is nothing to read and nothing to withdraw."""
    store = LocalStore(tmp_path)
    withdraw_incomplete(store)
    assert read_complete(store) is None


@pytest.mark.parametrize("passed", [True, None])
def test_results_that_pass_or_have_no_gate_are_handed_on(*, passed: bool | None) -> None:
    """Only a gate that is not met is an error."""
    results = {"gate": {"passed": passed, "reasons": []}}
    assert require_gate(results) == results


def test_a_gate_that_is_not_met_says_why() -> None:
    """The error has all reasons."""
    with pytest.raises(GateError, match=r"too low; too few"):
        require_gate({"gate": {"passed": False, "reasons": ["too low", "too few"]}})
