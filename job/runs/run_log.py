"""The run log: a sealed record of each attempt, noted while it goes on."""

from __future__ import annotations

from dataclasses import replace

from pydantic import TypeAdapter

from job.common.hashing import unsealed
from job.errors import DataError, Problem
from job.records import AttemptRecord
from job.runs.layout import attempt_key
from job.storage.open import ObjectStore


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
    records = []
    for number in range(1, epoch):
        key = attempt_key(number)
        if (stored := store.read(key)) is None:
            continue
        try:
            record = parse_record(stored.data)
        except ValueError as error:
            what = f"{str(error).splitlines()[0]}; remove it to go on without it"
            raise DataError([Problem(f"{store.uri}/{key}", what)]) from None
        records.append(replace(record, outcome="killed") if record.outcome == "running" else record)
    return records
