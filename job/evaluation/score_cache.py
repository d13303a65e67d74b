"""Keeps scores in an object store, so that a killed evaluation resumes, and runs on the same base share its scores.

The key is a SHA-256 of everything that determines the bits of a score: the questions' token ids, how they are packed,
the model's files and precision, the adapter, package versions, the hardware, and the source code that computes it
(`CODE`). Two evaluations with the same key compute the same bits, so either may reuse the other's scores.

Layout: `scores/<key>/<sha256 of the file>.jsonl`, one line for each packed sequence that was scored. Generated answers
are kept in the same way, with a key over prompts and generation options, and one line for each batch; probabilities
that texts are unsafe with a key over the texts, and one line for each chunk of texts.
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
from job.evaluation.generation import GenerationOptions
from job.log import get_logger
from job.records import Answer, ChoiceScore, Question
from job.storage.open import ObjectStore, TooLarge, is_key

SAVE_SECONDS = 15.0
_ENDING = ".jsonl"

CODE = (
    "job.common.device_copies",
    "job.common.gpu_context",
    "job.common.out_of_memory",
    "job.common.pinned_memory",
    "job.evaluation.decoding",
    "job.evaluation.generation",
    "job.evaluation.generation_batches",
    "job.evaluation.key_value_cache",
    "job.evaluation.prefix_tree",
    "job.evaluation.resumable",
    "job.evaluation.scoring",
    "job.evaluation.token_sampling",
    "job.model.adapter_files",
    "job.model.adapter_options",
    "job.model.architecture",
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
    "job.model.load_base",
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

A test compares this list with the import graph: all modules that scoring and the model's forward pass import, except
modules of plain values (`records`, `common.hashing`) and messages (`errors`).
"""


def score_conditions(of_model: Mapping[str, Any]) -> dict[str, Any]:
    """Everything except the questions that determines a score, as JSON-able values by name.

    Args:
        of_model: The caller's part of it: model, precision, adapter, forward pass.
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
        sequences: The range of questions of each packed sequence. Part of the key, because the shape of a matrix
            product determines the order of additions, and with it the last bits of a score.
        conditions: From `score_conditions`.
    """
    total = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode())
    for sequence in sequences:
        total.update(b"row")  # the separator; another one would invalidate all existing keys
        for question in questions[sequence.start : sequence.stop]:
            total.update(json.dumps([question.context, question.choices]).encode())
    return total.hexdigest()


def answers_key(
    prompts: Sequence[Sequence[int]],
    batches: Sequence[Sequence[int]],
    options: GenerationOptions,
    conditions: Mapping[str, Any],
) -> str:
    """SHA-256 of what determines generated answers, hexadecimal; which prompts share a batch is part of it."""
    request = {
        "answers": [list(prompt) for prompt in prompts],
        "batches": list(map(list, batches)),
        "how": asdict(options),
    }
    return hashlib.sha256(json.dumps([conditions, request], sort_keys=True).encode()).hexdigest()


class _Entry(BaseModel):
    """One line of a file: the scores of a packed sequence, the answers of a batch, or the probabilities of a chunk.

    Attributes:
        row: Number of the sequence, batch or chunk.
        run: Id of the run that computed it.
        scores: For each question of the sequence, the score of each choice.
        answers: The answers of the batch.
        chances: For each text of the chunk, the probability that it is unsafe.
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
        store: The store of the scores.
        folder: Folder of all scores in the store.
        run: Id of this run, which is recorded with each score that it adds.
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
        """The scores' folder and the runs that computed them, as text; None unless all scores were reused."""
        if self._added or not self._others:
            return None
        return f"{self._store.uri}/{self._folder} (run {', '.join(sorted(self._others))})"

    def load(self, questions: Sequence[Question], sequences: Sequence[range]) -> dict[int, list[list[ChoiceScore]]]:
        """The cached scores by number of the sequence.

        A file whose content does not match its name is skipped with a warning, an entry that does not match its
        questions without one. Skipped scores are computed again.
        """
        self._folder = f"{self._root}/{score_key(questions, sequences, self._conditions)}"

        def fits(entry: _Entry) -> bool:
            packed = questions[sequences[entry.row].start : sequences[entry.row].stop]
            return [len(question.choices) for question in packed] == [len(choices) for choices in entry.scores]

        return {entry.row: entry.scores for entry in self._fitting(len(sequences), fits)}

    def load_answers(
        self, prompts: Sequence[Sequence[int]], batches: Sequence[Sequence[int]], options: GenerationOptions
    ) -> dict[int, list[Answer]]:
        """The cached answers by number of the batch; entries that do not match are skipped, as by `load`."""
        self._folder = f"{self._root}/{answers_key(prompts, batches, options, self._conditions)}"
        fitting = self._fitting(len(batches), lambda entry: len(entry.answers) == len(batches[entry.row]))
        return {entry.row: entry.answers for entry in fitting}

    def load_chances(self, texts_sha256: str, sizes: Sequence[int]) -> dict[int, list[float]]:
        """The cached probabilities by number of the chunk; entries that do not match are skipped, as by `load`.

        Args:
            texts_sha256: SHA-256 over all texts in order.
            sizes: Number of texts in each chunk.
        """
        content = json.dumps([self._conditions, {"texts": texts_sha256, "chunks": list(sizes)}], sort_keys=True)
        self._folder = f"{self._root}/{hashlib.sha256(content.encode()).hexdigest()}"
        fitting = self._fitting(len(sizes), lambda entry: len(entry.chances) == sizes[entry.row])
        return {entry.row: entry.chances for entry in fitting}

    def _fitting(self, parts: int, fits: Callable[[_Entry], bool]) -> Iterator[_Entry]:
        """The entries in the folder whose number is below `parts` and that match, by `fits`."""
        # Platforms that copy a folder add files of their own to it; the job's files have this ending.
        listed = [info.key for info in self._store.list(f"{self._folder}/")]
        names = [key for key in listed if key.endswith(_ENDING) and is_key(key)]
        for entry in (entry for name in names for entry in self._read(name)):
            if 0 <= entry.row < parts and fits(entry):
                self._others |= {entry.run} - {self._run}
                yield entry

    def _read(self, key: str) -> list[_Entry]:
        name = key.rpartition("/")[2].partition(".")[0]
        reason = "its content does not match the hash in its name"
        try:
            stored = self._store.read(key)
            if stored is not None and hashlib.sha256(stored.data).hexdigest() == name:
                return [_Entry.model_validate_json(line) for line in stored.data.splitlines()]
        except (ValidationError, TooLarge) as error:
            reason = str(error).splitlines()[0]
        get_logger().warning("cached scores are invalid and computed again", key=key, why=reason)
        return []

    def add(self, number: int, results: list[list[ChoiceScore]] | list[Answer] | list[float]) -> None:
        """Adds the results of a sequence, batch or chunk; saves if the last save was `SAVE_SECONDS` ago."""
        kind = "answers" if isinstance(results[0], Answer) else "chances" if isinstance(results[0], float) else "scores"
        self._added += 1
        self._unsaved.append(_Entry.model_validate({"row": number, "run": self._run, kind: results}))
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Writes what was added since the last save, as one object."""
        if self._unsaved:
            data = "".join(entry.model_dump_json(exclude_defaults=True) + "\n" for entry in self._unsaved).encode()
            self._store.write(f"{self._folder}/{hashlib.sha256(data).hexdigest()}{_ENDING}", data)
            self._unsaved = []
        self._saved_at = time.monotonic()
