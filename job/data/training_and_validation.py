"""The training rows and the validation rows of a run: read, checked together, and split.

Without `JOB_DATA__VALIDATION` this is `dataset.load_examples`, and datasketch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from job.common.near_duplicates import RowHashes
from job.common.source_list import Source
from job.data.dataset import load_examples, paired
from job.data.examples import Examples
from job.data.notes import Notes
from job.data.preferences import EncodedAnswers
from job.data.tokenization import Encoded
from job.data.validation_split import count_overlap, hold_out
from job.errors import DataError, Problem, combine
from job.records import DatasetRecord, RowsRecord, ValidationRows

EXAMPLES, VALIDATION = "examples.arrow", "validation.arrow"
"""Files of the training source's examples, those that are held out included, and of a validation source's."""


@dataclass(frozen=True)
class ValidationSource:
    """Validation rows in a source of their own: where it lies here, its name in messages, hub revision and split."""

    place: str
    name: str
    revision: str | None
    split: str


def what_to_validate_on(
    validation: float | str | None,
    *,
    source: str,
    source_revision: str | None,
    validation_revision: str | None,
    validation_split: str,
) -> float | ValidationSource | None:
    """`JOB_DATA__VALIDATION` as `load_rows` takes it, before anything is fetched.

    Args:
        validation: The setting: a share, a number of rows, a source, or None.
        source: The training source; another split of the same hub data set needs no revision of its own.
        source_revision: Its revision.
        validation_revision: The revision of the validation source.
        validation_split: The split of the validation source.
    """
    if not isinstance(validation, str):
        return validation
    revision = validation_revision or (source_revision if validation == source else None)
    return ValidationSource(validation, validation, revision, validation_split)


class _Rows:
    """What is kept of each example while rows are read: what it is compared by, and its hash."""

    def __init__(self, pass_on: Callable[[Encoded | EncodedAnswers], None] | None) -> None:
        self._pass_on = pass_on
        self.hashes = RowHashes()
        self.sha256: list[bytes] = []

    def add(self, item: Encoded | EncodedAnswers) -> None:
        self.hashes.add(item.compared_by)
        self.sha256.append(sha256(item.canonical()).digest())
        if self._pass_on is not None:
            self._pass_on(item)


def load_rows(
    source: str | Sequence[Source],
    validation: float | ValidationSource | None,
    *,
    revision: str | None,
    split: str,
    alive: Callable[..., None] = lambda **_: None,
    on_example: Callable[[Encoded | EncodedAnswers], None] | None = None,
    folder: Path | None = None,
    notes: Notes | None = None,
    **reading: Any,
) -> tuple[Examples, Examples | None, DatasetRecord]:
    """The training examples, the validation examples (None without `validation`), and the record of both.

    Args:
        source: Where the training rows lie, as for `load_examples`.
        validation: A share (below 1) or a number of the rows to hold out; or a source of its own; None for neither.
        revision: Of the training source.
        split: Of the training source.
        alive: As for `load_examples`.
        on_example: As for `load_examples`, with the examples of the training source.
        folder: Where the examples are written, to EXAMPLES and VALIDATION; None to keep them in memory.
        notes: As for `load_examples`.
        reading: Further arguments of `load_examples`; `name` and `limit` count for the training source alone.

    Raises:
        DataError: As `load_examples`, with the bad rows of both sources; or the rows cannot be split.
        SettingsError, Unreachable, AccessDenied: As `load_examples`.
    """
    note = notes or Notes()
    reading |= {"alive": alive, "notes": note}
    file = None if folder is None else folder / EXAMPLES
    if validation is None:
        examples, record = load_examples(
            source, revision=revision, split=split, on_example=on_example, file=file, **reading
        )
        return examples, None, record
    rows, held = _Rows(on_example), _Rows(None)
    errors: list[DataError] = []

    def read(place: str | Sequence[Source], keep: _Rows, **how: Any) -> tuple[Examples, DatasetRecord] | None:
        try:
            # Labelled answers that are held out are paired among themselves, so once it is known which they are.
            pair = isinstance(validation, ValidationSource)
            return load_examples(place, on_example=keep.add, compare=True, pair=pair, **{**reading, **how})
        except DataError as error:
            errors.append(error)
            return None

    found = read(source, rows, revision=revision, split=split, file=file)
    own = None
    if isinstance(validation, ValidationSource):
        where = {"name": validation.name, "revision": validation.revision, "split": validation.split, "limit": None}
        own = read(validation.place, held, file=None if folder is None else folder / VALIDATION, **where)
    if errors:
        raise combine([("rows", error) for error in errors])
    if found is None:  # its error is raised above
        raise AssertionError
    examples, record = found
    if isinstance(validation, ValidationSource):
        if own is None:
            raise AssertionError
        return examples, own[0], replace(record, validation=_own_source((record, rows), (own[1], held), note, alive))
    sides = hold_out(rows.hashes, validation, record.source, alive)
    parts = [[i for i, side in enumerate(sides) if side is wanted] for wanted in (False, True)]
    if record.format == "unpaired_preference":
        examples = paired(examples, parts, reading.get("seed", 0), reading["max_length"], file)
    (training, trained), (kept, described) = (_part(examples, record, rows, part) for part in parts)
    facts = {**_facts(described), "skipped": {}}
    held_out = ValidationRows(**facts, held_out=True, duplicates=0, near_duplicates=0)
    note("info", "rows are held out for validation", rows=len(kept), of=len(examples), source=record.source)
    return training, kept, replace(trained, validation=held_out)


def _part(examples: Examples, record: DatasetRecord, rows: _Rows, part: list[int]) -> tuple[Examples, DatasetRecord]:
    """Some of the examples, and the record as it is of them alone."""
    chosen = examples.take(part)
    lengths = chosen.lengths
    return chosen, replace(
        record,
        rows=len(chosen),
        sha256=sha256(b"".join([b"rows 1\0", *(rows.sha256[i] for i in part)])).hexdigest(),
        tokens=sum(lengths),
        target_tokens=sum(chosen.target_counts),
        longest=max(lengths),
    )


def _facts(record: DatasetRecord) -> dict[str, Any]:
    """What a record of rows for validation has in common with that of the data set."""
    return {one.name: getattr(record, one.name) for one in fields(RowsRecord)}


def _own_source(
    training: tuple[DatasetRecord, _Rows], own: tuple[DatasetRecord, _Rows], note: Notes, alive: Callable[..., None]
) -> ValidationRows:
    """The record of a validation source of its own, from the records and the rows of both sources.

    Raises:
        DataError: Its rows are of another schema than those trained on.
    """
    (record, rows), (found, held) = training, own
    if found.format != record.format:
        what = f"has rows of the schema {found.format}, and the training data of {record.format}; give both the same"
        raise DataError([Problem(found.source, what)])
    exact, near = count_overlap(rows.hashes, held.hashes, alive)
    if exact or near:
        note(
            "warning",
            "rows for validation are trained on, too, so their loss says less than it seems to",
            source=found.source,
            duplicates=exact,
            near_duplicates=near,
            of=found.rows,
        )
    return ValidationRows(**_facts(found), held_out=False, duplicates=exact, near_duplicates=near)
