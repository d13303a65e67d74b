"""The part of the audit that needs one row alone: made where the row is tokenized, in several processes.

Its result has no text of the row in it, but where a classifier (JOB_DATA__SAFETY_MODEL) is to score the text later.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from job.audit.detectors import DETECTORS
from job.audit.overlap import OverlapHits, Questions
from job.audit.statistics import language_checker, language_finder
from job.common.findings import Action
from job.common.near_duplicates import row_hash, words_of
from job.records import SafetyRecord

_HEAD = struct.Struct("<IIQ8s")


@dataclass(frozen=True)
class AuditSetup:
    """What to look for, JSON-able.

    Attributes:
        questions: Those that are scored; None where they are not known, and then overlap is not checked.
        on_finding: `JOB_DATA__ON_FINDING`.
        checkers: By kind of `DETECTORS` what checks it, with its version; None where that is not installed.
        language: What finds out languages, with its version; None where it is not installed.
        safety: The classifier that scores the rows once they are read; None for none.
    """

    questions: Questions | None
    on_finding: Mapping[str, Action]
    checkers: Mapping[str, str | None]
    language: str | None = None
    safety: SafetyRecord | None = None

    def as_json(self) -> dict[str, Any]:
        """As values of JSON, also for the key of what is kept of the rows."""
        return {**asdict(self), "on_finding": dict(self.on_finding), "checkers": dict(self.checkers)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> AuditSetup:
        """The inverse of `as_json`."""
        fields: dict[str, Any] = {
            name: tuple(tuple(item) if isinstance(item, list) else item for item in value)
            for name, value in (content["questions"] or {}).items()
        }
        questions = Questions(**fields) if fields else None
        safety = None if content["safety"] is None else SafetyRecord(**content["safety"])
        return cls(questions, content["on_finding"], content["checkers"], content["language"], safety)


def set_up(
    questions: Questions | None, on_finding: Mapping[str, Action], safety: SafetyRecord | None = None
) -> AuditSetup:
    """What to look for on this machine, as far as the libraries for it are installed."""
    checkers = {kind: detector.version for kind, detector in DETECTORS.items()}
    return AuditSetup(questions, on_finding, checkers, language_checker(), safety)


@dataclass(frozen=True)
class AuditedRow:
    """What was found in one row.

    Attributes:
        identity: Hash of its texts; equal for rows that differ only in case and white space.
        hashed: Its `near_duplicates.row_hash`.
        kinds: Keys of `DETECTORS` that were found.
        overlap: The questions that it contains.
        language: As `statistics.language_finder` has it; empty where nothing finds it out.
        text: In UTF-8, where a classifier is to score it; else empty.
    """

    identity: int
    hashed: bytes
    kinds: tuple[str, ...]
    overlap: OverlapHits
    language: str = ""
    text: bytes = b""

    def to_bytes(self) -> bytes:
        """As one process hands it to another."""
        rest = (
            [self.kinds, self.overlap.exact, self.overlap.runs] if self.kinds or self.overlap != OverlapHits() else []
        )
        rest_json = json.dumps(rest).encode() if rest else b""
        head = _HEAD.pack(len(rest_json), len(self.text), self.identity, self.language.encode())
        return head + rest_json + self.text + self.hashed

    @classmethod
    def from_bytes(cls, data: bytes) -> AuditedRow:
        """The inverse of `to_bytes`."""
        length, size, identity, language = _HEAD.unpack_from(data)
        text = _HEAD.size + length
        kinds, exact, runs = json.loads(data[_HEAD.size : text]) if length else ((), (), ())
        overlap = OverlapHits(tuple(exact), tuple(runs))
        hashed = data[text + size :]
        language = language.rstrip(b"\0").decode()
        return cls(identity, hashed, tuple(kinds), overlap, language, data[text : text + size])


class RowAudit:
    """Looks for all that one row alone can show."""

    def __init__(self, setup: AuditSetup) -> None:
        self._questions = setup.questions
        self._tests = [(kind, DETECTORS[kind].make()) for kind, checker in setup.checkers.items() if checker]
        self._language = language_finder() if setup.language else lambda _: ""
        self._keeps_text = setup.safety is not None

    def __call__(self, texts: Sequence[str]) -> bytes:
        """What a row has, from its texts, as `AuditedRow.to_bytes`."""
        joined = "\n".join(texts)
        overlap = OverlapHits() if self._questions is None else self._questions.look_for(texts, words_of(joined))
        same = "\0".join(" ".join(text.casefold().split()) for text in texts)
        identity = int.from_bytes(sha256(same.encode(errors="surrogatepass")).digest()[:8], "little")
        kinds = tuple(kind for kind, test in self._tests if test(joined))
        # A lone surrogate, which is no text, has no form in UTF-8.
        text = joined.encode(errors="replace") if self._keeps_text else b""
        return AuditedRow(identity, row_hash(texts), kinds, overlap, self._language(joined)[:8], text).to_bytes()
