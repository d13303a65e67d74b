"""Scores that outlive a process: an evaluation goes on where it was killed, and runs share what they score alike.

Scores are kept under a key that hashes everything that determines them: the questions' tokens, the cut into rows, the
model's files and precision, the adapter, the software and the kind of machine. Two evaluations with one key would
compute the same bits, so one may take them from the other.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from job.log import get_logger
from job.records import ChoiceScore, Question
from job.storage.open import ObjectStore, TooLarge

SAVE_SECONDS = 15.0
_ENDING = ".jsonl"


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    row: int
    run: str
    scores: list[list[ChoiceScore]]


def score_key(questions: Sequence[Question], rows: Sequence[range], conditions: Mapping[str, Any]) -> str:
    """SHA-256 of what determines the scores.

    Args:
        questions: In order.
        rows: How they are cut; numerically a row's company matters in the last bits.
        conditions: Model, precision, adapter, software, machine: JSON-able, by name.
    """
    total = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode())
    for row in rows:
        total.update(b"row")
        for question in questions[row.start : row.stop]:
            total.update(json.dumps([question.context, question.choices]).encode())
    return total.hexdigest()


class ScoreCache:
    """The scored rows of one evaluation in a store. Rows are saved in batches, each an object named by its hash."""

    def __init__(self, store: ObjectStore, folder: str, run: str) -> None:
        self._store, self._root, self._folder, self._run = store, folder, folder, run
        self._new: list[_Row] = []
        self._saved_at = time.monotonic()
        self.runs: set[str] = set()
        """The runs that the rows taken from the store were scored by."""

    def open(self, key: str) -> str:
        """Turns to the scores of this key; returns their folder in the store."""
        self._folder = f"{self._root}/{key}"
        return self._folder

    def load(self, questions: Sequence[Question], rows: Sequence[range]) -> dict[int, list[list[ChoiceScore]]]:
        """The rows that were scored before, by number; whatever does not fit its name or its questions is left out."""
        found: dict[int, list[list[ChoiceScore]]] = {}
        names = [info.key for info in self._store.list(f"{self._folder}/") if info.key.endswith(_ENDING)]
        for name in names:  # what copies a folder away leaves marks of its own beside the files
            for row in self._read(name):
                if not 0 <= row.row < len(rows):
                    continue
                asked = questions[rows[row.row].start : rows[row.row].stop]
                if [len(question.choices) for question in asked] == [len(choices) for choices in row.scores]:
                    found[row.row] = row.scores
                    self.runs.add(row.run)
        return found

    def _read(self, key: str) -> list[_Row]:
        name = key.rpartition("/")[2].partition(".")[0]
        why = "its content is not what its name says"
        try:
            stored = self._store.read(key)
            if stored is not None and hashlib.sha256(stored.data).hexdigest() == name:
                return [_Row.model_validate_json(line) for line in stored.data.splitlines()]
        except (ValidationError, TooLarge) as error:
            why = str(error).splitlines()[0]
        get_logger().warning("kept scores cannot be used", key=key, why=why)
        return []

    def add(self, row: int, scores: list[list[ChoiceScore]]) -> None:
        """Keeps a row; saves when the last saving is a while ago."""
        self._new.append(_Row(row=row, run=self._run, scores=scores))
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Saves what is new."""
        if self._new:
            data = "".join(row.model_dump_json() + "\n" for row in self._new).encode()
            self._store.write(f"{self._folder}/{hashlib.sha256(data).hexdigest()}{_ENDING}", data)
            self._new = []
        self._saved_at = time.monotonic()
