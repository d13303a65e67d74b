"""Questions too long for the model are found before scoring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.errors import DataError
from job.evaluation.harness import evaluate
from job.evaluation.question_lengths import check_lengths, count_questions
from job.evaluation.scorer import BATCH_TOKENS
from job.evaluation.scoring import reads_of, tokens_to_compute
from job.records import ChoiceScore, Question
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


def winogrande_rows(count: int, ending: str) -> list[dict[str, Any]]:
    """Questions whose choices are in front of a common ending."""
    return [
        {"sentence": f"{n} is less than _ {ending}", "option1": "one", "option2": "two", "answer": str(1 + n % 2)}
        for n in range(count)
    ]


@pytest.mark.parametrize("examples", [0, 2])
def test_a_plan_counts_what_is_scored(tokenizer: Any, tmp_path: Path, examples: int) -> None:
    """Tokens and logits of the sequences that an evaluation asks for, also where choices come first."""
    files = {
        "winogrande": write_jsonl(tmp_path / "w.jsonl", winogrande_rows(5, "and there is a long ending behind it.")),
        "arc_easy": write_jsonl(tmp_path / "a.jsonl", arc_rows(6)),
    }
    for name, file in files.items():
        asked: list[Question] = []

        def score(questions: list[Question], asked: list[Question] = asked) -> list[list[ChoiceScore]]:
            asked.extend(questions)
            return [[ChoiceScore(-1.0, greedy=False) for _ in question.choices] for question in questions]

        tasks = with_examples(local_tasks(**{name: file}), examples)
        evaluate(tasks, tokenizer, score, limit=None)
        expected = (len(file.read_text().splitlines()), tokens_to_compute(asked, BATCH_TOKENS))
        assert count_questions(tasks, tokenizer, None) == (*expected, sum(map(reads_of, asked)), 0, 0)


def with_examples(tasks: Any, count: int) -> Any:
    """The tasks with so many of their own questions in front of each."""
    for task in tasks.loaded["tasks"].values():
        task.config.num_fewshot = count
        task.fewshot_docs = lambda docs=list(task.eval_docs): docs
        task.sampler.df = list(task.eval_docs)
    return tasks


@pytest.mark.parametrize("examples", [0, 1])
def test_the_longest_context_with_the_longest_choice_has_to_fit(tokenizer: Any, tmp_path: Path, examples: int) -> None:
    """No more: choices are scored one by one. And no less: the ending counts where choices come first."""
    files = {
        "winogrande": write_jsonl(tmp_path / "w.jsonl", winogrande_rows(2, "and " * 30 + "all.")),
        "arc_easy": write_jsonl(tmp_path / "a.jsonl", arc_rows(2)),
    }
    for name, file in files.items():
        longest = 0

        def score(questions: list[Question]) -> list[list[ChoiceScore]]:
            nonlocal longest
            longest = max(len(q.context) + len(choice) for q in questions for choice in q.choices)
            return [[ChoiceScore(-1.0, greedy=False) for _ in question.choices] for question in questions]

        tasks = with_examples(local_tasks(**{name: file}), examples)
        evaluate(tasks, tokenizer, score, limit=None)
        how: dict[str, Any] = {"limit": None, "cut": False, "vocabulary": None}
        check_lengths(tasks, tokenizer, max_length=longest, **how)
        with pytest.raises(DataError, match=r"tokens long"):
            check_lengths(tasks, tokenizer, max_length=longest - 1, **how)
