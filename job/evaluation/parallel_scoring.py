"""Divides the sequences to score over the processes of a run. Scores do not depend on which process computes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from job.distributed.processes import Processes
from job.evaluation.generation import HowToGenerate, answer_batches
from job.evaluation.scorer import Scores, ScoreSequences, score_sequences
from job.records import Answer, Question

_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class _Work:
    """What process 0 sends to the others: all questions, and number, start and end of each sequence to score."""

    questions: list[Question]
    sequences: list[tuple[int, int, int]]
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    """Instead, what is to be answered; with number and prompts of each batch, and how."""
    batches: list[tuple[int, list[int]]] = field(default_factory=list)
    how: HowToGenerate | None = None


@dataclass(frozen=True)
class ParallelScoring:
    """Scoring by all processes of a run. Process 0 calls `score` any number of times, then `finish`; the others `help`.

    Attributes:
        processes: Those that share the work; with one of them, `score` is `score_sequences`.
        alive: Called before each sequence and while waiting (then with `progress=`): tells the watchdog that the
            process is alive, and raises Preempted if the job has to stop.
        scoring: How one process scores sequences.
    """

    processes: Processes
    alive: Callable[..., None]
    scoring: ScoreSequences = score_sequences

    def score(
        self, model: Any, questions: list[Question], sequences: Mapping[int, range]
    ) -> Iterator[tuple[int, Scores]]:
        """Scores sequences (see `scorer.ScoreSequences`); gives each as soon as any process has scored it."""
        if self.processes.place.world_size > 1:
            work = _Work(questions, [(number, part.start, part.stop) for number, part in sequences.items()])
            self.processes.share("questions", lambda: TypeAdapter(_Work).dump_json(work).decode())
        yield from self._gathered(self._own_share(model, questions, sequences), len(sequences), Scores)

    def answer(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        batches: Mapping[int, Sequence[int]],
        how: HowToGenerate,
    ) -> Iterator[tuple[int, list[Answer]]]:
        """Answers batches (see `generation.AnswerBatches`); gives each as soon as any process has answered it."""
        if self.processes.place.world_size > 1:
            split = [(number, list(batch)) for number, batch in batches.items()]
            work = _Work([], [], [tuple(prompt) for prompt in prompts], split, how)
            self.processes.share("questions", lambda: TypeAdapter(_Work).dump_json(work).decode())
        own = self._own_batches(model, tokenizer, prompts, batches, how)
        yield from self._gathered(own, len(batches), list[Answer])

    def _gathered(self, own: Iterator[tuple[int, Any]], left: int, kind: Any) -> Iterator[tuple[int, Any]]:
        """What this process computes and, in between and afterwards, what the others have sent."""
        for computed in own:
            arrived = [computed, *self._received(kind)]
            left -= len(arrived)
            yield from arrived
        while left:
            arrived = self._received(kind)
            self.alive(progress=bool(arrived))
            left -= len(arrived)
            yield from arrived
            if not arrived:
                time.sleep(_POLL_SECONDS)

    def finish(self) -> None:
        """In process 0: lets the others return from `help`."""
        self.processes.share("questions", str)

    def help(self, model: Any, tokenizer: Any = None) -> None:
        """In all processes but 0: scores this process's share of every piece of work until process 0 is finished."""
        while text := self.processes.share("questions", str):
            work = TypeAdapter(_Work).validate_json(text)
            if work.how is not None:
                for number, answers in self._own_batches(model, tokenizer, work.prompts, dict(work.batches), work.how):
                    self.processes.send([number, TypeAdapter(list[Answer]).dump_python(answers)])
            sequences = {number: range(start, stop) for number, start, stop in work.sequences}
            for number, scores in self._own_share(model, work.questions, sequences):
                self.processes.send([number, TypeAdapter(Scores).dump_python(scores)])

    def _received(self, kind: Any) -> list[tuple[int, Any]]:
        read = TypeAdapter(kind).validate_python
        return [(number, read(found)) for number, found in self.processes.receive()]

    def _own_batches(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        batches: Mapping[int, Sequence[int]],
        how: HowToGenerate,
    ) -> Iterator[tuple[int, list[Answer]]]:
        """Every n-th batch, where n is the number of processes."""
        place = self.processes.place
        for number in list(batches)[place.rank :: place.world_size]:
            self.alive()
            yield from answer_batches(model, tokenizer, prompts, {number: batches[number]}, how)

    def _own_share(
        self, model: Any, questions: list[Question], sequences: Mapping[int, range]
    ) -> Iterator[tuple[int, Scores]]:
        """Every n-th sequence, where n is the number of processes."""
        place = self.processes.place
        for number in list(sequences)[place.rank :: place.world_size]:
            self.alive()
            yield from self.scoring(model, questions, {number: sequences[number]})
