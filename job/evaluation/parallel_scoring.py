"""Divides the sequences to score over the processes of a run. Scores do not depend on which process computes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from job.common.out_of_memory import memory_errors
from job.common.validation import adapter_of
from job.distributed.processes import Processes
from job.evaluation.generation import GenerationOptions, answer_batches
from job.evaluation.scorer import Scores, ScoreSequences, score_sequences
from job.records import Answer, Question

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class _Work:
    """What process 0 sends to the others: questions with their packed sequences, or prompts with their batches.

    Attributes:
        parts: What is computed together, by number: start and end of a sequence, or the numbers of a batch's prompts.
        questions: To be scored.
        prompts: Instead of questions, to be answered.
        generation: How prompts are answered; None for questions.
    """

    parts: dict[int, list[int]]
    questions: list[Question] = field(default_factory=list)
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    generation: GenerationOptions | None = None

    @property
    def result(self) -> TypeAdapter[Any]:
        """The type of what is computed for a part."""
        return adapter_of(Scores if self.generation is None else list[Answer])


@dataclass(frozen=True)
class ParallelScoring:
    """Scoring by all processes of a run.

    Process 0 calls `score` or `answer` any number of times, then `finish`; the others `help`.

    Attributes:
        processes: Those that share the work; with one of them, `score` is `score_sequences`.
        check_stop: Called before and after each sequence, before each token of answers, and while waiting (then with
            `progress=`): tells the watchdog that the process is alive, and raises Preempted if the job has to stop.
        scoring: How one process scores sequences.
        lower: What to do where memory is too small for a sequence.
    """

    processes: Processes
    check_stop: Callable[..., None]
    scoring: ScoreSequences = score_sequences
    lower: str = "lower JOB_EVAL__BATCH_TOKENS"

    def score(
        self, model: Any, questions: list[Question], sequences: Mapping[int, range]
    ) -> Iterator[tuple[int, Scores]]:
        """Scores sequences (see `scorer.ScoreSequences`); gives each as soon as any process has scored it."""
        parts = {number: [part.start, part.stop] for number, part in sequences.items()}
        yield from self._divided(_Work(parts, questions=questions), model)

    def answer(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        batches: Mapping[int, Sequence[int]],
        options: GenerationOptions,
    ) -> Iterator[tuple[int, list[Answer]]]:
        """Answers batches (see `generation.AnswerBatches`); gives each as soon as any process has answered it."""
        parts = {number: list(batch) for number, batch in batches.items()}
        yield from self._divided(
            _Work(parts, prompts=[tuple(prompt) for prompt in prompts], generation=options), model, tokenizer
        )

    def finish(self) -> None:
        """In process 0: lets the others return from `help`."""
        self.processes.broadcast("questions", str)

    def help(self, model: Any, tokenizer: Any = None) -> None:
        """In all processes but 0: computes this process's part of every piece of work until process 0 is finished."""
        while text := self.processes.broadcast("questions", str):
            work = adapter_of(_Work).validate_json(text)
            for number, computed in self._own_part(work, model, tokenizer):
                self.processes.send([number, work.result.dump_python(computed)])

    def _divided(self, work: _Work, model: Any, tokenizer: Any = None) -> Iterator[tuple[int, Any]]:
        """What this process computes and, in between and afterwards, what the others have sent."""
        if self.processes.place.world_size > 1:
            self.processes.broadcast("questions", lambda: adapter_of(_Work).dump_json(work).decode())
        remaining = len(work.parts)
        for computed in self._own_part(work, model, tokenizer):
            arrived = [computed, *self._received(work)]
            remaining -= len(arrived)
            yield from arrived
        while remaining:
            arrived = self._received(work)
            self.check_stop(progress=bool(arrived))
            remaining -= len(arrived)
            yield from arrived
            if not arrived:
                time.sleep(_POLL_SECONDS)

    def _received(self, work: _Work) -> list[tuple[int, Any]]:
        read = work.result.validate_python
        return [(number, read(computed)) for number, computed in self.processes.receive()]

    def _own_part(self, work: _Work, model: Any, tokenizer: Any) -> Iterator[tuple[int, Any]]:
        """Every n-th part, where n is the number of processes."""
        from job.model.placed_weights import taking_part  # torch, which process 0 of a run without a model lacks

        process = self.processes.place
        # A process whose memory ran out would else give the others their shares of the base's weights until they are
        # finished. As an error of the job it ends them, like any other.
        words = memory_errors("sequences were scored", self.lower)
        with taking_part(model), words if process.world_size > 1 else nullcontext():
            numbers = list(work.parts)[process.rank :: process.world_size]
            if not numbers:  # `scoring` may load a model first
                return
            self.check_stop()
            # All at once, so that a GPU computes one sequence while the host prepares the next.
            if work.generation is None:
                for scored in self.scoring(
                    model, work.questions, {number: range(*work.parts[number]) for number in numbers}
                ):
                    yield scored
                    self.check_stop()
                return
            for number in numbers:
                self.check_stop()
                batch = {number: work.parts[number]}
                yield from answer_batches(
                    model, tokenizer, work.prompts, batch, work.generation, check_stop=self.check_stop
                )
