"""Samples: one record for each question of an evaluation, and the figures that all samples of a task add up to.

`verify` and `compare` read samples from any folder a user names, so `parse` validates every field.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from job.common.validation import first_error
from job.evaluation.near_ties import close_questions
from job.evaluation.statistics import standard_error
from job.records import TaskScores

HASHES = ("doc_hash", "prompt_hash", "target_hash")
"""SHA-256 of a question's row, its prompt and its right answer, as lm-eval computes them; together: the task's hash."""

FEWEST = 2
"""One question has no standard error."""

T = TypeVar("T", bound=BaseModel)
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ZeroOrOne = Annotated[float, Field(ge=0, le=1, multiple_of=1)]


class Sample(BaseModel):
    """One question, as one model answered it. The order of the fields is that of the published file.

    Attributes:
        id: The row's own id, else its number.
        question: The prompt; for tasks with several contexts, the words that continue them.
        choices: As text.
        log_likelihoods: Log-likelihood of each choice given the question, in nats.
        choice_lengths: In characters.
        prediction: Index of the likeliest choice.
        prediction_norm: Index of the choice with the largest log-likelihood per character.
        gold: The right choice as the task gives it: an index, several indices, or text.
        acc: 1 where `prediction` is right.
        acc_norm: 1 where `prediction_norm` is right; None where the task does not have that metric.
    """

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    id: str
    doc_hash: Sha256
    prompt_hash: Sha256
    target_hash: Sha256
    question: str | None = None
    choices: list[str] | None = None
    log_likelihoods: list[float] = Field(min_length=1)
    choice_lengths: list[Annotated[int, Field(ge=1)]]
    prediction: int
    prediction_norm: int
    gold: Any
    acc: ZeroOrOne
    acc_norm: ZeroOrOne | None


class MeasuredSample(BaseModel):
    """One question of a task without choices, as one model answered it. The order of the fields is that of the file.

    Attributes:
        id: The row's own id, else its number.
        prompt: What the model was given; for a perplexity task, the text itself.
        target: The right answer as the task gives it.
        responses: Generated answers, or log-likelihoods; several where the task asks several times.
        filtered: By lm-eval's name of a filter, what it made of the responses.
        values: By metric and filter (`exact_match,strict-match`), value and weight; see `task_metrics`.
    """

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    id: str
    doc_hash: Sha256
    prompt_hash: Sha256
    target_hash: Sha256
    prompt: str
    target: Any
    responses: list[Any]
    filtered: dict[str, Any]
    values: dict[str, tuple[float, Annotated[float, Field(gt=0)]]]


def write_samples(path: Path, samples: Sequence[Sample] | Sequence[MeasuredSample]) -> None:
    """Writes one JSON line for each sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(sample.model_dump(), allow_nan=False) + "\n" for sample in samples)
    path.write_text("".join(lines), encoding="utf-8")


def parse(data: bytes) -> list[Sample]:
    """The samples in a file of JSON lines.

    Raises:
        ValueError: With the first line that is not a sample.
    """
    return _parse(data, Sample)


def parse_measured(data: bytes) -> list[MeasuredSample]:
    """The samples of a task without choices in a file of JSON lines.

    Raises:
        ValueError: With the first line that is not a sample.
    """
    return _parse(data, MeasuredSample)


def _parse(data: bytes, kind: type[T]) -> list[T]:
    samples = []
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            samples.append(kind.model_validate_json(line))
        except ValidationError as error:
            raise ValueError(f"line {number}, {first_error(error)}") from None
    if len(samples) < FEWEST:
        raise ValueError(f"holds {len(samples)} record; a comparison needs {FEWEST}")
    return samples


def contradiction(sample: Sample) -> str | None:
    """Which field of a sample contradicts its log-likelihoods; None if none does.

    Whether the answer is right cannot be checked where `gold` is text: the sample does not say which choice that is.
    """
    if len(sample.log_likelihoods) != len(sample.choice_lengths):
        return "does not have a length for each likelihood"
    normalized = [value / length for value, length in zip(sample.log_likelihoods, sample.choice_lengths, strict=True)]
    golds = sample.gold if isinstance(sample.gold, list) else [sample.gold]
    indices = all(isinstance(gold, int) for gold in golds)
    for name, values, prediction, correct in (
        ("acc", sample.log_likelihoods, sample.prediction, sample.acc),
        ("acc_norm", normalized, sample.prediction_norm, sample.acc_norm),
    ):
        best = values.index(max(values))
        if prediction != best:
            return f"predicts choice {prediction} by {name}, and choice {best} is the likeliest"
        if indices and correct is not None and correct != (best in golds):
            return f"has {name} {correct:g}, with choice {best} for {sample.gold}"
    return None


def task_scores(
    samples: Sequence[Sample],
    *,
    task: str,
    source: str,
    version: str,
    reused_from: str | None = None,
    num_fewshot: int = 0,
    bound: float = 0.0,
) -> TaskScores:
    """The figures of one task.

    Args:
        samples: In the order of the questions; two at least.
        task: Name of the task.
        source: Where its questions came from.
        version: lm-eval's, of the task.
        reused_from: Folder of the score cache that all scores came from, if they did.
        num_fewshot: Examples in every prompt.
        bound: As for `close_questions`.
    """
    correct = [sample.acc == 1 for sample in samples]
    by_length = [sample.acc_norm for sample in samples]
    correct_norm = None if None in by_length else [right == 1 for right in by_length]
    hashes = "".join(getattr(sample, name) for sample in samples for name in HASHES)
    return TaskScores(
        task=task,
        source=source,
        task_hash=hashlib.sha256(hashes.encode()).hexdigest(),
        version=version,
        n=len(correct),
        acc=sum(correct) / len(correct),
        stderr=standard_error(correct),
        acc_norm=sum(correct_norm) / len(correct_norm) if correct_norm else None,
        acc_norm_stderr=standard_error(correct_norm) if correct_norm else None,
        correct=tuple(correct),
        correct_norm=tuple(correct_norm) if correct_norm else None,
        reused_from=reused_from,
        num_fewshot=num_fewshot,
        close=close_questions(samples, by_length=False, bound=bound),
        close_norm=close_questions(samples, by_length=True, bound=bound) if correct_norm else None,
    )
