"""The shapes that packed sequences are padded to: few in total, and few in a run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from job.training.padded_shapes import (
    GRID,
    RECORDING_TOKENS,
    SMALLEST_INCREMENT,
    Shapes,
    choose_shapes,
    padded_length,
    recording_tokens,
)


@given(st.integers(1, 100_000))
def test_a_little_is_added(tokens: int) -> None:
    """Padding makes no row shorter, and adds less than a step or a sixteenth, whichever is more."""
    padded = padded_length(tokens)
    assert padded == padded_length(padded)
    assert 0 <= padded - tokens < max(SMALLEST_INCREMENT, tokens / 15)


def test_there_are_few_lengths() -> None:
    """All rows of up to 16,384 tokens have fewer than a hundred lengths between them, so few recordings are made."""
    assert len({padded_length(tokens) for tokens in range(1, 16385)}) < 100


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
