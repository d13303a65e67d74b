"""The training rows and the validation rows of a run: read, checked together, and split.

Without `JOB_DATA__VALIDATION` this is `dataset.load_examples`, and datasketch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from job.audit.audit import Audit, Audited, finish
from job.audit.rows import AuditSetup
from job.audit.safety import Screen
from job.common.formatting import count
from job.common.near_duplicates import RowHashes
from job.common.source_list import Source
from job.data.dataset import load_examples
from job.data.examples import Examples, rewrite_examples
from job.data.notes import Notes
from job.data.preferences import EncodedAnswers, paired
from job.data.tokenization import Encoded
from job.data.validation_split import count_overlap, hold_out
from job.errors import DataError, Problem, combine
from job.records import AuditRecord, DatasetRecord, RowsRecord, ValidationRows

EXAMPLES, VALIDATION = "examples.arrow", "validation.arrow"
"""Files of the training source's examples, those that are held out included, and of a validation source's."""
FINDINGS = "findings.jsonl"
"""File of the audit's findings, where there is one."""


@dataclass(frozen=True)
class ValidationSource:
    """Validation rows in a separate source: its location here, its name in messages, hub revision and split."""

    location: str
    name: str
    revision: str | None
    split: str


def validation_source_of(
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
        source: The training source; another split of the same hub data set needs no separate revision.
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

    def leave_out(self, numbers: Sequence[int]) -> None:
        """Forgets the examples of these numbers, ascending."""
        for number in reversed(numbers):
            del self.hashes.digests[number]
            del self.sha256[number]


@dataclass
class _AuditStep:
    """Finishes the audit of the training source when its rows are read, and leaves out those with findings to skip.

    `audited` is the result where it is known from before; then nothing is collected.
    """

    audit: AuditSetup | None
    audited: Audited | None
    folder: Path | None
    note: Notes
    check_stop: Callable[..., None]
    screen: Screen | None = None

    def __post_init__(self) -> None:
        self.collected = None if self.audit is None or self.audited else Audit(self.audit, self.screen)

    @property
    def leaves_out(self) -> bool:
        """Whether rows with findings may be left out."""
        return self.audit is not None and "skip" in self.audit.on_finding.values()

    def __call__(self, examples: Examples, record: DatasetRecord, rows: _Rows | None) -> tuple[Examples, DatasetRecord]:
        """The examples that stay, and the record with what was found; the same are left out of `rows`."""
        audited = self.audited
        if self.collected is not None:
            counted = {"tokens": examples.lengths, "target_tokens": examples.target_counts}
            audited = finish(self.collected, record.source, self.check_stop, counted)
        if audited is None:
            return examples, record
        _note_audit(self.note, audited.record, record.source)
        if self.folder is not None:
            (self.folder / FINDINGS).write_bytes(audited.findings)
        file = None if self.folder is None else self.folder / EXAMPLES
        return _without(examples, replace(record, audit=audited.record), audited.left_out, rows, file)

    def paired(self, examples: Examples, record: DatasetRecord, options: Mapping[str, Any]) -> Examples:
        """The examples with a second sequence each, where this has waited for the audit; `options` goes to `paired`."""
        if self.leaves_out and record.format == "unpaired_preference":
            return paired(examples, [range(len(examples))], **options)
        return examples


def load_rows(
    source: str | Sequence[Source],
    validation: float | ValidationSource | None,
    *,
    revision: str | None,
    split: str,
    check_stop: Callable[..., None] = lambda **_: None,
    on_example: Callable[[Encoded | EncodedAnswers], None] | None = None,
    folder: Path | None = None,
    notes: Notes | None = None,
    audit: AuditSetup | None = None,
    audited: Audited | None = None,
    screen: Screen | None = None,
    **reading: Any,
) -> tuple[Examples, Examples | None, DatasetRecord]:
    """The training examples, the validation examples (None without `validation`), and the record of both.

    Args:
        source: Location of the training rows, as for `load_examples`.
        validation: A share (below 1) or a number of the rows to hold out; or a separate source; None for neither.
        revision: Of the training source.
        split: Of the training source.
        check_stop: As for `load_examples`.
        on_example: As for `load_examples`, with the examples of the training source.
        folder: Where the examples are written, to EXAMPLES and VALIDATION, and what the audit found, to FINDINGS; None
            to keep the examples in memory.
        notes: As for `load_examples`.
        audit: What to look for in the rows of the training source; None for no audit.
        audited: The result of the same audit, where it is known from before.
        screen: Scores the rows' texts, where the audit has a classifier.
        reading: Further arguments of `load_examples`; `name` and `limit` count for the training source alone.

    Raises:
        DataError: As `load_examples`, with the bad rows of both sources; or the rows cannot be split, or have findings
            that are errors.
        SettingsError, Unreachable, AccessDenied: As `load_examples`.
    """
    note = notes or Notes()
    reading |= {"check_stop": check_stop, "notes": note}
    file = None if folder is None else folder / EXAMPLES
    audit_step = _AuditStep(audit, audited, folder, note, check_stop, screen)
    pairing: dict[str, Any] = {"seed": reading.get("seed", 0), "max_length": reading["max_length"], "file": file}
    own_source: dict[str, Any] = {"revision": revision, "split": split, "file": file, "audit": audit_step.collected}
    if validation is None:
        # Labelled answers are paired once it is known which of them stay.
        more = {**reading, "pair": False} if audit_step.leaves_out else reading
        examples, record = audit_step(*load_examples(source, on_example=on_example, **own_source, **more), None)
        _check_weights(examples, record.source)
        return audit_step.paired(examples, record, pairing), None, record
    rows, validation_rows = _Rows(on_example), _Rows(None)
    errors: list[DataError] = []

    def read(location: str | Sequence[Source], keep: _Rows, **options: Any) -> tuple[Examples, DatasetRecord] | None:
        try:
            # Labelled answers that are held out are paired among themselves, so once it is known which they are.
            pair = isinstance(validation, ValidationSource) and not (audit_step.leaves_out and keep is rows)
            return load_examples(location, on_example=keep.add, compare=True, pair=pair, **{**reading, **options})
        except DataError as error:
            errors.append(error)
            return None

    from_training = read(source, rows, **own_source)
    from_validation = None
    if isinstance(validation, ValidationSource):
        where = {"name": validation.name, "revision": validation.revision, "split": validation.split, "limit": None}
        from_validation = read(
            validation.location, validation_rows, file=None if folder is None else folder / VALIDATION, **where
        )
    if errors:
        raise combine([("rows", error) for error in errors])
    if from_training is None:  # its error is raised above
        raise AssertionError
    examples, record = audit_step(*from_training, rows)
    if isinstance(validation, ValidationSource):
        if from_validation is None:
            raise AssertionError
        _check_weights(examples, record.source)
        _check_weights(from_validation[0], from_validation[1].source, "validate")
        described = replace(
            record, validation=_own_source((record, rows), (from_validation[1], validation_rows), note, check_stop)
        )
        return audit_step.paired(examples, record, pairing), from_validation[0], described
    sides = hold_out(rows.hashes, validation, record.source, check_stop)
    parts = [[i for i, side in enumerate(sides) if side is wanted] for wanted in (False, True)]
    if record.format == "unpaired_preference":
        examples = paired(examples, parts, **pairing)
    (training, trained), (kept, described) = (_part(examples, record, rows, part) for part in parts)
    _check_weights(training, record.source)
    _check_weights(kept, record.source, "validate")
    facts = {**_facts(described), "skipped": {}}
    held_out = ValidationRows(**facts, held_out=True, duplicates=0, near_duplicates=0)
    note("info", "rows are held out for validation", rows=len(kept), of=len(examples), source=record.source)
    return training, kept, replace(trained, validation=held_out)


def _check_weights(examples: Examples, name: str, to: Literal["train", "validate"] = "train") -> None:
    """Refuses rows that all weigh 0: a run on them would learn nothing, or report a validation loss of 0."""
    if not any(examples.weights):
        what = f"has {count(len(examples), 'row')} to {to} on, and their field weight is 0 (JOB_DATA__ROW_WEIGHTS)"
        raise DataError([Problem(name, f"{what}; give some of them a weight above 0")])


def _note_audit(note: Notes, record: AuditRecord, name: str) -> None:
    """Notes by kind how many rows have findings, and what was not checked."""
    if counts := {kind: check.rows for kind, check in record.checks.items() if check.rows}:
        what = "the audit has findings; the report and artifacts/findings.jsonl name the rows"
        note("warning", what, source=name, rows_with=counts, of=record.rows, left_out=record.left_out)
    if missing := {kind: check.not_checked for kind, check in record.checks.items() if check.not_checked}:
        note("warning", "the audit could not make all its checks", source=name, not_checked=missing)


def _without(
    examples: Examples, record: DatasetRecord, left_out: Sequence[int], rows: _Rows | None, file: Path | None
) -> tuple[Examples, DatasetRecord]:
    """The examples without some of them, replacing the file of all, and the record of the remaining ones."""
    if not left_out:
        return examples, record
    gone = frozenset(left_out)
    remaining = rewrite_examples((example for number, example in enumerate(examples) if number not in gone), file)
    if rows is not None:
        rows.leave_out(left_out)
    lengths = remaining.lengths
    return remaining, replace(
        record,
        rows=len(remaining),
        sha256=sha256(f"left out 1\0{record.sha256}{list(left_out)}".encode()).hexdigest(),
        tokens=sum(lengths),
        target_tokens=sum(remaining.target_counts),
        longest=max(lengths),
        longest_at=record.longest_at if max(lengths) == record.longest else "",
    )


def _part(examples: Examples, record: DatasetRecord, rows: _Rows, part: list[int]) -> tuple[Examples, DatasetRecord]:
    """Some of the examples, and the record of these alone."""
    part_examples = examples.take(part)
    lengths = part_examples.lengths
    return part_examples, replace(
        record,
        rows=len(part_examples),
        sha256=sha256(b"".join([b"rows 1\0", *(rows.sha256[i] for i in part)])).hexdigest(),
        tokens=sum(lengths),
        target_tokens=sum(part_examples.target_counts),
        longest=max(lengths),
        longest_at=record.longest_at if max(lengths) == record.longest else "",
    )


def _facts(record: DatasetRecord) -> dict[str, Any]:
    """What a record of rows for validation has in common with that of the data set."""
    return {one.name: getattr(record, one.name) for one in fields(RowsRecord)}


def _own_source(
    training: tuple[DatasetRecord, _Rows],
    validation: tuple[DatasetRecord, _Rows],
    note: Notes,
    check_stop: Callable[..., None],
) -> ValidationRows:
    """The record of a separate validation source, from the records and the rows of both sources.

    Raises:
        DataError: Its rows are of another schema than those trained on.
    """
    (record, rows), (validation_record, validation_rows) = training, validation
    if validation_record.format != record.format:
        what = (
            f"has rows of the schema {validation_record.format}, and the training data of {record.format}; use the "
            "same schema for both"
        )
        raise DataError([Problem(validation_record.source, what)])
    exact, near = count_overlap(rows.hashes, validation_rows.hashes, check_stop)
    if exact or near:
        note(
            "warning",
            "validation rows are also trained on, so the validation loss is too optimistic",
            source=validation_record.source,
            duplicates=exact,
            near_duplicates=near,
            of=validation_record.rows,
        )
    return ValidationRows(**_facts(validation_record), held_out=False, duplicates=exact, near_duplicates=near)
