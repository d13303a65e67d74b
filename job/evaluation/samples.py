"""Records of an evaluation, one a question: what one holds, and the figures that all of a task add up to.

They are read back as if an enemy had written them: `verify` and `compare` take them from wherever they are told to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from job.evaluation.statistics import standard_error
from job.records import TaskScores

HASHES = ("doc_hash", "prompt_hash", "target_hash")
"""Of a question, as lm-eval has them: its row, what was asked, the right answer. Together they make the task's hash."""

FEWEST = 2
"""One question has no standard error."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Mark = Annotated[float, Field(ge=0, le=1, multiple_of=1)]


class Sample(BaseModel):
    """One question, as far as figures depend on it. Likelihoods are in nats, lengths in characters."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    id: str
    doc_hash: Sha256
    prompt_hash: Sha256
    target_hash: Sha256
    log_likelihoods: list[float] = Field(min_length=1)
    choice_lengths: list[Annotated[int, Field(ge=1)]]
    prediction: int
    prediction_norm: int
    gold: Any
    acc: Mark
    acc_norm: Mark | None


def parse(data: bytes) -> list[Sample]:
    """The records in a file of JSON lines.

    Raises:
        ValueError: With the first line that holds none.
    """
    records = []
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            records.append(Sample.model_validate_json(line))
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"line {number}{place and ', '}{place}: {first['msg'][:200]}") from None
    if len(records) < FEWEST:
        raise ValueError(f"holds {len(records)} record; a comparison needs {FEWEST}")
    return records


def contradiction(record: Sample) -> str | None:
    """What in a record does not follow from its likelihoods; None where all of it does.

    A right answer that is told in words cannot be checked here: the record does not say which choice it is.
    """
    if len(record.log_likelihoods) != len(record.choice_lengths):
        return "has not a length for each likelihood"
    normalized = [value / length for value, length in zip(record.log_likelihoods, record.choice_lengths, strict=True)]
    golds = record.gold if isinstance(record.gold, list) else [record.gold]
    told = all(isinstance(gold, int) for gold in golds)
    for name, values, prediction, mark in (
        ("acc", record.log_likelihoods, record.prediction, record.acc),
        ("acc_norm", normalized, record.prediction_norm, record.acc_norm),
    ):
        best = values.index(max(values))
        if prediction != best:
            return f"predicts choice {prediction} by {name}, and choice {best} is the likeliest"
        if told and mark is not None and mark != (best in golds):
            return f"has {name} {mark:g}, with choice {best} for {record.gold}"
    return None


def tally(
    *,
    task: str,
    source: str,
    version: str,
    hashes: Iterable[str],
    correct: Sequence[bool],
    correct_norm: Sequence[bool] | None,
    reused_from: str | None = None,
) -> TaskScores:
    """Adds up one task.

    Args:
        task: Name of the task.
        source: Where its questions came from.
        version: lm-eval's, of the task.
        hashes: The `HASHES` of every question, in order.
        correct: Whether each answer is right, in the same order.
        correct_norm: The same with likelihoods by length; None where the task has no such metric.
        reused_from: Where the answers were taken from.
    """
    return TaskScores(
        task=task,
        source=source,
        task_hash=hashlib.sha256("".join(hashes).encode()).hexdigest(),
        version=version,
        n=len(correct),
        acc=sum(correct) / len(correct),
        stderr=standard_error(correct),
        acc_norm=sum(correct_norm) / len(correct_norm) if correct_norm else None,
        acc_norm_stderr=standard_error(correct_norm) if correct_norm else None,
        correct=tuple(correct),
        correct_norm=tuple(correct_norm) if correct_norm else None,
        reused_from=reused_from,
    )


def tally_records(
    records: Sequence[Sample], *, task: str, source: str, version: str, reused_from: str | None = None
) -> TaskScores:
    """Adds up one task from its records."""
    marks = [record.acc_norm for record in records]
    return tally(
        task=task,
        source=source,
        version=version,
        hashes=(getattr(record, name) for record in records for name in HASHES),
        correct=[record.acc == 1 for record in records],
        correct_norm=None if None in marks else [mark == 1 for mark in marks],
        reused_from=reused_from,
    )
