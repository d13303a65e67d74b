"""What is recorded of a complete run after it: where it was pushed, and what `serve-check --record` found.

These records are sealed, and written after the manifest, which therefore does not list them. The command `report` shows
them, `verify` compares them with the manifest and the run's records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TypeVar

from job.common.hashing import sealed, unsealed
from job.records import Asked, Pushed, ServeCheck
from job.runs.layout import PUSHED, SERVED, served_key
from job.storage.base import read_record
from job.storage.open import ObjectStore, is_key

_Record = TypeVar("_Record")


def write_serve_check(store: ObjectStore, serve_check: ServeCheck) -> None:
    """Records it in the run; it replaces an earlier one of this format and kind of server."""
    store.write(served_key(serve_check.format, serve_check.server), sealed(asdict(serve_check)))


def parse_push(data: bytes) -> Pushed:
    """The record of a push. Raises ValueError or TypeError if it is none."""
    return Pushed(**unsealed(data))


def parse_serve_check(data: bytes) -> ServeCheck:
    """The record of a serve check. Raises ValueError or TypeError if it is none."""
    facts = unsealed(data)
    asked = tuple(Asked(**question) for question in facts.pop("asked", ()))
    check = ServeCheck(asked=asked, **facts)
    measured = (
        check.seconds,
        check.first_token,
        check.tokens_per_second or 0.0,
        *(question.margin for question in asked),
    )
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in measured):
        raise ValueError("a figure is no number")
    return check


@dataclass(frozen=True)
class AfterRun:
    """Where a run was pushed, and how servers of its model answered; each sorted by its key in the store."""

    pushed: tuple[Pushed, ...] = ()
    served: tuple[ServeCheck, ...] = ()


def read_after_run(store: ObjectStore) -> AfterRun:
    """The records that can be read; `verify` names the others."""
    return AfterRun(
        tuple(_readable(store, PUSHED, parse_push)),
        tuple(_readable(store, SERVED, parse_serve_check)),
    )


def _readable(store: ObjectStore, prefix: str, parse: Callable[[bytes], _Record]) -> Iterator[_Record]:
    for key in sorted(info.key for info in store.list(prefix) if is_key(info.key)):  # others are other programs'
        stored = read_record(store, key)
        try:
            if stored is not None:
                yield parse(stored.data)
        except (ValueError, TypeError):
            continue
