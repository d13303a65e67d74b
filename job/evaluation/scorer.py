"""Scores a list of multiple-choice questions with a model. Needs no run, no storage and no lm-eval.

In a REPL:

    >>> import torch
    >>> from pathlib import Path
    >>> from job.evaluation.scorer import Question, score_questions
    >>> from job.model.load_base import load_base
    >>> from job.model.tokenizer import load_tokenizer
    >>> folder = Path("job/demo/base")
    >>> tokenizer = load_tokenizer(folder)
    >>> model = load_base(
    ...     folder, quantization="none", double_quantization=False, dtype=torch.float32, device=torch.device("cpu"),
    ...     max_length=512,
    ... )
    >>> def question(text, *choices):
    ...     ids = [tuple(tokenizer.encode(choice, add_special_tokens=False)) for choice in choices]
    ...     return Question(tuple(tokenizer.encode(text)), tuple(ids))
    >>> questions = [question("Is it red?", " yes", " no"), question("How many?", " one", " two", " three")]
    >>> [[round(choice.log_likelihood, 1) for choice in choices] for choices in score_questions(model, questions)]
    [[..., ...], [..., ..., ...]]

A run passes two more arguments: a `ScoreCache`, and `ParallelScoring`, which divides the work over processes. How one
packed sequence is scored is in `job.evaluation.scoring`; to score in another way, change `begin_scoring` only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from job.errors import TrainingFailed
from job.evaluation.resumable import complete
from job.evaluation.score_cache import ScoreCache
from job.evaluation.scoring import Forward, alike_together, begin_scoring, plan_sequences, score_sequence
from job.log import get_logger
from job.records import ChoiceScore, Question

Scores = list[list[ChoiceScore]]
"""For each question, the score of each choice."""
ScoreSequences = Callable[[Any, list[Question], Mapping[int, range]], Iterator[tuple[int, Scores]]]
"""Scores packed sequences: (model, questions, number of a sequence -> its range of questions) -> (number of the
sequence, scores of its questions), sequences in any order."""

BATCH_TOKENS = 8192


def score_questions(
    model: Any,
    questions: list[Question],
    batch_tokens: int = BATCH_TOKENS,
    *,
    cache: ScoreCache | None = None,
    score: ScoreSequences | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Scores:
    """The log-likelihood of every choice of every question, in order.

    Args:
        model: A causal language model from `load_base`, with or without an adapter.
        questions: Token ids of each context and of its choices.
        batch_tokens: Maximum tokens of one forward pass; changes only the last bits of a score.
        cache: Scores found here are not computed again; new ones are added.
        score: Scores sequences; None for `score_sequences`.
        on_progress: Called with the number of questions scored so far.

    Returns:
        For each question, the score of each choice; log-likelihoods in nats.

    Raises:
        TrainingFailed: A score is not finite.
    """
    order = alike_together(questions)
    ordered = [questions[number] for number in order]
    sequences = plan_sequences(ordered, batch_tokens)
    by_sequence = {} if cache is None else cache.load(ordered, sequences)
    missing = {number: sequence for number, sequence in enumerate(sequences) if number not in by_sequence}
    complete(by_sequence, (score or score_sequences)(model, ordered, missing), cache, on_progress)
    in_order = (scores for number in range(len(sequences)) for scores in by_sequence[number])
    by_question = dict(zip(order, in_order, strict=True))
    return [by_question[number] for number in range(len(questions))]


def score_sequences(
    model: Any,
    questions: list[Question],
    sequences: Mapping[int, range],
    forward: Forward | None = None,
    in_fp32: Forward | None = None,
) -> Iterator[tuple[int, Scores]]:
    """Scores packed sequences one after the other, in this process.

    On a GPU, a sequence is launched before the results of the previous one are read.

    Args:
        model: As for `score_questions`.
        questions: As for `score_questions`.
        sequences: Number of a sequence -> its range of questions.
        forward: Computes the logits; None for the model's own code.
        in_fp32: Recomputes a sequence whose scores are not finite, since values may be too large for `forward`.

    Raises:
        TrainingFailed: A score is not finite.
    """
    model.eval()
    before: tuple[int, Callable[[], Scores], Callable[[], Scores] | None] | None = None
    for number, sequence in sequences.items():
        packed = questions[sequence.start : sequence.stop]
        wait = begin_scoring(model, packed, forward)
        again = None if in_fp32 is None else partial(score_sequence, model, packed, in_fp32)
        if before is not None:
            yield _checked(*before)
        before = number, wait, again
    if before is not None:
        yield _checked(*before)


def _checked(number: int, wait: Callable[[], Scores], again: Callable[[], Scores] | None) -> tuple[int, Scores]:
    """Waits for the scores of a sequence; `again` computes them in fp32 if they are not finite."""
    scores = wait()
    if again is not None and not finite(scores):
        get_logger().warning(
            "activations are too large for fp16, so these questions are scored in fp32", sequence=number
        )
        scores = again()
    # A diverged model scores NaN. It must be refused here, because a maximum over NaN still selects a choice.
    if not finite(scores):
        raise TrainingFailed(
            "the model's scores are not finite. With an adapter: it diverged; lower JOB_TRAIN__LEARNING_RATE. "
            "Without: the base's numbers are too large for its dtype; set JOB_MODEL__DTYPE to bf16 or fp32"
        )
    return number, scores


def finite(scores: Scores) -> bool:
    """Whether all log-likelihoods are numbers."""
    return all(math.isfinite(choice.log_likelihood) for choices in scores for choice in choices)
