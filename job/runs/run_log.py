"""The run log: a sealed record of each attempt, noted while it goes on."""

from __future__ import annotations

from dataclasses import asdict, replace

from pydantic import TypeAdapter

from job.common.hashing import sealed, unsealed
from job.common.validation import first_error
from job.errors import DataError, Problem
from job.records import AttemptRecord
from job.runs.layout import CHECKPOINTS, attempt_key, checkpoint_part
from job.runs.lease import attempt_numbers
from job.storage.base import write_in_turn
from job.storage.open import ObjectStore

_GAPS = 20
"""So many attempts before the one that publishes are looked for; older ones have ended long ago."""


def parse_record(data: bytes) -> AttemptRecord:
    """An attempt's record.

    Raises:
        ValueError: It is none, or it was altered.
    """
    return TypeAdapter(AttemptRecord).validate_python(unsealed(data))


def read_run_log(store: ObjectStore, epoch: int) -> list[AttemptRecord]:
    """What is known of the attempts before `epoch`; one that is still noted as running was killed.

    Raises:
        DataError: A record is damaged.
    """
    numbers = [number for number in attempt_numbers(store) if number < epoch]
    found = (_read(store, number)[0] for number in numbers)
    return [_ended(record) for record in found if record is not None]


def close_run_log(store: ObjectStore, epoch: int, started: str) -> list[AttemptRecord]:
    """Like `read_run_log`, and ends all records before `epoch` for good: a manifest is going to hold their hashes.

    An attempt that was replaced while it stood still may be about to write its record. Every record that is noted as
    running is changed here, and one that lacks is made, so the condition of that write fails and it ends as replaced. A
    record that somebody removed gets one without times, too: checkpoints may name its attempt.

    Args:
        store: The run's own, fenced.
        epoch: Number of the attempt that publishes.
        started: When that attempt began.

    Raises:
        DataError: A record is damaged.
        Replaced: Another attempt owns the run.
    """
    known = {number for number in attempt_numbers(store) if number < epoch}
    numbers = known | _named(store, epoch) | set(range(max(1, epoch - _GAPS), epoch))
    records: list[AttemptRecord] = []
    for number in sorted(numbers, reverse=True):  # newest first: one without a record began before the next one
        record, tag = _read(store, number)
        began = records[-1].started if records else started
        closed = _ended(record or _unknown(number, began))
        if record is None or record.outcome != closed.outcome:
            write_in_turn(store, attempt_key(number), sealed(asdict(closed)), tag)
        records.append(closed)
    return records[::-1]


def _read(store: ObjectStore, number: int) -> tuple[AttemptRecord | None, str | None]:
    """An attempt's record and the tag of its object."""
    key = attempt_key(number)
    if (stored := store.read(key)) is None:
        return None, None
    try:
        return parse_record(stored.data), stored.tag
    except ValueError as error:
        what = f"{first_error(error)}; remove it to go on without it"
        raise DataError([Problem(f"{store.uri}/{key}", what)]) from None


def _ended(record: AttemptRecord) -> AttemptRecord:
    return replace(record, outcome="killed") if record.outcome == "running" else record


def _named(store: ObjectStore, epoch: int) -> set[int]:
    """The attempts before `epoch` that wrote a checkpoint which is there."""
    parts = (checkpoint_part(info.key) for info in store.list(CHECKPOINTS))
    folders = {part[1].partition("/")[0] for part in parts if part}
    return {int(name) for name in folders if name.isascii() and name.isdecimal() and 0 < int(name) < epoch}


def _unknown(number: int, started: str) -> AttemptRecord:
    """The record of an attempt of which nothing is known but that there was one."""
    return AttemptRecord(
        number=number,
        started=started,
        finished=None,
        outcome="killed",
        seconds=0.0,
        stage_seconds={},
        steps=0,
        repeated_steps=0,
        last_step=0,
    )
