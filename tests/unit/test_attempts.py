"""The ledger: what is known of earlier attempts, and what happens where it was damaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from job.attempts import Attempt, ledger_key, open_attempt, parse_record
from job.errors import DataError, Preempted
from job.faults import Faults
from job.local import LocalStore
from job.preemption import Stop


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    """A run's store."""
    return LocalStore(tmp_path / "run")


def attempt(store: LocalStore) -> AbstractContextManager[Attempt]:
    """The run's next attempt."""
    return open_attempt(store, {}, cache=None, stop=Stop(), beat=lambda: None, faults=Faults((), store))


def stopped(store: LocalStore) -> None:
    """An attempt that was preempted."""
    with pytest.raises(Preempted), attempt(store):
        raise Preempted("gone")


def test_an_attempt_finds_its_predecessors(store: LocalStore) -> None:
    """What ended is told as it ended; what is still noted as running was killed."""
    stopped(store)
    with attempt(store) as second:
        running = store.read(ledger_key(2))
        assert running is not None
        assert [record.outcome for record in second.earlier] == ["preempted"]
    store.write(ledger_key(2), running.data)
    with attempt(store) as third:
        assert [(record.number, record.outcome) for record in third.earlier] == [(1, "preempted"), (2, "killed")]


def test_a_damaged_record_is_not_believed(store: LocalStore) -> None:
    """A changed digit in the ledger ends the next attempt, with the file and the way out."""
    stopped(store)
    stored = store.read(ledger_key(1))
    assert stored is not None
    store.write(ledger_key(1), stored.data.replace(b'"steps": 0', b'"steps": 1'))
    with pytest.raises(DataError, match=r"attempts/0001\.json: was altered.*remove it"), attempt(store):
        pass
    store.delete(ledger_key(1))
    with attempt(store) as last:
        assert last.earlier == []


def test_a_record_reads_back(store: LocalStore) -> None:
    """The record of an attempt that is complete says so, when it began and when it ended."""
    with attempt(store) as only:
        began = only.started
    stored = store.read(ledger_key(1))
    assert stored is not None
    record = parse_record(stored.data)
    assert (record.number, record.started, record.outcome) == (1, began, "complete")
    assert record.finished is not None
