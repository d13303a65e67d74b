"""The log-probabilities of preferences by the reference model: computed once in a run, and published.

The reference is the base with the adapter switched off, or the adapter that training starts from, so there is never a
second model in memory. The values are cached like scores while they are computed, so that a restart resumes, and runs
with the same base, data and initial adapter share them. They are then published as one artifact, which every later
attempt reads, so that a run continues with the same numbers on other hardware, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from job import log
from job.common.hashing import code_hashes
from job.data.examples import Examples
from job.evaluation.parallel_scoring import ParallelScoring
from job.evaluation.score_cache import ScoreCache, score_conditions
from job.evaluation.scorer import Scores, score_questions
from job.model.lora import adapter_off
from job.records import Artifact, ChoiceScore, Example, Question, Referenced
from job.runs.attempt import Attempt, published_once
from job.runs.layout import LOG_PROBS, REFERENCE, SCORES
from job.stages.evaluate import base_facts
from job.stages.handoff import Loaded, Sources
from job.storage.open import ObjectStore
from job.training.preference_gradient import reference_log_probs

CODE = ("job.training.lm_head_loss", "job.training.packing", "job.training.preference_gradient")
"""Modules whose code decides these numbers, besides those that decide scores."""

NAME = "the reference's log-probabilities"


def with_reference(
    attempt: Attempt, run_id: str, sources: Sources, loaded: Loaded, shared: ObjectStore
) -> tuple[Examples, Sequence[Example], list[Artifact]]:
    """The examples, and those for validation, with the reference's log-probabilities; and the file that has them all.

    Called in all processes, before training changes the adapter. `shared` is the store of all runs, where the values
    are cached under the name of the run `run_id`.

    Raises:
        TrainingFailed: A log-probability is not finite.
        Preempted: The job was asked to stop; what was computed is kept.
    """
    processes = attempt.processes
    record = processes.broadcast(
        "reference that is known", lambda: published_once(attempt, REFERENCE, Referenced, NAME)
    )
    if not record:
        scores = _compute(attempt, run_id, sources, loaded, shared)
        record = processes.broadcast("reference", lambda: _publish(attempt, scores))
    artifact = Artifact(**json.loads(record))
    path = processes.broadcast_on_machine("reference on this machine", lambda: str(attempt.fetch(artifact)))
    values = [tuple(json.loads(line)) for line in Path(path).read_bytes().splitlines()]
    rows, validation = len(sources.examples), sources.validation
    if isinstance(validation, Examples):
        validation = validation.with_references(values[rows:])
    return sources.examples.with_references(values[:rows]), validation, [artifact]


def _publish(attempt: Attempt, scores: Scores | None) -> str:
    path = attempt.work / LOG_PROBS
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps([score.log_likelihood for score in of_row]) + "\n" for of_row in scores or ())
    path.write_text("".join(lines), encoding="utf-8")
    artifact = attempt.publish(path, LOG_PROBS)
    attempt.write_record(REFERENCE, json.dumps(asdict(Referenced([artifact]))))
    return json.dumps(asdict(artifact))


def _compute(attempt: Attempt, run_id: str, sources: Sources, loaded: Loaded, shared: ObjectStore) -> Scores | None:
    """The log-probabilities, in process 0; the others help."""
    examples, model = [*sources.examples, *sources.validation], loaded.model
    compute = reference_log_probs(model, fused=loaded.plan.fused)

    def score(_model: Any, _questions: list[Question], sequences: Mapping[int, range]) -> Iterator[tuple[int, Scores]]:
        for number, part in sequences.items():
            sums = compute(examples[part.start : part.stop])
            yield (
                number,
                [[ChoiceScore(log_probability, greedy=False) for log_probability in of_row] for of_row in sums],
            )

    advice = "lower JOB_TRAIN__MICRO_BATCH_TOKENS or JOB_TRAIN__MAX_LENGTH"
    parallel = ParallelScoring(attempt.processes, attempt.check_stop, score, advice)
    with _as_reference(sources, model):
        if not attempt.processes.leads:
            parallel.help(model)
            return None
        # As questions: each sequence is a choice after an empty prompt. Which tokens are targets is in the data's hash.
        rows = [Question((), tuple(sequence.input_ids for sequence in example.sequences)) for example in examples]
        cache = ScoreCache(shared, SCORES, run_id, _conditions(sources, loaded))
        with log.progress("reference rows", len(rows), every=max(1, len(rows) // 10)) as show_progress:

            def on_progress(done: int) -> None:
                attempt.questions = done  # progress, for the limit of attempts without any
                show_progress(done)

            log_probabilities = score_questions(
                model, rows, loaded.micro_batch_tokens, cache=cache, score=parallel.score, on_progress=on_progress
            )
        parallel.finish()
    return log_probabilities


def _as_reference(sources: Sources, model: Any) -> AbstractContextManager[None]:
    """The model as the reference: with the adapter that training starts from, if there is one, which it still has."""
    return adapter_off(model) if sources.start is None else nullcontext()


def _conditions(sources: Sources, loaded: Loaded) -> dict[str, Any]:
    """Everything but the rows' tokens that determines the log-probabilities."""
    facts = {**base_facts(loaded), "adapter": sources.record.start_sha256}
    data = sources.record.dataset
    validation_hash = {} if data.validation is None else {"validation": data.validation.sha256}
    return score_conditions({**facts, "data": data.sha256, **validation_hash, "reference": code_hashes(*CODE)})
