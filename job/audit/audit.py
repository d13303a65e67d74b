"""The audit of a data set: rows are added as they are read, and `finish` says what was found and where.

A finding names the row's location and the kind, and for an overlap the question, for a duplicate the row that it
repeats; it never has a text of the row. Memory: about 30 bytes a row, and 0.5 KiB each of the first MOST_COMPARED rows.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_type_hints

from job.audit.overlap import MOST_ROWS, SHARE, OverlapHits
from job.audit.rows import AuditedRow, AuditSetup
from job.audit.safety import Screen, Texts
from job.audit.statistics import PACKAGE as LANGUAGES
from job.audit.statistics import quantiles
from job.common.findings import DUPLICATE, KINDS, NEAR_DUPLICATE, OVERLAP, UNSAFE, action_of
from job.common.near_duplicates import RowHashes, group_rows
from job.errors import MAX_SHOWN, DataError, Problem
from job.records import AuditRecord, CheckRecord

MOST_COMPARED = 500_000
"""Rows that are compared for near-duplicates: the first ones. All are compared for duplicates word for word."""
PLACES = 5
"""How many places of each kind the record has; all are in the file of findings."""
_NUMBERED = re.compile(r"(.*\D)(0|[1-9]\d{0,17})(\D*)", re.DOTALL | re.ASCII)
_NOT_INSTALLED = "the package {} is not installed"
_NO_QUESTIONS = "the scored questions are not known here"


@dataclass(frozen=True)
class Finding:
    """One finding: a row's location and number (from 0), the kind, and what it is about; a line of the published file.

    `task` and `question` (its number in the task, from 0) say which question an overlap is with, and `exact` whether
    word for word; `repeats` is the location of the row that a duplicate repeats; `score` is the probability that
    an unsafe row is unsafe.
    """

    kind: str
    where: str
    row: int
    task: str | None = None
    question: int | None = None
    exact: bool | None = None
    repeats: str | None = None
    score: float | None = None

    def line(self) -> str:
        """As JSON, without what does not apply."""
        return json.dumps({name: value for name, value in vars(self).items() if value is not None}) + "\n"


_TYPES = get_type_hints(Finding)


@dataclass
class _RowLocations:
    """Locations of rows, such as `file:17`, in 12 bytes each."""

    ends: dict[tuple[str, str | None], int] = field(default_factory=dict)
    name: array[int] = field(default_factory=lambda: array("I"))
    number: array[int] = field(default_factory=lambda: array("Q"))
    _known: list[tuple[str, str | None]] = field(default_factory=list)

    def add(self, where: str) -> None:
        match = _NUMBERED.fullmatch(where)
        ends: tuple[str, str | None] = (where, None) if match is None else (match[1], match[3])
        self.name.append(self.ends.setdefault(ends, len(self.ends)))
        self.number.append(0 if match is None else int(match[2]))
        if len(self.ends) > len(self._known):
            self._known.append(ends)

    def __getitem__(self, row: int) -> str:
        head, tail = self._known[self.name[row]]
        return head if tail is None else f"{head}{self.number[row]}{tail}"


class Audit:
    """Collects what is found while rows are read; rows have numbers in the order in which they are added.

    `screen` scores the texts of all rows at the end, where the setup has a classifier.
    """

    def __init__(self, setup: AuditSetup, screen: Screen | None = None) -> None:
        self.setup = setup
        self._screen = screen
        self._texts = Texts() if screen is not None else None
        self._locations = _RowLocations()
        self._identities = array("Q")
        self._hashes = RowHashes()
        self._kinds: list[tuple[int, str]] = []
        self._hits: dict[int, OverlapHits] = {}
        self._rows_with_run: Counter[int] = Counter()
        self.languages: Counter[str] = Counter()
        """How many rows are in a language; none where that is not looked for."""
        self._first_row_of_source = 0
        self._repeated_row: int | None = None
        self.row_of_example = array("I")
        """For each example the number of its row."""

    def begin(self, *, again: bool) -> None:
        """Says that the rows of the next source come, or those of the last one again, or some of them, in order."""
        self._first_row_of_source = self._first_row_of_source if again else len(self._identities)
        self._repeated_row = self._first_row_of_source if again else None

    def add(self, where: str, data: bytes, examples: int = 1) -> None:
        """Adds a row by what `RowAudit` found in it, and how many examples it gives."""
        if self._repeated_row is not None:
            while self._locations[self._repeated_row] != where:
                self._repeated_row += 1
            self.row_of_example.extend([self._repeated_row] * examples)
            return
        row = AuditedRow.from_bytes(data)
        number = len(self._identities)
        self.row_of_example.extend([number] * examples)
        self._locations.add(where)
        self._identities.append(row.identity)
        if number < MOST_COMPARED:
            self._hashes.add(row.hashed)
        self._kinds += [(number, kind) for kind in row.kinds]
        if self._texts is not None:
            self._texts.add(row.text)
        if row.language:
            self.languages[row.language] += 1
        self._rows_with_run.update(row.overlap.runs)
        # Runs that too many rows have by now are dropped here, so that a template in each row takes no memory.
        runs = tuple(run for run in row.overlap.runs if self._rows_with_run[run] <= MOST_ROWS)
        if runs or row.overlap.exact:
            self._hits[number] = OverlapHits(row.overlap.exact, runs)

    def findings(self, check_stop: Callable[[], None] = lambda: None) -> list[Finding]:
        """All findings, by row, and of a row in the order of `KINDS`."""
        kinds = list(KINDS)
        findings = [
            *self._overlaps(),
            *self._duplicates(check_stop),
            *self._unsafe(),
            *(Finding(kind, self._locations[row], row) for row, kind in self._kinds),
        ]
        return sorted(
            findings,
            key=lambda finding: (finding.row, kinds.index(finding.kind), finding.task or "", finding.question or 0),
        )

    def _overlaps(self) -> Iterator[Finding]:
        questions = self.setup.questions
        if questions is None:
            return
        of_run = defaultdict(list)
        for number, runs in enumerate(questions.runs):
            for run in runs:
                of_run[run].append(number)
        for row, overlap in self._hits.items():
            counts = Counter(
                number for run in overlap.runs if self._rows_with_run[run] <= MOST_ROWS for number in of_run[run]
            )
            near = {number for number, count in counts.items() if count >= SHARE * len(questions.runs[number])}
            for number in sorted(near | set(overlap.exact)):
                task, index = questions.name(number)
                yield Finding(OVERLAP, self._locations[row], row, task, index, number in overlap.exact)

    def _unsafe(self) -> Iterator[Finding]:
        if self._screen is None or self._texts is None or self.setup.safety is None:
            return
        for row, score in enumerate(self._screen(self._texts)):
            if score >= self.setup.safety.threshold:
                yield Finding(UNSAFE, self._locations[row], row, score=score)

    def _duplicates(self, check_stop: Callable[[], None]) -> Iterator[Finding]:
        import numpy as np

        identities = np.frombuffer(self._identities, np.uint64) if self._identities else np.zeros(0, np.uint64)
        _, first, inverse = np.unique(identities, return_index=True, return_inverse=True)
        firsts = first[inverse]
        repeated = np.flatnonzero(firsts != np.arange(len(identities)))
        first_of = {int(row): int(firsts[row]) for row in repeated}
        for row, original in first_of.items():
            yield Finding(DUPLICATE, self._locations[row], row, repeats=self._locations[original])
        begins: dict[bytes, int] = {}
        for row, group in enumerate(group_rows(self._hashes, check_stop)):
            original = begins.setdefault(group, row)
            if original != row and row not in first_of:
                yield Finding(NEAR_DUPLICATE, self._locations[row], row, repeats=self._locations[original])


@dataclass(frozen=True)
class Audited:
    """The result: the record, the findings as the file that is published, and the examples that are left out."""

    record: AuditRecord
    findings: bytes
    left_out: tuple[int, ...]


def finish(
    audit: Audit,
    name: str,
    check_stop: Callable[[], None] = lambda: None,
    lengths: Mapping[str, Sequence[int]] | None = None,
) -> Audited:
    """What was found, and what becomes of it.

    Args:
        audit: With all rows.
        name: Name of the data, for messages.
        check_stop: Called periodically; an exception from it ends the work.
        lengths: Lengths of the examples, by unit.

    Raises:
        DataError: There are findings of kinds whose rows are an error, or no row is left.
    """
    setup = audit.setup
    findings = audit.findings(check_stop)
    actions = {kind: action_of(setup.on_finding, kind) for kind in KINDS}
    if refused := [finding for finding in findings if actions[finding.kind] == "error"]:
        problems = [Problem(finding.where, _describe(finding)) for finding in refused[:MAX_SHOWN]]
        advice = "correct the rows, or set JOB_DATA__ON_FINDING to skip or record for these kinds"
        raise DataError(problems, len(refused), advice)
    dropped = {finding.row for finding in findings if actions[finding.kind] == "skip"}
    rows = len(set(audit.row_of_example))
    if dropped and len(dropped) == rows:
        message = "has no row without a finding that JOB_DATA__ON_FINDING leaves out"
        raise DataError([Problem(name, message)])
    lines = b"".join(finding.line().encode() for finding in findings)
    record = AuditRecord(
        rows=rows,
        left_out=len(dropped),
        checks=_checks(setup, findings),
        overlap=overlapping(findings),
        findings=len(findings),
        sha256=hashlib.sha256(lines).hexdigest(),
        bytes=len(lines),
        compared=min(rows, MOST_COMPARED),
        too_short=0 if setup.questions is None else setup.questions.too_short,
        languages=dict(sorted(audit.languages.items(), key=lambda item: (-item[1], item[0]))),
        languages_by=setup.language or "",
        languages_not_checked="" if setup.language else _NOT_INSTALLED.format(LANGUAGES),
        lengths={unit: quantiles(values) for unit, values in (lengths or {}).items()},
        safety=setup.safety,
    )
    left_out = tuple(number for number, row in enumerate(audit.row_of_example) if row in dropped)
    return Audited(record, lines, left_out)


def overlapping(findings: Sequence[Finding]) -> dict[str, list[int]]:
    """By task, the numbers (from 0) of the questions that training rows have in them, ascending; none: left out."""
    by_task: dict[str, set[int]] = {}
    for finding in findings:
        if finding.task is not None and finding.question is not None:
            by_task.setdefault(finding.task, set()).add(finding.question)
    return {task: sorted(numbers) for task, numbers in sorted(by_task.items())}


def counts(findings: Sequence[Finding]) -> dict[str, tuple[int, list[str]]]:
    """By kind, the number of rows with a finding of that kind, and the first locations."""
    first_rows: dict[str, dict[int, str]] = {}
    for finding in findings:
        first_rows.setdefault(finding.kind, {}).setdefault(finding.row, finding.where)
    return {kind: (len(rows), list(rows.values())[:PLACES]) for kind, rows in first_rows.items()}


def _checks(setup: AuditSetup, findings: Sequence[Finding]) -> dict[str, CheckRecord]:
    by_kind, checks = counts(findings), {}
    for kind in KINDS:
        reason, by = "", "this project"
        if kind == UNSAFE:
            if setup.safety is None:
                continue
            by = setup.safety.model
        if kind == OVERLAP and setup.questions is None:
            reason = _NO_QUESTIONS
        elif kind in setup.checkers:
            by = setup.checkers[kind] or ""
            reason = "" if by else _NOT_INSTALLED.format(_needs(kind))
        elif kind == NEAR_DUPLICATE:
            by = "datasketch"
        rows, places = by_kind.get(kind, (0, []))
        checks[kind] = CheckRecord(
            action=action_of(setup.on_finding, kind),
            checked_by="" if reason else by,
            not_checked=reason,
            rows=None if reason else rows,
            places=places,
        )
    return checks


def _needs(kind: str) -> str | None:
    from job.audit.detectors import DETECTORS

    return DETECTORS[kind].needs


def _describe(finding: Finding) -> str:
    """A finding in words, for an error: never the row's text."""
    about = {
        OVERLAP: f" (question {finding.question} of {finding.task})",
        DUPLICATE: f" ({finding.repeats})",
        NEAR_DUPLICATE: f" ({finding.repeats})",
    }.get(finding.kind, "")
    return f"is a {KINDS[finding.kind]}{about} (JOB_DATA__ON_FINDING)"


def parse_findings(data: bytes) -> list[Finding]:
    """The findings in a published file.

    Raises:
        ValueError: With the first line that is none.
    """
    findings = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            finding = Finding(**json.loads(line))
            if wrong := [name for name, kind in _TYPES.items() if not isinstance(getattr(finding, name), kind)]:
                raise TypeError(f"{wrong[0]} has another type")  # noqa: TRY301 - told with the line, as all else
            if finding.kind not in KINDS:
                raise ValueError("no kind of finding")  # noqa: TRY301 - see above
            findings.append(finding)
        except (TypeError, ValueError) as error:
            raise ValueError(f"line {number}: {str(error)[:200]}") from None
    return findings
