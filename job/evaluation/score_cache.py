"""Scores kept in an object store: a killed evaluation resumes, and runs on the same base share the base's scores.

The key is a SHA-256 of everything that determines the bits of a score: the questions' token ids, how they are packed,
the model's files and precision, the adapter, package versions, the hardware, and the source code that computes it
(`CODE`). Two evaluations with the same key compute the same bits, so either may reuse the other's scores.

Layout: `scores/<key>/<sha256 of the file>.jsonl`, one line for each packed sequence that was scored. Generated answers
are kept alike, with a key over the prompts and how they are continued, and one line for each batch; probabilities that
texts are unsafe with a key over the texts, and one line for each chunk of them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from job.common import host
from job.common.hashing import code_hashes
from job.evaluation.generation import HowToGenerate
from job.log import get_logger
from job.records import Answer, ChoiceScore, Question
from job.storage.open import ObjectStore, TooLarge

SAVE_SECONDS = 15.0
_ENDING = ".jsonl"

CODE = (
    "job.common.device_copies",
    "job.common.out_of_memory",
    "job.common.pinned_memory",
    "job.evaluation.generation",
    "job.evaluation.key_value_cache",
    "job.evaluation.prefix_tree",
    "job.evaluation.resumable",
    "job.evaluation.scoring",
    "job.model.adapter_files",
    "job.model.adapter_options",
    "job.model.base",
    "job.model.decomposed_init",
    "job.model.experts",
    "job.model.families",
    "job.model.files",
    "job.model.fused.dropout",
    "job.model.fused.experts",
    "job.model.fused.fp8",
    "job.model.fused.frozen_weights",
    "job.model.fused.fused_decoder",
    "job.model.fused.kernels",
    "job.model.fused.lora_forward",
    "job.model.fused.precise_forward",
    "job.model.fused.scoring_decoder",
    "job.model.fused.triton_kernels",
    "job.model.fused.triton_scoring",
    "job.model.lora",
    "job.model.packed_attention",
    "job.model.packed_layout",
    "job.model.placed_loading",
    "job.model.placed_weights",
    "job.model.published_names",
    "job.model.target_modules",
    "job.model.tensor_names",
    "job.model.whole_modules",
)
"""Modules whose code determines a score; their hashes are part of the key.

A test compares this list with the import graph: what scoring and the model's forward pass import, without the modules
that only carry values (`records`, `common.hashing`) or messages (`errors`).
"""


def score_conditions(of_model: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the questions that determines a score, as JSON-able values by name.

    Args:
        of_model: What the caller knows: model, precision, adapter, which forward pass.
    """
    machine = host.hardware()
    return {
        **of_model,
        "software": host.software(),
        **{name: machine[name] for name in ("cpu", "gpus", "driver")},
        "code": code_hashes(*CODE),
    }


def score_key(questions: Sequence[Question], sequences: Sequence[range], conditions: Mapping[str, Any]) -> str:
    """SHA-256 of what determines the scores, hexadecimal.

    Args:
        questions: In order.
        sequences: Which questions are packed together. That is part of the key because the shape of a matrix product
            decides the order in which a processor adds up, and with it the last bits of a score.
        conditions: From `score_conditions`.
    """
    total = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode())
    for sequence in sequences:
        total.update(b"row")  # the separator of all keys so far
        for question in questions[sequence.start : sequence.stop]:
            total.update(json.dumps([question.context, question.choices]).encode())
    return total.hexdigest()


def answers_key(
    prompts: Sequence[Sequence[int]],
    batches: Sequence[Sequence[int]],
    how: HowToGenerate,
    conditions: Mapping[str, Any],
) -> str:
    """SHA-256 of what determines generated answers, hexadecimal; which prompts share a batch is part of it."""
    asked = {"answers": [list(prompt) for prompt in prompts], "batches": list(map(list, batches)), "how": asdict(how)}
    return hashlib.sha256(json.dumps([conditions, asked], sort_keys=True).encode()).hexdigest()


class _Entry(BaseModel):
    """The scores of one packed sequence: its number, the run that computed them, and by question those of each choice.

    Or the answers of one batch, or the probabilities of one chunk, with its number: `row` is its name in the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    row: int
    run: str
    scores: list[list[ChoiceScore]] = []
    answers: list[Answer] = []
    chances: list[float] = []


class ScoreCache:
    """The cached scores of one evaluation.

    Args:
        store: Where they are kept.
        folder: Folder of all scores in the store.
        run: Id of this run, noted with each score that it adds.
        conditions: From `score_conditions`.
    """

    def __init__(self, store: ObjectStore, folder: str, run: str, conditions: Mapping[str, Any]) -> None:
        self._store, self._run, self._conditions = store, run, conditions
        self._root = self._folder = folder
        self._unsaved: list[_Entry] = []
        self._saved_at = time.monotonic()
        self._added = 0
        self._others: set[str] = set()

    @property
    def reused_from(self) -> str | None:
        """The folder of the scores and the runs that computed them; None unless all of them were reused."""
        if self._added or not self._others:
            return None
        return f"{self._store.uri}/{self._folder} (run {', '.join(sorted(self._others))})"

    def load(self, questions: Sequence[Question], sequences: Sequence[range]) -> dict[int, list[list[ChoiceScore]]]:
        """The cached scores by number of the sequence.

        A file whose content does not match its name is skipped with a warning, an entry that does not match its
        questions without one: both are computed again.
        """
        self._folder = f"{self._root}/{score_key(questions, sequences, self._conditions)}"

        def fits(entry: _Entry) -> bool:
            asked = questions[sequences[entry.row].start : sequences[entry.row].stop]
            return [len(question.choices) for question in asked] == [len(choices) for choices in entry.scores]

        return {entry.row: entry.scores for entry in self._fitting(len(sequences), fits)}

    def load_answers(
        self, prompts: Sequence[Sequence[int]], batches: Sequence[Sequence[int]], how: HowToGenerate
    ) -> dict[int, list[Answer]]:
        """The cached answers by number of the batch; what does not match is computed again, as by `load`."""
        self._folder = f"{self._root}/{answers_key(prompts, batches, how, self._conditions)}"
        fitting = self._fitting(len(batches), lambda entry: len(entry.answers) == len(batches[entry.row]))
        return {entry.row: entry.answers for entry in fitting}

    def load_chances(self, texts_sha256: str, sizes: Sequence[int]) -> dict[int, list[float]]:
        """The cached probabilities by number of the chunk; what does not match is computed again, as by `load`.

        Args:
            texts_sha256: Over all texts in order.
            sizes: How many texts each chunk has.
        """
        asked = json.dumps([self._conditions, {"texts": texts_sha256, "chunks": list(sizes)}], sort_keys=True)
        self._folder = f"{self._root}/{hashlib.sha256(asked.encode()).hexdigest()}"
        fitting = self._fitting(len(sizes), lambda entry: len(entry.chances) == sizes[entry.row])
        return {entry.row: entry.chances for entry in fitting}

    def _fitting(self, parts: int, fits: Callable[[_Entry], bool]) -> Iterator[_Entry]:
        """The entries in the folder that fit what is asked, which has so many parts."""
        # platforms that copy a folder away add files of their own to it: only names with our ending are ours
        names = [info.key for info in self._store.list(f"{self._folder}/") if info.key.endswith(_ENDING)]
        for entry in (entry for name in names for entry in self._read(name)):
            if 0 <= entry.row < parts and fits(entry):
                self._others |= {entry.run} - {self._run}
                yield entry

    def _read(self, key: str) -> list[_Entry]:
        name = key.rpartition("/")[2].partition(".")[0]
        why = "its content does not match the hash in its name"
        try:
            stored = self._store.read(key)
            if stored is not None and hashlib.sha256(stored.data).hexdigest() == name:
                return [_Entry.model_validate_json(line) for line in stored.data.splitlines()]
        except (ValidationError, TooLarge) as error:
            why = str(error).splitlines()[0]
        get_logger().warning("cached scores are invalid and computed again", key=key, why=why)
        return []

    def add(self, number: int, found: list[list[ChoiceScore]] | list[Answer] | list[float]) -> None:
        """Adds what a numbered part has (see `_Entry`); saves if the last save was `SAVE_SECONDS` ago."""
        kind = "answers" if isinstance(found[0], Answer) else "chances" if isinstance(found[0], float) else "scores"
        self._added += 1
        self._unsaved.append(_Entry.model_validate({"row": number, "run": self._run, kind: found}))
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Writes what was added since the last save, as one object."""
        if self._unsaved:
            data = "".join(entry.model_dump_json(exclude_defaults=True) + "\n" for entry in self._unsaved).encode()
            self._store.write(f"{self._folder}/{hashlib.sha256(data).hexdigest()}{_ENDING}", data)
            self._unsaved = []
        self._saved_at = time.monotonic()
