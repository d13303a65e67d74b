"""The questions that changed, as a reader sees them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.report.changed_answers import MAX_QUESTION, changed_answers
from tests.example_run import answers


@given(st.integers(0, 5), st.integers(0, 5))
def test_what_changed_is_told_both_ways(improved: int, regressed: int) -> None:
    """As many as the counts say; the right answer is the one that the model which is right gave."""
    base, adapter = answers(improved, regressed, 12)
    better, worse = changed_answers(base, adapter)
    assert (len(better), len(worse)) == (improved, regressed)
    for found, right_side in ((better, "after"), (worse, "before")):
        for question in found:
            (right,) = [choice for choice in question.choices if choice.right]
            assert getattr(right, right_side)
            assert right.before != right.after
            assert sum(choice.before for choice in question.choices) == 1
            assert sum(choice.after for choice in question.choices) == 1


def test_the_question_stands_without_the_templates_words() -> None:
    """What lm-eval puts around a question for the model is not for the reader; long texts are cut."""
    base, adapter = answers(1, 0, 3)
    (question,), _ = changed_answers(base, adapter)
    assert question.text == "What is 0 and one?"
    base[0]["question"] = "word " * 2000
    (question,), _ = changed_answers(base, adapter)
    assert len(question.text) <= MAX_QUESTION + 2
    assert question.text.endswith(" …")


def test_records_without_texts_can_still_be_read() -> None:
    """Records of an older version have no texts: the id and the numbers of the choices stand for them."""
    base, adapter = answers(1, 0, 3)
    for record in (*base, *adapter):
        del record["question"], record["choices"]
    (question,), _ = changed_answers(base, adapter)
    assert question.text == "question-0"
    assert [choice.text for choice in question.choices] == ["choice 1", "choice 2", "choice 3"]


def test_other_questions_are_no_pair() -> None:
    """Two models are compared on the same questions in the same order, or not at all."""
    base, adapter = answers(1, 0, 3)
    swapped: list[dict[str, Any]] = adapter[::-1]
    with pytest.raises(ValueError, match="not of the same questions"):
        changed_answers(base, swapped)
    with pytest.raises(ValueError, match="shorter"):
        changed_answers(base, adapter[:2])
