"""What is recorded of a complete run after it: where it was pushed, and what `serve-check --record` found.

These records are sealed, and written after the manifest, which therefore does not list them. The command `report` shows
them, `verify` compares them with the manifest and the run's records.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from job.common.hashing import sealed, unsealed
from job.common.validation import adapter_of, first_error
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
    facts = unsealed(data)
    Pushed(**facts)  # refuses other names, which pydantic ignores
    return _typed(Pushed, facts)


def parse_serve_check(data: bytes) -> ServeCheck:
    """The record of a serve check. Raises ValueError or TypeError if it is none."""
    facts = unsealed(data)
    asked = tuple(Asked(**question) for question in facts.get("asked", ()))
    ServeCheck(**{**facts, "asked": asked})  # as in `parse_push`
    check = _typed(ServeCheck, facts)
    figures = (
        check.seconds,
        check.first_token,
        check.tokens_per_second or 0.0,
        *(figure for question in check.asked for figure in (question.margin, question.difference or 0.0)),
    )
    if not all(map(math.isfinite, figures)):
        raise ValueError("a figure is no number")
    return check


def _typed(kind: type[_Record], facts: dict[str, Any]) -> _Record:
    """The record, each value of which has the type of its field. Raises ValueError if one has another."""
    try:
        return adapter_of(kind).validate_json(json.dumps(facts), strict=True)
    except ValueError as error:
        raise ValueError(first_error(error)) from None


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
