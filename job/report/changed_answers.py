"""The questions that exactly one of two models answered right, as the report shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_QUESTION, MAX_CHOICE = 1200, 300
"""Longest question and choice shown, in characters; the rest is cut off."""


@dataclass(frozen=True)
class ShownChoice:
    """A choice: whether it is right, and whether the base (`before`) or the adapter (`after`) predicts it."""

    text: str
    right: bool
    before: bool
    after: bool


@dataclass(frozen=True)
class ChangedAnswer:
    """A question that exactly one of the two models answered right."""

    id: str
    text: str
    choices: tuple[ShownChoice, ...]


def changed_answers(
    base: Sequence[Mapping[str, Any]], adapter: Sequence[Mapping[str, Any]]
) -> tuple[list[ChangedAnswer], list[ChangedAnswer]]:
    """(improved, regressed): the questions only the adapter answers right, and those only the base does, in order.

    Args:
        base: The base model's samples, as JSON objects (see `evaluation.samples.Sample`).
        adapter: The adapter's samples of the same questions.

    Raises:
        ValueError: The samples are not of the same questions.
    """
    better, worse = [], []
    for before, after in zip(base, adapter, strict=True):
        if before["id"] != after["id"]:
            raise ValueError(f"the records are not of the same questions: {before['id']!r} and {after['id']!r}")
        if after["acc"] > before["acc"]:
            better.append(_changed(before, after, correct=after["prediction"]))
        elif after["acc"] < before["acc"]:
            worse.append(_changed(before, after, correct=before["prediction"]))
    return better, worse


def _changed(before: Mapping[str, Any], after: Mapping[str, Any], correct: int) -> ChangedAnswer:
    """The correct model's prediction is the right choice; tasks give `gold` in different forms."""
    texts = before.get("choices") or [f"choice {number}" for number in range(1, len(before["log_likelihoods"]) + 1)]
    choices = tuple(
        ShownChoice(
            _cut(str(text), MAX_CHOICE), index == correct, index == before["prediction"], index == after["prediction"]
        )
        for index, text in enumerate(texts)
    )
    return ChangedAnswer(before["id"], _cut(_bare(before.get("question") or before["id"]), MAX_QUESTION), choices)


def _bare(question: str) -> str:
    """The question without the `Question:` and `Answer:` that lm-eval's templates add."""
    return question.strip().removeprefix("Question:").removesuffix("Answer:").strip()


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most].rstrip()} …"
