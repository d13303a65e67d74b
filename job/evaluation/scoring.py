"""Log-likelihoods of multiple-choice answers: many questions packed into one sequence, each context computed once.

    one question, packed:   c c c c c | a a | b b b          c context, a and b the choices without their last token
    what a token of b sees: x x x x x   . .   x x x          the context and its own choice, never another choice
    positions:              0 1 2 3 4   5 6   5 6 7          every choice continues the context

Scored alone, a question with k choices computes its context k times. Here the choices share it: causal attention never
looks ahead, so a context's keys and values do not depend on which choice follows. The log-likelihoods are therefore
those of scoring each choice alone, up to rounding, for a fraction of the tokens. Packing several questions into one
sequence, without padding between them, uses the hardware better; no question attends to another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from job.records import ChoiceScore, Question

if TYPE_CHECKING:
    import torch

    from job.model.packed_attention import Layout, Segment


def tokens_of(question: Question) -> int:
    """Tokens of a question in a packed sequence: its context once, and each choice without its last token.

    Nothing is predicted from a choice's last token, so the model need not read it.
    """
    return len(question.context) + sum(len(choice) - 1 for choice in question.choices)


def plan_sequences(questions: Sequence[Question], budget: int) -> list[range]:
    """Divides the questions, in order, into sequences of at most `budget` tokens; a longer question gets its own.

    It depends only on its arguments, so a restarted evaluation packs the same sequences and gets the same bits.
    """
    sequences: list[range] = []
    start, used = 0, 0
    for index, question in enumerate(questions):
        size = tokens_of(question)
        if index > start and used + size > budget:
            sequences.append(range(start, index))
            start, used = index, 0
        used += size
    if start < len(questions):
        sequences.append(range(start, len(questions)))
    return sequences


Forward = Callable[["torch.Tensor", "torch.Tensor", "Layout", "torch.Tensor"], "torch.Tensor"]
"""(1, tokens) token ids, (1, tokens) positions, the layout, (reads,) positions in the sequence -> (reads, vocabulary)
logits."""


def score_sequence(
    model: Any, questions: Sequence[Question], forward: Forward | None = None
) -> list[list[ChoiceScore]]:
    """Scores questions in one forward pass, or in one for each choice if the model cannot run packed sequences.

    Args:
        model: A causal language model from `load_base`, in evaluation mode.
        questions: All of them go into one packed sequence.
        forward: What computes the logits; None for the model's own code.

    Returns:
        For each question and choice, the log-likelihood (natural logarithm) and whether it is the greedy continuation.
    """
    return begin_scoring(model, questions, forward)()


def begin_scoring(
    model: Any, questions: Sequence[Question], forward: Forward | None = None
) -> Callable[[], list[list[ChoiceScore]]]:
    """Launches what `score_sequence` computes, and returns what waits for it and gives it.

    On a GPU the host need not wait in between: it lays out and launches the next sequence meanwhile, so that the GPU
    has always something to compute.
    """
    import torch

    from job.common.device_copies import to_device, to_host
    from job.model.packed_attention import build_layout, is_packed

    if not is_packed(model):
        scores = [[_score_alone(model, asked.context, choice) for choice in asked.choices] for asked in questions]
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
        read = given(packed.predicted_by)  # (choice tokens,): which logits predict each of them
        token = given(packed.targets)  # (choice tokens,)
        # fp32 before the softmax: bf16 has 8 bits of precision, so a log-probability near -10 would be rounded to
        # multiples of 1/16, more than what often separates two choices. float64 after it: adding up the tokens of a
        # choice then rounds nothing off, however long the choice is.
        log_probs = logits.float().log_softmax(-1)[read, token].double()
        greedy = logits.argmax(-1)[read] == token
        waited = to_host(log_probs, greedy)
    return lambda: list(_by_question(questions, *waited()))


def _own_forward(
    model: Any, ids: torch.Tensor, positions: torch.Tensor, layout: Layout, reads: torch.Tensor
) -> torch.Tensor:
    """A `Forward` by the model's own code, the logits in the model's dtype.

    `logits_to_keep`: the output layer is computed at the positions that predict a choice's token only. Logits of all
    tokens would be the largest tensor of the pass by far (tokens x vocabulary).
    """
    found: torch.Tensor = model(
        input_ids=ids, position_ids=positions, layout=layout, logits_to_keep=reads, use_cache=False
    ).logits[0]
    return found


def _score_alone(model: Any, context: Sequence[int], choice: Sequence[int]) -> ChoiceScore:
    """Scores one choice after its context, in a forward pass of its own with the model's own attention.

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
        positions: Positions for the rotary embedding, (tokens): those each choice would have if it were alone.
        segments: Which tokens see which: contexts see themselves, choices their context and themselves.
        reads: Positions in the sequence whose logits are computed, (reads).
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
    from job.model.packed_attention import Segment

    packed = _Packed()
    ids, reads = packed.ids, packed.reads
    for question in questions:
        start, length = len(ids), len(question.context)
        ids.extend(question.context)
        packed.positions.extend(range(length))
        packed.segments.append(Segment(start, start + length))
        last = len(reads)  # the context's last token predicts the first token of every choice: read once for all
        reads.append(start + length - 1)
        for choice in question.choices:
            begin = len(ids)
            ids.extend(choice[:-1])
            packed.positions.extend(range(length, length + len(choice) - 1))
            if len(choice) > 1:  # a choice of one token adds no tokens, and an empty segment is none
                packed.segments.append(Segment(begin, len(ids), start, start + length))
            packed.predicted_by.extend([last, *range(len(reads), len(reads) + len(ids) - begin)])
            reads.extend(range(begin, len(ids)))
            packed.targets.extend(choice)
    return packed


def _by_question(
    questions: Sequence[Question], scores: torch.Tensor, greedy: torch.Tensor
) -> Iterator[list[ChoiceScore]]:
    """Sums token scores by choice, and groups choices by question; `scores` float64, `greedy` bool, (choice tokens)."""
    at = 0
    for question in questions:
        result = []
        for choice in question.choices:
            span = slice(at, at + len(choice))
            result.append(ChoiceScore(float(scores[span].sum()), bool(greedy[span].all())))
            at = span.stop
        yield result
