"""Near ties: questions whose two likeliest choices are so close that rounding may decide which one is the answer.

Log-likelihoods computed in bf16 have errors of some tenths of a nat. If the two likeliest choices are closer than that,
another implementation, or fp32, may prefer the other one. The bounds of a difference between two models are computed
with all near ties decided against it, and with all decided for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from job.records import Close, TaskScores

if TYPE_CHECKING:
    from job.evaluation.samples import Sample

BOUNDS = {"bf16": 0.44, "fp16": 0.05, "fp32": 0.001}
"""Dtype of the computation -> the largest margin of log-likelihoods, in nats, of a near tie.

For bf16 and fp16 it is the 99th percentile of the error of the margin against fp32 (bf16: 0.437 with the adapter, 0.441
without; fp16: 0.052, 0.054; fp16 with sums in fp32: 0.031, 0.032), measured on one H200 on 2026-11-29 (decision 20):
SmolLM2-135M in NF4, 1,200 questions of ARC-Easy. Other models, and longer choices, have other errors. For fp32 it is
ten times the difference of two implementations there (0.0001), since a CPU and a GPU differ by more than two programs
on one GPU.
"""


def close_questions(samples: Sequence[Sample], *, by_length: bool, bound: float = 0.0) -> tuple[Close, ...]:
    """The questions whose margin is at most the largest bound.

    Args:
        samples: In the order of the questions.
        by_length: For `acc_norm`, which predicts the choice with the largest log-likelihood per character. The
            difference of these is divided by the mean of the two inverse lengths. The margin is then in nats, and the
            same bounds apply: the error of a log-likelihood per character is the error divided by the length.
        bound: That of a run of another version, in nats, where it may be larger than those of `BOUNDS`.
    """
    most = max(bound, *BOUNDS.values())
    margins = (_close(number, sample, by_length=by_length) for number, sample in enumerate(samples))
    return tuple(close for close in margins if close is not None and close.margin <= most)


def _close(number: int, sample: Sample, *, by_length: bool) -> Close | None:
    """The margins of one question; None if it has a single choice, or fields that `contradiction` reports."""
    if len(sample.choice_lengths) != len(sample.log_likelihoods):
        return None
    weights = [1 / length for length in sample.choice_lengths] if by_length else [1.0] * len(sample.log_likelihoods)
    values = [value * weight for value, weight in zip(sample.log_likelihoods, weights, strict=True)]
    best, right = values.index(max(values)), sample.acc_norm if by_length else sample.acc
    margins = {
        choice: round((values[best] - values[choice]) / ((weights[best] + weights[choice]) / 2), 4)
        for choice in range(len(values))
        if choice != best
    }
    turning = [margin for choice, margin in margins.items() if _may_be(sample, choice, right=not right)]
    return Close(number, min(margins.values()), min(turning, default=None)) if margins else None


def _may_be(sample: Sample, choice: int, *, right: bool) -> bool:
    """Whether a choice is right (or wrong, with `right=False`); always true if the sample does not say which is."""
    golds = sample.gold if isinstance(sample.gold, list) else [sample.gold]
    if not all(isinstance(gold, int) for gold in golds):
        return True
    return (choice in golds) == right


def near_ties(close: Sequence[Close], bound: float) -> int:
    """How many of them are near ties: those whose margin is at most `bound`, in nats."""
    return sum(one.margin <= bound for one in close)


def at_worst(scores: TaskScores, bound: float, *, right: bool) -> TaskScores:
    """The scores if every near tie that could be answered right (or wrong, with `right=False`) were.

    A near tie has a margin of at most `bound`, in nats.
    Only the values for each question are changed, not the accuracies.
    """
    by_length = scores.correct_norm
    return replace(
        scores,
        correct=_decided(scores.correct, scores.close or (), bound, right=right),
        correct_norm=by_length and _decided(by_length, scores.close_norm or (), bound, right=right),
    )


def _decided(correct: Sequence[bool], close: Sequence[Close], bound: float, *, right: bool) -> tuple[bool, ...]:
    turned = {one.question for one in close if one.turns is not None and one.turns <= bound}
    return tuple(right if number in turned else answer for number, answer in enumerate(correct))
