"""Scoring all questions of an evaluation: row by row, skipping what is kept, shared out over the processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from job import log
from job.common import host
from job.common.hashing import code_hashes
from job.distributed.processes import Processes
from job.errors import TrainingFailed
from job.evaluation.score_cache import ScoreCache, score_key
from job.evaluation.scoring import plan_sequences, score_sequence
from job.records import ChoiceScore, Question

Scored = list[list[ChoiceScore]]

CODE = (
    "job.evaluation.scoring",
    "job.model.base",
    "job.model.fused.frozen_weights",
    "job.model.fused.kernels",
    "job.model.fused.lora_forward",
    "job.model.fused.triton_kernels",
    "job.model.lora",
    "job.model.packed_attention",
)
"""Modules whose code decides what a score is."""
_PAUSE_SECONDS = 0.01


@dataclass(frozen=True)
class _Work:
    """What there is to score: the questions, and which of their rows nobody has scored yet."""

    questions: list[Question]
    missing: list[int]


class Scorer:
    """Scores questions row by row, skipping what is kept already, with progress, ready to stop between two rows.

    Called in process 0, which deals the rows out; the others meanwhile `help`. Who scores a row changes nothing of it.

    Args:
        model: A PEFT model over a base with packed attention.
        batch_tokens: How many tokens are scored at once.
        kept: Scores of earlier attempts.
        conditions: What the scores depend on beside machine, software and code: they are kept under a hash of it.
        processes: Those that share the work.
        alive: Called wherever scoring gets on and stopping is safe; `progress=False` while it waits for others.
    """

    def __init__(
        self,
        model: Any,
        batch_tokens: int,
        kept: ScoreCache,
        conditions: dict[str, Any],
        *,
        processes: Processes,
        alive: Callable[..., None],
    ) -> None:
        self.model, self.batch_tokens, self.kept, self.processes = model, batch_tokens, kept, processes
        self.alive = alive
        machine = host.hardware()
        self.conditions = {
            **conditions,
            "software": host.software(),
            "cpu": machine["cpu"],
            "gpus": machine["gpus"],
            "driver": machine["driver"],
            "code": code_hashes(*CODE),
        }
        self.scored = 0
        """Rows that were scored now."""
        self.folder = ""

    def __call__(self, questions: list[Question]) -> Scored:
        """The scores of all questions, in order."""
        rows = plan_sequences(questions, self.batch_tokens)
        self.folder = self.kept.open(score_key(questions, rows, self.conditions))
        known = self.kept.load(questions, rows)
        missing = [number for number in range(len(rows)) if number not in known]
        if self.processes.place.world_size > 1:
            work = _Work(questions, missing)
            self.processes.share("questions", lambda: TypeAdapter(_Work).dump_json(work).decode())
        with log.progress("questions", len(questions), every=max(1, len(questions) // 10)) as tell:
            tell(sum(map(len, known.values())))
            try:
                for number, scores in self._scored(questions, rows, missing):
                    known[number] = scores
                    self.kept.add(number, scores)
                    self.scored += 1
                    tell(sum(map(len, known.values())))
            finally:
                self.kept.save()
        return [scores for number in range(len(rows)) for scores in known[number]]

    def _scored(self, questions: list[Question], rows: list[range], missing: list[int]) -> Iterator[tuple[int, Scored]]:
        """All rows that are missing, as they get done, here and in the other processes."""
        left = len(missing)
        for number, scores in self._own(questions, rows, missing):
            here = [(number, scores), *self._from_others()]
            left -= len(here)
            yield from here
        while left:
            here = self._from_others()
            self.alive(progress=bool(here))
            left -= len(here)
            yield from here
            time.sleep(0 if here else _PAUSE_SECONDS)

    def _from_others(self) -> list[tuple[int, Scored]]:
        read = TypeAdapter(Scored).validate_python
        return [(number, read(scores)) for number, scores in self.processes.receive()]

    def help(self) -> None:
        """Scores this process's share of the rows that are missing, until process 0 says that there is nothing more."""
        processes = self.processes
        while text := processes.share("questions", str):
            work = TypeAdapter(_Work).validate_json(text)
            rows = plan_sequences(work.questions, self.batch_tokens)
            for number, scores in self._own(work.questions, rows, work.missing):
                processes.send([number, TypeAdapter(Scored).dump_python(scores)])

    def _own(self, questions: list[Question], rows: list[range], missing: list[int]) -> Iterator[tuple[int, Scored]]:
        """This process's share of the rows that are missing."""
        place = self.processes.place
        self.model.eval()
        for number in missing[place.rank :: place.world_size]:
            self.alive()
            yield number, _finite(score_sequence(self.model, questions[rows[number].start : rows[number].stop]))


def _finite(scores: Scored) -> Scored:
    """The scores, if they are numbers: a model that diverged answers with NaN, and NaN has a first choice too."""
    if all(math.isfinite(choice.log_likelihood) for choices in scores for choice in choices):
        return scores
    raise TrainingFailed("the model's scores are not finite: it diverged. Lower JOB_TRAIN__LEARNING_RATE")
