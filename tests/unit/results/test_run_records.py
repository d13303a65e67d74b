"""The records of a run are read from its store; damaged ones are named, and the others are still read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from job.common.hashing import sealed, unsealed
from job.errors import Problem
from job.results.run_records import RunRecords, last_note, read_run_records
from job.runs.layout import LEASE, attempt_key
from job.runs.run_log import LoggedAttempt
from job.storage.local import LocalStore
from tests.example_run import ATTEMPTS
from tests.published_run import pairs, publish_run
from tests.unit.results.test_status import attempt_at, save, train


def problem_of(store: LocalStore) -> Problem:
    """The only problem of a run's records."""
    (problem,) = read_run_records(store).problems
    return problem


def test_a_folder_without_records(tmp_path: Path) -> None:
    """It has no attempt, no manifest and no problem, and nothing is written to it."""
    store = LocalStore(tmp_path / "nowhere")
    records = read_run_records(store)
    assert records == RunRecords(store.uri)
    assert records.empty
    assert not (tmp_path / "nowhere").exists()


def test_attempts_are_read_back_to_the_last_step(tmp_path: Path) -> None:
    """Newest first; older ones than the first that had a step are not needed."""
    run = tmp_path / "run"
    for steps in (1, 1, 0, 0):
        with attempt_at(run, killed=True) as attempt:
            if steps:
                train(attempt)
    save(run, 5)
    records = read_run_records(LocalStore(run))
    assert (records.newest, list(records.attempts), records.checkpoints) == (4, [4, 3, 2], (5,))
    assert (records.lease is not None, records.training, records.manifest, records.empty) == (True, None, None, False)


def test_the_figures_of_training(tmp_path: Path) -> None:
    """From the manifest, and before it is published from the record of the finished stage."""
    run = publish_run(tmp_path / "run", {"quiz": pairs(60)})
    manifest = unsealed((run / "results.json").read_bytes())
    records = read_run_records(LocalStore(run))
    assert (records.manifest, records.training) == (manifest, manifest["training"])
    (run / "results.json").unlink()
    LocalStore(run).write("stages/train.json", sealed({"training": {"steps": 6}}))
    assert read_run_records(LocalStore(run)).training == {"steps": 6}
    LocalStore(run).write("stages/train.json", b"{")
    assert read_run_records(LocalStore(run)).training is None


def test_when_an_earlier_version_wrote_its_record() -> None:
    """Its end, or its beginning and duration; the stage is the last that it measured."""
    note = last_note(LoggedAttempt(record=ATTEMPTS[0]))
    assert (note.at, note.stage) == ("2026-01-05T09:05:00.000Z", "train")


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": 1e300},
        {"seconds": -1e15},
        {"started": "9999-12-31T23:59:59Z"},
        {"started": "0001-01-01T00:00:00+14:00"},
    ],
)
def test_times_beyond_the_calendar_are_a_damaged_record(tmp_path: Path, changes: dict[str, Any]) -> None:
    """An attempt that lasted longer than there are dates is named as damaged, with words."""
    record = asdict(ATTEMPTS[0]) | {"outcome": "running", "finished": None} | changes
    store = LocalStore(tmp_path / "run")
    store.write(attempt_key(1), sealed(record))
    assert problem_of(store).what.startswith("has times that cannot be read: ")


@pytest.mark.parametrize("started", ["soon", "0001-01-01T00:00:00+14:00"])
def test_a_lease_without_a_time_is_a_damaged_record(tmp_path: Path, started: str) -> None:
    """A lease that does not say when its attempt began is named as damaged."""
    facts = {"epoch": 1, "holder": "x", "started": started, "heartbeat": 0}
    store = LocalStore(tmp_path / "run")
    store.write(LEASE, sealed(facts))
    assert problem_of(store).where == f"{tmp_path}/run/{LEASE}"
