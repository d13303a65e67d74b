"""Log-likelihoods of multiple-choice answers: many questions in one sequence, each common prefix computed once.

    two questions, packed:  p p | c c c | a | b b | d d d d | e    p: common prefix; c, d: the rest of each context
    what e attends to:      x x   . . .   .   . .   x x x x   x    its own context, and itself
    positions:              0 1   2 3 4   5   5 6   2 3 4 5   6    as if each choice were alone in a sequence

a and b are choices of the first question, e is a choice of the second; each lacks its last token, since nothing is
predicted from it. If each choice were scored in a separate sequence, a question with k choices would compute its
context k times, and few-shot examples would be computed once for each choice of each question. With causal attention
the keys and values of a token do not depend on what follows. So every common prefix is computed once, and sequences
become a tree (`prefix_tree`). Up to rounding, the log-likelihoods are those of scoring each choice alone, for a
fraction of the tokens. There is no padding, and questions attend to each other only in their common prefix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from job.evaluation.prefix_tree import Node, insert, token_positions, walk
from job.records import ChoiceScore, Question

if TYPE_CHECKING:
    import torch

    from job.model.packed_layout import Layout, Segment


def plan_sequences(questions: Sequence[Question], budget: int) -> list[range]:
    """Divides the questions, in their order, into packed sequences; a pure function, so restarts repeat the bits.

    Args:
        questions: Best in the order of `alike_together`, so that common prefixes share a sequence.
        budget: The most tokens of a sequence, common prefixes counted once; a longer question gets its own.

    Returns:
        The index range of each sequence's questions.
    """
    sequences: list[range] = []
    start, used, tree = 0, 0, Node()
    for index, question in enumerate(questions):
        used += _add(tree, question)[0]
        if index > start and used > budget:
            sequences.append(range(start, index))
            start, tree = index, Node()
            used, _ = _add(tree, question)
    if start < len(questions):
        sequences.append(range(start, len(questions)))
    return sequences


def tokens_of(questions: Sequence[Question]) -> int:
    """Tokens of one packed sequence of these questions, common prefixes counted once."""
    tree = Node()
    return sum(_add(tree, question)[0] for question in questions)


def reads_of(question: Question) -> int:
    """How many positions' logits a question needs: the context's last one, and those within its choices."""
    tree = Node()
    return 1 + sum(insert(tree, choice[:-1])[0] for choice in question.choices)


def alike_together(questions: Sequence[Question]) -> list[int]:
    """The indices of the questions in the order in which they are packed: sorted, so common prefixes are adjacent."""
    return sorted(range(len(questions)), key=lambda number: questions[number].context)


def tokens_to_compute(questions: Sequence[Question], budget: int) -> int:
    """Tokens of all packed sequences of these questions in the order of `alike_together`; see `plan_sequences`."""
    ordered = [questions[number] for number in alike_together(questions)]
    return sum(tokens_of(ordered[part.start : part.stop]) for part in plan_sequences(ordered, budget))


def _add(tree: Node, question: Question) -> tuple[int, Node]:
    """Adds a question's context and choices; returns (number of new tokens, the node that its context ends with)."""
    new, end = insert(tree, question.context)
    for choice in question.choices:
        if len(choice) > 1:
            new += insert(end, choice[:-1])[0]
    return new, end


Forward = Callable[["torch.Tensor", "torch.Tensor", "Layout", "torch.Tensor"], "torch.Tensor"]
"""(token ids (1, tokens) int64, positions (1, tokens) int64, layout, `_Packed.reads` (reads,) int64) -> logits
(reads, vocabulary)."""


def score_sequence(
    model: Any, questions: Sequence[Question], forward: Forward | None = None
) -> list[list[ChoiceScore]]:
    """Scores questions in one forward pass, or in one for each choice if the model cannot run packed sequences.

    Args:
        model: A causal language model from `load_base`, in evaluation mode.
        questions: All of them go into one packed sequence.
        forward: Computes the logits; None for the model's own forward pass.

    Returns:
        For each question and choice, the log-likelihood (natural logarithm) and whether it is the greedy continuation.
    """
    return begin_scoring(model, questions, forward)()


def begin_scoring(
    model: Any, questions: Sequence[Question], forward: Forward | None = None
) -> Callable[[], list[list[ChoiceScore]]]:
    """Launches `score_sequence`'s computation; returns a function that waits for it and returns its result.

    On a GPU the caller can lay out and launch the next sequence in between, so that the GPU is never idle.
    """
    import torch

    from job.common.device_copies import to_device, to_host
    from job.model.packed_attention import is_packed
    from job.model.packed_layout import build_layout

    if not is_packed(model):
        scores = [
            [_score_alone(model, question.context, choice) for choice in question.choices] for question in questions
        ]
        return lambda: scores
    packed = _pack(questions)
    device = model.device

    def given(numbers: list[int]) -> torch.Tensor:
        return to_device(torch.tensor(numbers), device)

    with torch.inference_mode():
        logits = (forward or partial(_own_forward, model))(
            given(packed.ids)[None],
            given(packed.positions)[None],
            build_layout(packed.segments, device),
            given(packed.reads),
        )  # (reads, vocabulary)
        predicted_by = given(packed.predicted_by)  # (choice tokens,): which logits predict each of them
        token = given(packed.targets)  # (choice tokens,)
        # fp32 before the softmax: bf16 has 8 bits of precision, so a log-probability near -10 would be rounded to
        # multiples of 1/16, more than what often separates two choices. float64 after it, so that the sum over a
        # choice's tokens adds no error, however long the choice is.
        log_probs = logits.float().log_softmax(-1)[predicted_by, token].double()
        greedy = logits.argmax(-1)[predicted_by] == token
        waited = to_host(log_probs, greedy)
    return lambda: list(_by_question(questions, *waited()))


def _own_forward(
    model: Any, ids: torch.Tensor, positions: torch.Tensor, layout: Layout, reads: torch.Tensor
) -> torch.Tensor:
    """A `Forward` by the model's own code, with logits in the model's dtype.

    `logits_to_keep` computes the output layer only at the positions that predict a token of a choice. The logits of all
    tokens, (tokens, vocabulary), would be by far the largest tensor of the pass.
    """
    logits: torch.Tensor = model(
        input_ids=ids, position_ids=positions, layout=layout, logits_to_keep=reads, use_cache=False
    ).logits[0]
    return logits


def _score_alone(model: Any, context: Sequence[int], choice: Sequence[int]) -> ChoiceScore:
    """Scores one choice after its context, in a separate forward pass with the model's own attention.

    Used for models whose answers change when examples are packed (see `packed_attention.is_packed`).
    """
    import torch

    device = model.device
    with torch.inference_mode():
        ids = torch.tensor([[*context, *choice[:-1]]], device=device)
        logits = model(input_ids=ids).logits[0, len(context) - 1 :]  # (choice tokens, vocabulary)
        wanted = torch.tensor(choice, device=device)
        scores = logits.float().log_softmax(-1).gather(1, wanted[:, None]).double()
        greedy = (logits.argmax(-1) == wanted).all()
    return ChoiceScore(float(scores.sum()), bool(greedy))


@dataclass(frozen=True)
class _Packed:
    """One packed sequence, as lists of int.

    Attributes:
        ids: Token ids, (tokens).
        positions: Positions for the rotary embedding, (tokens): those each token would have if its choice were alone.
        segments: The nodes of the tree, which say which tokens see which.
        reads: Positions in the sequence whose logits are computed, each once, (reads).
        targets: Token ids of all choices, one choice after the other, (choice tokens).
        predicted_by: For each of `targets` the index in `reads` of the position that predicts it, (choice tokens).
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    predicted_by: list[int] = field(default_factory=list)


def _pack(questions: Sequence[Question]) -> _Packed:
    from job.model.packed_layout import Segment

    tree = Node()
    ends = [_add(tree, question)[1] for question in questions]
    packed = _Packed()
    for node, parent, depth in walk(tree):
        node.start = len(packed.ids)
        packed.ids.extend(node.tokens)
        packed.positions.extend(range(depth, depth + len(node.tokens)))
        packed.segments.append(Segment(node.start, len(packed.ids), parent.start, parent.start + len(parent.tokens)))
    index: dict[int, int] = {}  # choices that begin alike are predicted by the same positions
    for question, end in zip(questions, ends, strict=True):
        last = end.start + len(end.tokens) - 1
        for choice in question.choices:
            packed.targets.extend(choice)
            read = (last, *token_positions(end, choice[:-1]))
            packed.predicted_by.extend([index.setdefault(position, len(index)) for position in read])
    packed.reads.extend(index)
    return packed


def _by_question(
    questions: Sequence[Question], scores: torch.Tensor, greedy: torch.Tensor
) -> Iterator[list[ChoiceScore]]:
    """Sums token scores by choice, groups choices by question; `scores` float64, `greedy` bool, (choice tokens,)."""
    values, likeliest, at = scores.tolist(), greedy.tolist(), 0  # lists: thousands of small torch operations are slower
    for question in questions:
        result = []
        for choice in question.choices:
            span = slice(at, at + len(choice))
            result.append(ChoiceScore(math.fsum(values[span]), all(likeliest[span])))
            at = span.stop
        yield result
