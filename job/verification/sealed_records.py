"""Reads sealed records from a run's folder: JSON files that contain their own SHA-256."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from job.storage.base import read_record
from job.storage.open import ObjectStore
from job.verification.differences import Difference

_Record = TypeVar("_Record")


def read_sealed(
    store: ObjectStore,
    keys: Iterable[str],
    parse: Callable[[bytes], _Record],
    expected: str,
    differences: list[Difference],
) -> Iterator[tuple[str, _Record]]:
    """Yields (key, record) for each key; a record that cannot be read is reported in `differences` instead.

    Args:
        store: The run's store.
        keys: The keys of the records.
        parse: Parses a record; raises ValueError or TypeError if the bytes are not a record of that kind.
        expected: Name of the kind of record in a difference.
        differences: A difference is appended for each record that cannot be read.
    """
    for key in keys:
        stored = read_record(store, key)
        try:
            yield key, parse(b"" if stored is None else stored.data)
        except (ValueError, TypeError) as error:
            differences.append(Difference(key, expected, str(error)[:200]))
