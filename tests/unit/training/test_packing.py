"""Packed sequences: concatenated examples, with and without padding."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from job.records import Example
from job.training.packing import blank_sequence, packed_inputs, padded_sequence
from job.training.padded_shapes import (
    FEW_SEGMENTS,
    SEGMENTS,
    choose_shapes,
    longest_segment,
    padded_length,
    padded_segments,
)
from tests.helpers import make_examples

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 700), min_size=1, max_size=40)


def examples(lengths: list[int]) -> list[Example]:
    """Examples of these lengths, in which every third token is not learned."""
    return [Example(tuple(range(3, 3 + n)), tuple(place > 0 and place % 3 > 0 for place in range(n))) for n in lengths]


@given(LENGTHS)
def test_a_padded_row_holds_the_row(lengths: list[int]) -> None:
    """Ids and positions are those of the plain row, each position has the next one's label, the padding has none."""
    made = examples(lengths)
    plain, padded = packed_inputs(made, CPU), padded_sequence(made, CPU)
    ids, labels, positions = padded.tokens
    total = sum(lengths)
    assert len(ids) == padded_length(total)
    assert torch.equal(ids[:total], plain["input_ids"][0])
    assert torch.equal(positions[:total], plain["position_ids"][0])
    assert torch.equal(labels[: total - 1], plain["labels"][0, 1:])
    assert set(labels[total - 1 :].tolist()) == {-100}
    assert int(ids.max()) < 3 + max(lengths)


@given(LENGTHS, st.integers(1, 20_000))
def test_its_segments_cover_it(lengths: list[int], budget: int) -> None:
    """The examples, then the padding, then as many empty segments as its shape asks for; none exceeds the bound."""
    made = examples(lengths)
    row = padded_sequence(made, CPU)
    ends = row.ends.tolist()
    size = row.tokens.shape[1]
    assert ends == sorted(ends)
    assert (slots := len(ends) - 1) in FEW_SEGMENTS or slots % SEGMENTS == 0
    assert len(ends) - 1 > len(lengths)
    assert [b - a for a, b in pairwise(ends)][: len(lengths)] == lengths
    assert ends[len(lengths) + 1 :] == [size] * (len(ends) - len(lengths) - 1)
    assert [s.end for s in row.segments] == [end for place, end in enumerate(ends) if place and end > ends[place - 1]]
    if sum(lengths) <= budget or len(lengths) == 1:
        assert all(s.end - s.start <= longest_segment(made, budget) for s in row.segments)


def test_rows_of_like_examples_share_their_shapes() -> None:
    """Thirty-two examples of like lengths make rows of one shape, whatever exactly their lengths are."""
    draws = [make_examples(32, shortest=100 + n, longest=108 + n) for n in range(3)]
    assert len({(row.tokens.shape, row.ends.shape) for row in (padded_sequence(made, CPU) for made in draws)}) == 1


@given(LENGTHS)
def test_a_sequence_is_padded_to_a_shape_of_the_run(lengths: list[int]) -> None:
    """What is trained on is the same as without; a sequence that is none of the run's has a shape of its own."""
    made, tokens = examples(lengths), sum(lengths)
    shapes = choose_shapes([(tokens + 700, len(lengths) + 9), (1, 1)], 0)
    row, own = padded_sequence(made, CPU, shapes), padded_sequence(made, CPU)
    assert (row.tokens.shape[1], len(row.ends) - 1) == shapes.of(tokens, len(lengths))
    assert torch.equal(row.tokens[:, :tokens], own.tokens[:, :tokens])
    assert set(row.tokens[1, tokens:].tolist()) <= {-100}
    assert row.ends[: len(lengths) + 1].tolist() == own.ends[: len(lengths) + 1].tolist()
    assert shapes.of(90_000, 3) == (padded_length(90_000), padded_segments(3))
    blank = blank_sequence(shapes.shapes[-1], CPU)
    assert (blank.tokens.shape, blank.ends.shape) == ((3, shapes.shapes[-1][0]), (shapes.shapes[-1][1] + 1,))
