"""Reads the sealed records that lie below a prefix of a run's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from job.storage.base import read_record
from job.storage.open import ObjectStore
from job.verification.differences import Difference

_Record = TypeVar("_Record")


def read_sealed(
    store: ObjectStore, keys: Iterable[str], parse: Callable[[bytes], _Record], what: str, differences: list[Difference]
) -> Iterator[tuple[str, _Record]]:
    """Key and record of each; one that cannot be read is added to the differences instead.

    Args:
        store: The run's own.
        keys: Of the records.
        parse: Raises ValueError or TypeError for bytes that are no such record.
        what: What a record is, for the message.
        differences: Receives the records that cannot be read.
    """
    for key in keys:
        stored = read_record(store, key)
        try:
            yield key, parse(b"" if stored is None else stored.data)
        except (ValueError, TypeError) as error:
            differences.append(Difference(key, what, str(error)[:200]))
