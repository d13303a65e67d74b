"""Attempts for tests: the job's own class, on a store in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from job.common.validation import adapter_of
from job.distributed.processes import Alone
from job.distributed.ranks import Place
from job.preemption.stop_flag import StopFlag
from job.runs.attempt import Attempt
from job.runs.fault_injection import Faults, arm
from job.runs.open_attempt import open_attempt
from job.storage.base import ObjectStore
from job.storage.local import LocalStore

T = TypeVar("T")


class First(Alone):
    """The first of two processes: the values that it broadcasts, by name, are those that `Second` receives."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def broadcast(self, name: str, value: Callable[[], T]) -> T:
        """Calls `value` and keeps the result."""
        found = value()
        self.told[name] = found
        return found


class Second(Alone):
    """The second of two processes, which receives the values of the first."""

    place, leads = Place(rank=1, world_size=2), False

    def __init__(self, told: Mapping[str, Any], *, same_machine: bool = False) -> None:
        self._told = told
        if same_machine:
            self.place = Place(rank=1, world_size=2, local_rank=1, local_world_size=2)

    def broadcast(self, what: str, value: Callable[[], Any]) -> Any:
        """The value of process 0."""
        return self._told[what]

    def gather(self, what: str, value: Any) -> list[Any]:
        """The values of both processes, which are equal."""
        return [value, value]


def make_attempt(folder: Path, records: Mapping[str, Any] | None = None, **fields: Any) -> Attempt:
    """The first attempt of a run in `folder`, which is never stopped.

    Args:
        folder: Takes `run` and `work`.
        records: By stage, what an earlier attempt recorded; None means no record.
        fields: Other fields of the attempt.
    """
    store = LocalStore(folder / "run")
    (folder / "work").mkdir(parents=True, exist_ok=True)
    attempt = Attempt(
        store, folder / "work", 1, StopFlag(), lambda: None, Faults((), store), **{"earlier": []} | fields
    )
    for name, record in (records or {}).items():
        if record is not None:
            attempt.write_record(name, adapter_of(type(record)).dump_json(record).decode())
    return attempt


@contextmanager
def opened_attempt(folder: Path, through: ObjectStore | None = None) -> Iterator[Attempt]:
    """The next attempt at the run in `folder`, opened as the job opens it; `cache` beside the folder is kept.

    Args:
        folder: The run's.
        through: A store to use in place of the one in `folder`, such as one around it.
    """
    store = LocalStore(folder)
    how: dict[str, Any] = {"cache": str(folder.parent / "cache"), "stop": StopFlag(), "report_progress": lambda: None}
    with open_attempt(through or store, {}, faults=arm((), store), **how) as attempt:
        attempt.run = "0" * 64
        yield attempt
