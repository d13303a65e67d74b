"""Questions that the model cannot read are found before scoring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.errors import DataError
from job.evaluation.question_lengths import check_lengths
from tests.helpers import arc_rows, write_jsonl
from tests.unit.evaluation.example_tasks import local_tasks

pytestmark = [
    pytest.mark.usefixtures("one_index"),
    # lm-eval 0.4.13 calls parts of itself by names that it has deprecated
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lm_eval.*"),
]


def test_questions_too_large_for_the_model_are_found_early(tokenizer: Any, tmp_path: Path) -> None:
    """A question that is too long with a choice, with too many choices or bytes, or an unknown token, is named."""
    small = arc_rows(4)
    sizes = [
        max(
            len(tokenizer.encode(f"Question: {row['question']}\nAnswer: {choice}")) for choice in row["choices"]["text"]
        )
        for row in small
    ]
    most, vocabulary = max(sizes), len(tokenizer)

    def problems(
        rows: list[dict[str, Any]], max_length: int, *, cut: bool = False, known: int = vocabulary
    ) -> list[str]:
        tasks = local_tasks(arc_easy=write_jsonl(tmp_path / "x.jsonl", rows))
        try:
            check_lengths(tasks, tokenizer, limit=None, max_length=max_length, cut=cut, vocabulary=known)
        except DataError as error:
            return [f"{problem.where}: {problem.what}" for problem in error.problems]
        return []

    assert problems(small, most) == []
    found = problems(small, most - 1)
    assert len(found) == sizes.count(most)
    assert f"is {most} tokens long" in found[0]
    assert "made-up-" in found[0]
    assert "JOB_EVAL__LONG_QUESTIONS=cut" in found[0]
    assert problems(small, most - 1, cut=True) == []
    many = small[0] | {"choices": {"text": ["x"] * 5000, "label": [str(n) for n in range(5000)]}, "answerKey": "3"}
    huge = small[1] | {"question": "x " * 1_000_000}
    assert [line.split(": ")[1].split(" ", 1)[0] for line in problems([many, huge, small[2]], most)] == ["has", "has"]
    assert "the model has embeddings" in problems(small, 10_000, known=vocabulary - 200)[0]
