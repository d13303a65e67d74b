"""Log-likelihoods of multiple-choice answers, many questions in one flat row, each context computed once.

A question takes its context followed by its choices side by side; every choice sees the context and itself, so the
numbers are those of scoring each choice alone, for a fraction of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from job.records import ChoiceScore, Question

if TYPE_CHECKING:
    from job.model.packed_attention import Segment


def tokens_of(question: Question) -> int:
    """Tokens a question takes in a row: its context once, and each choice but for its last token."""
    return len(question.context) + sum(len(choice) - 1 for choice in question.choices)


def plan_sequences(questions: Sequence[Question], budget: int) -> list[range]:
    """Cuts the questions, in order, into rows of at most `budget` tokens (a longer question gets a row of its own).

    Depends on nothing but its arguments, so a restarted evaluation forms the same rows and gets the same bits.
    """
    rows: list[range] = []
    start, used = 0, 0
    for index, question in enumerate(questions):
        size = tokens_of(question)
        if index > start and used + size > budget:
            rows.append(range(start, index))
            start, used = index, 0
        used += size
    if start < len(questions):
        rows.append(range(start, len(questions)))
    return rows


def score_sequence(model: Any, questions: Sequence[Question]) -> list[list[ChoiceScore]]:
    """Scores the questions of one packed sequence; each choice by itself where the model is not used packed.

    Args:
        model: A causal language model of `load_base`.
        questions: All of them go into one forward pass.

    Returns:
        For each question, for each choice, its log-likelihood (natural logarithm, in fp32) and whether it is greedy.
    """
    import torch

    from job.model.packed_attention import build_layout, is_packed

    if not is_packed(model):
        return [[_score_alone(model, asked.context, choice) for choice in asked.choices] for asked in questions]
    ids, positions, segments, reads, rows, targets = _lay_out(questions)
    device = model.device
    with torch.inference_mode():
        logits = model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            layout=build_layout(segments, device),
            logits_to_keep=torch.tensor(reads, device=device),
            use_cache=False,
        ).logits[0]
        at, wanted = torch.tensor(rows, device=device), torch.tensor(targets, device=device)
        scores = logits.float().log_softmax(-1)[at, wanted].double()
        greedy = logits.argmax(-1)[at] == wanted
        scores, greedy = scores.cpu(), greedy.cpu()
    return list(_regroup(questions, scores, greedy))


def _score_alone(model: Any, context: Sequence[int], choice: Sequence[int]) -> ChoiceScore:
    """A choice after its context, by the model's own attention: no mask, and no positions but its own."""
    import torch

    device = model.device
    with torch.inference_mode():
        ids = torch.tensor([[*context, *choice[:-1]]], device=device)
        logits = model(input_ids=ids).logits[0, len(context) - 1 :]
        wanted = torch.tensor(choice, device=device)
        scores = logits.float().log_softmax(-1).gather(1, wanted[:, None]).double()
        greedy = (logits.argmax(-1) == wanted).all()
    return ChoiceScore(float(scores.sum()), bool(greedy))


def _lay_out(
    questions: Sequence[Question],
) -> tuple[list[int], list[int], list[Segment], list[int], list[int], list[int]]:
    """Token ids and positions of the row, its segments, and what is read of it.

    That are the positions whose logits are read, and for each token of each choice which of these predicts it, and the
    token: what a context ends with predicts the first token of all its choices.
    """
    from job.model.packed_attention import Segment

    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    reads: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    for question in questions:
        start, length = len(ids), len(question.context)
        ids += question.context
        positions += range(length)
        segments.append(Segment(start, start + length))
        last = len(reads)
        reads.append(start + length - 1)
        for choice in question.choices:
            begin = len(ids)
            ids += choice[:-1]
            positions += range(length, length + len(choice) - 1)
            if len(choice) > 1:
                segments.append(Segment(begin, len(ids), start, start + length))
            rows += [last, *range(len(reads), len(reads) + len(ids) - begin)]
            reads += range(begin, len(ids))
            targets += choice
    return ids, positions, segments, reads, rows, targets


def _regroup(questions: Sequence[Question], scores: Any, greedy: Any) -> Iterator[list[ChoiceScore]]:
    """Sums the token scores by choice and groups the choices by question."""
    at = 0
    for question in questions:
        result = []
        for choice in question.choices:
            span = slice(at, at + len(choice))
            result.append(ChoiceScore(float(scores[span].sum()), bool(greedy[span].all())))
            at = span.stop
        yield result
