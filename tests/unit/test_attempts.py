"""Stages that earlier attempts finished: taken over while everything that they published is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.attempts import Attempt, missing
from job.faults import Faults
from job.local import LocalStore
from job.preemption import Stop
from job.records import Artifact, Evaluated
from tests.wrapped_store import WrappedStore

KEY = "artifacts/evaluation/arc_easy.base.jsonl"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A run's store."""
    return LocalStore(tmp_path / "run")


def attempt(store: LocalStore, tmp_path: Path) -> Attempt:
    """An attempt at the run."""
    return Attempt(store, tmp_path, 1, Stop(), lambda: None, Faults((), store), [])


class Work:
    """A stage's work, counted."""

    def __init__(self, attempt: Attempt, path: Path) -> None:
        self.attempt, self.path, self.done = attempt, path, 0

    def __call__(self) -> Evaluated:
        """Publishes one file."""
        self.done += 1
        self.path.write_bytes(b"record\n")
        return Evaluated({}, [self.attempt.publish(self.path, KEY)])


def test_a_finished_stage_is_not_repeated(store: LocalStore, tmp_path: Path) -> None:
    """The record of a stage stands for its work."""
    first = attempt(store, tmp_path)
    work = Work(first, tmp_path / "file")
    found = first.stage("evaluate-base", Evaluated, work)
    assert attempt(store, tmp_path).stage("evaluate-base", Evaluated, work) == found
    assert work.done == 1


@pytest.mark.parametrize("damage", [lambda store: store.delete(KEY), lambda store: store.write(KEY, b"half")])
def test_a_record_without_its_files_does_not_count(store: LocalStore, tmp_path: Path, damage: object) -> None:
    """Where a copy of the run was restored that has the record but not the files yet, the stage is done again."""
    first = attempt(store, tmp_path)
    work = Work(first, tmp_path / "file")
    found = first.stage("evaluate-base", Evaluated, work)
    damage(store)  # type: ignore[operator]
    assert attempt(store, tmp_path).stage("evaluate-base", Evaluated, work) == found
    assert work.done == 2
    assert missing(store, found.artifacts) == []


def test_what_builds_on_it_is_done_again_too(store: LocalStore, tmp_path: Path) -> None:
    """An evaluation is of the adapter that training published: another training has another evaluation."""
    first = attempt(store, tmp_path)
    training, evaluation = Work(first, tmp_path / "one"), Work(first, tmp_path / "two")
    first.stage("train", Evaluated, training)
    first.stage("evaluate-adapter", Evaluated, evaluation)
    store.delete(KEY)
    second = attempt(store, tmp_path)
    second.stage("train", Evaluated, training)
    second.stage("evaluate-adapter", Evaluated, evaluation)
    assert (training.done, evaluation.done) == (2, 2)


def test_missing_asks_once(store: LocalStore) -> None:
    """However many files there are, one listing tells which are missing; none is needed for none."""
    asked: list[str] = []
    watched = WrappedStore(store, before=lambda verb, _key: asked.append(verb))
    artifacts = [Artifact(f"artifacts/{n}", n, "") for n in range(5)]
    store.write("artifacts/3", b"123")
    assert missing(watched, artifacts) == [f"artifacts/{n}" for n in (0, 1, 2, 4)]
    assert missing(watched, []) == []
    assert asked == ["list"]
