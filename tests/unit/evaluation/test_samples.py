"""Records of questions: read as untrusted input, and aggregated as lm-eval does."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.evaluation.samples import Sample, contradiction, parse, task_scores

HASH = "0123456789abcdef" * 4
RECORD: dict[str, Any] = {
    "id": "q",
    "doc_hash": HASH,
    "prompt_hash": HASH,
    "target_hash": HASH,
    "log_likelihoods": [-2.0, -3.0, -6.5],
    "choice_lengths": [2, 4, 10],
    "prediction": 0,
    "prediction_norm": 2,
    "gold": 0,
    "acc": 1.0,
    "acc_norm": 0.0,
}


def lines(*records: dict[str, Any]) -> bytes:
    """A file of records."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def test_records_read_back() -> None:
    """One a line; what figures do not depend on, such as the question itself, is left aside."""
    one, two = parse(lines(RECORD, RECORD | {"id": "r", "acc_norm": None, "question": "Which?"}))
    assert (one.id, one.acc, two.id, two.acc_norm) == ("q", 1, "r", None)


@pytest.mark.parametrize(
    "change",
    [
        {"acc": 0.5},
        {"acc": 2},
        {"acc": "1"},
        {"acc_norm": -1},
        {"log_likelihoods": []},
        {"log_likelihoods": [float("nan")]},
        {"choice_lengths": [0]},
        {"prediction": 1.5},
        {"doc_hash": HASH.upper()},
        {"id": 3},
    ],
    ids=str,
)
def test_what_is_no_record_is_refused(change: dict[str, Any]) -> None:
    """Wrong types and impossible values, with the line."""
    with pytest.raises(ValueError, match="line 2, "):
        parse(lines(RECORD, RECORD | change, RECORD))


@pytest.mark.parametrize("data", [b"", b"\n", lines(RECORD), b"[" * 10**6, b"\xff\n\xff", lines(RECORD) + b"\n"])
def test_what_is_no_file_of_records_is_refused(data: bytes) -> None:
    """Too few lines, empty ones, no JSON."""
    with pytest.raises(ValueError, match=r"line|comparison needs 2"):
        parse(data)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"gold": [0, 2]}, "acc_norm 0"),
        ({"gold": [0, 2], "acc_norm": 1.0}, None),
        ({"gold": 1}, "has acc 1"),
        ({"gold": "the words of a choice"}, None),
        ({"acc_norm": None, "prediction_norm": 2}, None),
        ({"prediction": 1}, "predicts choice 1 by acc"),
        ({"prediction_norm": 0}, "predicts choice 0 by acc_norm"),
        ({"choice_lengths": [1, 1]}, "a length for each likelihood"),
        ({"log_likelihoods": [-2.0, -2.0, -50.0], "prediction_norm": 1}, None),  # of two alike the first counts
    ],
    ids=str,
)
def test_a_record_has_to_follow_from_its_likelihoods(change: dict[str, Any], told: str | None) -> None:
    """Predictions are the likeliest choices, and marks say whether these are right, where it can be known."""
    found = contradiction(Sample.model_validate(RECORD | change))
    assert found is None if told is None else told in str(found)


@given(st.lists(st.booleans(), min_size=2, max_size=30))
def test_records_add_up(right: list[bool]) -> None:
    """Accuracy is the share of right answers; the task's hash is lm-eval's, of every question's three."""
    records = parse(lines(*(RECORD | {"acc": float(one), "acc_norm": None} for one in right)))
    scores = task_scores(records, task="t", source="s", version="1.0", reused_from="there")
    assert scores.correct == tuple(right)
    assert scores.acc == sum(right) / len(right)
    assert (scores.acc_norm, scores.acc_norm_stderr, scores.correct_norm) == (None, None, None)
    assert scores.task_hash == hashlib.sha256((HASH * 3 * len(right)).encode()).hexdigest()
    assert scores.reused_from == "there"
