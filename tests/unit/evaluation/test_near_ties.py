"""Near ties: which questions rounding may decide, and the comparison if all of them went one way."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from job.evaluation import samples, statistics
from job.evaluation.comparison import compare_near_ties
from job.evaluation.near_ties import BOUNDS, close_questions, near_ties
from job.evaluation.samples import Sample
from job.records import Close, TaskScores
from tests.helpers import task_scores

HASH = "0123456789abcdef" * 4


def sample(likelihoods: list[float], *, gold: Any, lengths: list[int] | None = None) -> Sample:
    """A question with these log-likelihoods, its marks as the harness gives them."""
    lengths = lengths or [1] * len(likelihoods)
    normalized = [value / length for value, length in zip(likelihoods, lengths, strict=True)]
    best, best_norm = likelihoods.index(max(likelihoods)), normalized.index(max(normalized))
    golds = gold if isinstance(gold, list) else [gold]
    hashes = dict.fromkeys(("doc_hash", "prompt_hash", "target_hash"), HASH)
    marks = {"acc": float(best in golds), "acc_norm": float(best_norm in golds)}
    return Sample.model_validate(
        {"id": "q", **hashes, "log_likelihoods": likelihoods, "choice_lengths": lengths, "gold": gold, **marks}
        | {"prediction": best, "prediction_norm": best_norm}
    )


@pytest.mark.parametrize(
    ("likelihoods", "gold", "expected"),
    [
        ([-2.0, -2.3, -9.0], 0, Close(0, 0.3, 0.3)),  # right, and wrong if the second is preferred
        ([-2.0, -2.3, -9.0], 1, Close(0, 0.3, 0.3)),  # wrong, and right if the second is preferred
        ([-2.0, -2.3, -9.0], 2, Close(0, 0.3, 7.0)),  # wrong whichever of the two is preferred
        ([-2.0, -2.3, -2.4], 2, Close(0, 0.3, 0.4)),  # right if the third is
        ([-2.0, -2.3, -9.0], [0, 1], Close(0, 0.3, 7.0)),  # both are right
        ([-2.0, -2.3, -9.0], [0, 1, 2], Close(0, 0.3, None)),  # all are
        ([-2.0, -2.0, -9.0], 1, Close(0, 0.0, 0.0)),
        ([-2.0, -2.3, -9.0], "the words of a choice", Close(0, 0.3, 0.3)),  # it may be the second
        ([-2.0, -2.5, -9.0], 0, None),  # not close in any type
        ([-2.0], 0, None),
    ],
    ids=str,
)
def test_a_question_is_close_by_the_margin_of_its_best_two(
    likelihoods: list[float], gold: object, expected: Close | None
) -> None:
    """The margin is that over the second choice; what turns the answer may be a choice further behind."""
    found = close_questions([sample(likelihoods, gold=gold)], by_length=False)
    assert found == (() if expected is None else (expected,))


def test_by_length_the_bound_is_the_same_nats() -> None:
    """Per character, -20/10 leads -9.2/4 by 0.3, which errors of e/2 nats in both move by e * (1/10 + 1/4) / 2."""
    asked = sample([-20.0, -9.2, -99.0], gold=0, lengths=[10, 4, 9])
    near = sample([-20.0, -8.2, -99.0], gold=0, lengths=[10, 4, 9])
    (found,) = close_questions([asked, near], by_length=True)  # without the first: 0.3 / 0.175 is 1.71 nats
    assert (found.question, found.margin) == (1, pytest.approx(0.05 / 0.175, abs=1e-4))
    same = sample([-2.0, -2.3], gold=0, lengths=[7, 7])
    assert close_questions([same], by_length=True) == close_questions([same], by_length=False)


def test_scores_have_the_near_ties_of_each_metric() -> None:
    """The first question is one of `acc` only, and the second, -2/2 against -4.2/4 a character, one of `acc_norm`."""
    asked = [sample([-2.0, -2.3], gold=0, lengths=[1, 50]), sample([-2.0, -4.2], gold=0, lengths=[2, 4])]
    found = samples.task_scores(asked, task="t", source="s", version="1")
    assert (found.close, found.close_norm) == ((Close(0, 0.3, 0.3),), (Close(1, 0.1333, 0.1333),))


def test_a_near_tie_is_one_for_the_type_that_scored_it() -> None:
    """A margin of 0.3 nats is within bf16's error and outside fp16's and fp32's."""
    close = close_questions([sample([-2.0, -2.0 - margin], gold=0) for margin in (0.3, 0.04, 0.0)], by_length=False)
    assert {dtype: near_ties(close, bound) for dtype, bound in BOUNDS.items()} == {"bf16": 3, "fp16": 2, "fp32": 1}


def scored(correct: list[bool], *close: Close) -> TaskScores:
    """Scores with these close questions."""
    return replace(task_scores("t", correct), close=close)


def test_all_near_ties_at_worst_are_compared_by_the_statistics() -> None:
    """At the lowest the base's fall right and the adapter's wrong, at the highest the other way; far ones stay."""
    base = scored([False] * 20 + [True] * 80, Close(0, 0.1, 0.1), Close(1, 0.1, None), Close(99, 0.2, 0.2))
    adapter = scored([True] * 100, Close(5, 0.1, 0.1), Close(6, 0.1, 0.44), Close(7, 0.1, 0.45))
    found = compare_near_ties({"t": base}, {"t": adapter}, "bf16")
    assert found is not None
    assert (found["dtype"], found["bound"]) == ("bf16", 0.44)
    task = found["tasks"]["t"]
    assert (task["acc"]["base"], task["acc"]["adapter"], task["acc_norm"]) == (3, 3, None)
    # At the lowest, base answers 0 and adapter 5 and 6 otherwise: 17 of 19 differences are left, 82 and 98 right
    low = statistics.compare([True] + [False] * 19 + [True] * 80, [True] * 5 + [False] * 2 + [True] * 93)
    assert task["acc"]["lowest"] == {
        "delta": pytest.approx(0.17),
        "ci95": low.ci95,
        "holm_p": low.mcnemar_p,
        "verdict": "improved",
    }
    assert task["acc"]["highest"]["delta"] == pytest.approx(0.21)  # base answers 99 wrong
    assert task["acc"]["holds"] is True
    weak = scored([True] * 100, *(Close(n, 0.1, 0.1) for n in range(20)))
    lost = compare_near_ties({"t": base}, {"t": weak}, "bf16")
    assert lost is not None
    assert lost["tasks"]["t"]["acc"]["lowest"]["verdict"] == "inconclusive"
    assert lost["tasks"]["t"]["acc"]["holds"] is False


def test_near_ties_by_length_are_those_of_acc_norm() -> None:
    """They leave `acc` as it is, and decide `acc_norm` as near ties of `acc` decide that."""
    answers, close = ([False] * 20 + [True] * 80, [True] * 100), ((Close(0, 0.1, 0.1),), (Close(5, 0.1, 0.1),))
    plain = [scored(correct, *near) for correct, near in zip(answers, close, strict=True)]
    by_length = [replace(one, close=(), correct_norm=one.correct, close_norm=one.close) for one in plain]
    expected, found = (compare_near_ties({"t": base}, {"t": adapter}, "bf16") for base, adapter in (plain, by_length))
    assert expected is not None
    assert found is not None
    acc, acc_norm = (found["tasks"]["t"][metric] for metric in ("acc", "acc_norm"))
    assert acc_norm == expected["tasks"]["t"]["acc"]
    assert acc_norm["lowest"]["delta"] == pytest.approx(0.18)
    assert (acc["base"], acc["lowest"]["delta"], acc["highest"]["delta"]) == (0, 0.2, 0.2)


def test_scores_of_older_versions_have_none() -> None:
    """Where near ties were not looked for there is no record of them, rather than one that says there are none."""
    known, unknown = scored([True, False]), task_scores("t", [True, False])
    assert compare_near_ties({"t": unknown}, {"t": known}, "bf16") is None
    assert compare_near_ties({"t": known}, {"t": known}, "fp8") is None
    assert compare_near_ties({"t": known}, {}, "fp32") is None
    found = compare_near_ties({"t": known}, {"t": known}, "fp32")
    assert found is not None
    assert math.isclose(found["tasks"]["t"]["acc"]["lowest"]["delta"], 0)
