"""The questions that two models answered differently, ready to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_QUESTION, MOST_CHOICE = 1200, 300
"""Characters of a text that are shown."""


@dataclass(frozen=True)
class Choice:
    """One choice of a question: whether it is right, and which model took it."""

    text: str
    right: bool
    before: bool
    after: bool


@dataclass(frozen=True)
class Changed:
    """A question that one of the two models answered right."""

    id: str
    text: str
    choices: tuple[Choice, ...]


def changed(
    base: Sequence[Mapping[str, Any]], adapter: Sequence[Mapping[str, Any]]
) -> tuple[list[Changed], list[Changed]]:
    """The questions that got better and those that got worse, in the order they were asked.

    Args:
        base: The base model's records, as `evaluate.write_records` wrote them.
        adapter: The adapter's, of the same questions.
    """
    better, worse = [], []
    for before, after in zip(base, adapter, strict=True):
        if before["id"] != after["id"]:
            raise ValueError(f"the records are not of the same questions: {before['id']!r} and {after['id']!r}")
        if after["acc"] > before["acc"]:
            better.append(_changed(before, after, right=after["prediction"]))
        elif after["acc"] < before["acc"]:
            worse.append(_changed(before, after, right=before["prediction"]))
    return better, worse


def _changed(before: Mapping[str, Any], after: Mapping[str, Any], right: int) -> Changed:
    """One of the two is right, so its answer is the right one, however the task writes its key."""
    texts = before.get("choices") or [f"choice {number}" for number in range(1, len(before["log_likelihoods"]) + 1)]
    choices = tuple(
        Choice(
            _cut(str(text), MOST_CHOICE), index == right, index == before["prediction"], index == after["prediction"]
        )
        for index, text in enumerate(texts)
    )
    return Changed(before["id"], _cut(_bare(before.get("question") or before["id"]), MOST_QUESTION), choices)


def _bare(question: str) -> str:
    """The question without the words that lm-eval's templates put around it for the model."""
    return question.strip().removeprefix("Question:").removesuffix("Answer:").strip()


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most].rstrip()} …"
