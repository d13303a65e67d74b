"""Rows: examples end to end, and padded to few lengths."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from job.records import Example
from job.training.packing import (
    FEW_SEGMENTS,
    GRID,
    RECORDING_TOKENS,
    SEGMENTS,
    SMALLEST_INCREMENT,
    Shapes,
    blank_sequence,
    choose_shapes,
    longest_segment,
    packed_inputs,
    padded_length,
    padded_segments,
    padded_sequence,
    recording_tokens,
)
from tests.helpers import make_examples

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 700), min_size=1, max_size=40)


def examples(lengths: list[int]) -> list[Example]:
    """Examples of these lengths, in which every third token is not learned."""
    return [Example(tuple(range(3, 3 + n)), tuple(place > 0 and place % 3 > 0 for place in range(n))) for n in lengths]


@given(st.integers(1, 100_000))
def test_a_little_is_added(tokens: int) -> None:
    """Padding makes no row shorter, and adds less than a step or a sixteenth, whichever is more."""
    padded = padded_length(tokens)
    assert padded == padded_length(padded)
    assert 0 <= padded - tokens < max(SMALLEST_INCREMENT, tokens / 15)


def test_there_are_few_lengths() -> None:
    """All rows of up to 16,384 tokens have fewer than a hundred lengths between them, so few recordings are made."""
    assert len({padded_length(tokens) for tokens in range(1, 16385)}) < 100


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


SEQUENCES = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 20)), min_size=1, max_size=30)


def cost(sequences: Sequence[tuple[int, int]], lengths: Sequence[int], recording: int) -> int:
    """Tokens that are computed, and those that could be in the time of the recordings, by the smallest length each."""
    return len(lengths) * recording + sum(min(n for n in lengths if n >= tokens) for tokens, _ in sequences)


@given(SEQUENCES, st.integers(0, 5000))
def test_the_shapes_of_a_run_cost_least(sequences: list[tuple[int, int]], recording: int) -> None:
    """No other choice of lengths takes less time, every sequence fits, and the order of the steps does not matter."""
    chosen = choose_shapes(sequences, recording)
    lengths = [length for length, _ in chosen.shapes]
    possible = sorted({-(-tokens // GRID) * GRID for tokens, _ in sequences})[-6:]  # more take long to try
    few = [one for one in sequences if possible[0] - GRID < one[0]]
    others = [
        cost(few, [*some, possible[-1]], recording)
        for size in range(len(possible))
        for some in combinations(possible[:-1], size)
    ]
    best = [length for length, _ in choose_shapes(few, recording).shapes]
    assert cost(few, best, recording) == min(others)
    assert lengths == sorted(lengths)
    for tokens, count in sequences:
        length, segments = chosen.of(tokens, count)
        assert (length, segments) in chosen.shapes
        assert count < segments
        assert 0 <= length - tokens <= chosen.longest_padding
    assert choose_shapes(sequences[::-1], recording) == chosen


def test_a_short_run_has_one_shape_and_a_long_one_many() -> None:
    """A recording pays where it saves more padding than it takes time; the sequences are those of a step of Alpaca."""
    sequences = [(2600 + 91 * n, 32) for n in range(20)]
    assert choose_shapes(sequences[:10], RECORDING_TOKENS).shapes == ((3456, 40),)
    assert len(choose_shapes(sequences * 500, RECORDING_TOKENS).shapes) == len({-(-n // GRID) for n, _ in sequences})
    assert choose_shapes([(343_000, 1)], 0).shapes == ((344_064, 2),)
    assert choose_shapes([], RECORDING_TOKENS) == Shapes()


def test_a_recording_is_worth_more_tokens_of_a_small_model() -> None:
    """The price of a recording is measured at Mistral-7B's shape; a model of half the layers has half of it."""
    mistral = 7_110_393_856
    assert recording_tokens(32, mistral) == RECORDING_TOKENS
    assert recording_tokens(16, mistral) == RECORDING_TOKENS // 2
    assert recording_tokens(32, mistral // 2) == 2 * RECORDING_TOKENS
    assert recording_tokens(32, mistral // 1000) == 6 * RECORDING_TOKENS


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
