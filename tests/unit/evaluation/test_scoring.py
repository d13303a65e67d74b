"""Scoring: many questions in one packed sequence, each scored as if every choice were computed alone."""

from __future__ import annotations

import random
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from job.evaluation.scoring import _pack, plan_sequences, score_sequence, tokens_of
from job.model.fused.kernels import TORCH
from job.model.fused.precise_forward import precise_forward, why_not_precise
from job.model.packed_layout import build_layout
from job.records import ChoiceScore, Question
from tests.families.models import make_model as make_family
from tests.helpers import fill_adapter, load_plain, make_model

TOKENS = st.lists(st.integers(3, 399), min_size=1, max_size=30).map(tuple)
QUESTIONS = st.lists(st.builds(Question, TOKENS, st.lists(TOKENS, min_size=1, max_size=5).map(tuple)), max_size=30)


def make_questions(count: int) -> list[Question]:
    """Random questions of 1 to 5 choices; some choices are one token, some begin alike, some are the same."""
    chance = random.Random(count)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(chance.randrange(3, 400) for _ in range(length))

    questions = []
    for _ in range(count):
        stem = tokens(chance.randint(0, 3))
        choices = [stem + tokens(chance.randint(1, 9)) for _ in range(chance.randint(1, 4))]
        questions.append(Question((0, *tokens(chance.randint(1, 40))), (*choices, tokens(1))))
    return questions


@cache
def model(folder: Path) -> Any:
    """The tiny model with an adapter that says something."""
    return fill_adapter(make_model(folder)).eval()


def alone(plain: Any, context: tuple[int, ...], choice: tuple[int, ...]) -> ChoiceScore:
    """A choice scored by the book: one sequence, one forward pass of a plainly loaded model."""
    with torch.no_grad():
        logits = plain(torch.tensor([context + choice])).logits[0, len(context) - 1 : -1]
    tokens = torch.tensor(choice)
    scores = logits.log_softmax(-1).gather(1, tokens[:, None])
    return ChoiceScore(float(scores.sum()), bool((logits.argmax(-1) == tokens).all()))


def test_choices_score_as_they_do_alone(base_folder: Path) -> None:
    """Log-likelihood and greediness of each choice are those of a plain forward pass over it alone.

    Also of a model that cannot run packed sequences, which has a pass for each choice.
    """
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32, attn_implementation="eager")
    questions = make_questions(12)
    with model(base_folder).disable_adapter():
        scored = score_sequence(model(base_folder), questions)
    # one choice that greedy decoding says: the most likely tokens themselves
    said = plain.generate(torch.tensor([questions[0].context]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    best = tuple(said[0, len(questions[0].context) :].tolist())
    greedy = Question(questions[0].context, (best, (*best[:3], 5), (5, 6)))
    with model(base_folder).disable_adapter():
        scored += score_sequence(model(base_folder), [greedy])
    assert [score.greedy for score in scored[-1]] == [True, False, False]
    by_itself = score_sequence(plain, [*questions, greedy])
    for question, scores, others in zip([*questions, greedy], scored, by_itself, strict=True):
        assert len(scores) == len(others) == len(question.choices)
        for choice, score, other in zip(question.choices, scores, others, strict=True):
            expected = alone(plain, question.context, choice)
            assert score.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-4)
            assert other.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-5)
            assert score.greedy == other.greedy == expected.greedy


@pytest.mark.parametrize("budget", [1, 60, 200, 100_000])
def test_the_cut_into_rows_does_not_matter(base_folder: Path, budget: int) -> None:
    """Alone, in small rows or all in one: the same log-likelihoods within rounding, so the same answers."""
    questions = make_questions(20)
    together = score_sequence(model(base_folder), questions)
    cut = [
        scores
        for row in plan_sequences(questions, budget)
        for scores in score_sequence(model(base_folder), questions[row.start : row.stop])
    ]
    for one, other in zip(together, cut, strict=True):
        likelihoods = [[score.log_likelihood for score in scores] for scores in (one, other)]
        assert likelihoods[0] == pytest.approx(likelihoods[1], abs=1e-4)
        assert [score.greedy for score in one] == [score.greedy for score in other]


def test_the_same_row_scores_the_same_bits(base_folder: Path) -> None:
    """A restarted evaluation of the same packed sequences gives the same bits."""
    questions = make_questions(10)
    assert score_sequence(model(base_folder), questions) == score_sequence(model(base_folder), questions)


@given(QUESTIONS, st.integers(1, 400))
def test_rows_keep_the_order_and_the_budget(questions: list[Question], budget: int) -> None:
    """Rows hold all questions in order; a row over the budget holds one question that is larger itself."""
    rows = plan_sequences(questions, budget)
    assert [index for row in rows for index in row] == list(range(len(questions)))
    for row in rows:
        assert len(row) == 1 or tokens_of(questions[row.start : row.stop]) <= budget


@given(QUESTIONS, st.integers(1, 400))
def test_rows_are_filled(questions: list[Question], budget: int) -> None:
    """No row ends where its next question would still have fitted."""
    rows = plan_sequences(questions, budget)
    for row, following in pairwise(rows):
        assert tokens_of(questions[row.start : following.start + 1]) > budget


def test_what_begins_alike_costs_once(base_folder: Path) -> None:
    """Contexts, choices and whole questions: each beginning once, no choice's last token, and each logit once."""
    sizes: list[tuple[int, int]] = []
    subject = fill_adapter(make_model(base_folder)).eval()
    subject.register_forward_pre_hook(
        lambda _module, _args, inputs: sizes.append((inputs["input_ids"].shape[1], len(inputs["logits_to_keep"]))),
        with_kwargs=True,
    )
    first = Question((0, 5, 6), ((7,), (8, 9), (8, 11, 12)))  # 0 5 6, 8, 11
    second = Question((0, 5, 4), ((7, 8),))  # 4, 7
    third = Question((0, 5, 6, 8), ((3,), (2, 7)))  # the beginning of a choice of the first; 2
    score_sequence(subject, [first, second, first, third])
    assert sizes == [(tokens_of([first, second, first, third]), 6)] == [(5 + 2 + 1, 6)]


@given(QUESTIONS)
def test_the_packed_sequence_holds_every_path(questions: list[Question]) -> None:
    """Each token sees what would come before it alone, in the same order and at the same positions."""
    if not questions:
        return
    packed = _pack(questions)
    layout = build_layout(packed.segments, torch.device("cpu"))
    assert len(packed.ids) == tokens_of(questions)
    at = 0
    for question in questions:
        for choice in question.choices:
            for before, target in enumerate(choice):
                place = packed.reads[packed.predicted_by[at]]
                seen = [*layout.seen_before(place), place]
                assert tuple(packed.ids[token] for token in seen) == question.context + choice[:before]
                assert [packed.positions[token] for token in seen] == list(range(len(seen)))
                assert packed.targets[at] == target
                at += 1
    assert at == len(packed.targets) == len(packed.predicted_by)
    assert len(set(packed.reads)) == len(packed.reads)


def nested_questions(seed: int) -> list[Question]:
    """Questions that begin with others, with their choices or in their middle; and choices that begin with others."""
    chance = random.Random(seed)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(chance.randrange(3, 8) for _ in range(chance.randint(1, most)))

    stem = (0, *tokens(70))
    questions = [Question((0,), (tokens(3), stem[1:]))]
    for _ in range(5):
        before = chance.choice(questions)
        context = chance.choice([before.context + chance.choice(before.choices), stem[: chance.randint(1, len(stem))]])
        first = tokens(4)
        questions.append(Question(context, (first, first + tokens(2), tokens(40), first)))
    return [*questions, questions[-1]]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_questions_within_questions_score_as_they_do_alone(tmp_path: Path, family: str) -> None:
    """By the model's code and by the pass written by hand; with windows that are smaller than a path, too."""
    from transformers import AutoModelForCausalLM

    make_family(family, tmp_path, **({"sliding_window": 8} if family == "mistral" else {}))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    base = load_plain(tmp_path)
    assert why_not_precise(base) == ""
    for seed in range(2):
        questions = nested_questions(seed)
        expected = [[alone(plain, q.context, choice) for choice in q.choices] for q in questions]
        for forward in (None, precise_forward(base, torch.float32, TORCH, keep=False)):
            for scores, wanted in zip(score_sequence(base, questions, forward), expected, strict=True):
                likelihoods = [[choice.log_likelihood for choice in side] for side in (scores, wanted)]
                assert likelihoods[0] == pytest.approx(likelihoods[1], abs=1e-4)
                assert [choice.greedy for choice in scores] == [choice.greedy for choice in wanted]
