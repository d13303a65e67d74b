"""The shapes that packed sequences are padded to: few, so that a run records few CUDA graphs.

A shape is a length in tokens and a number of segments (`packing.PaddedSequence`). Shapes affect the last bits of a
gradient, so they depend only on what is the same in every attempt of a run. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from job.data.batch_plan import Steps
from job.data.examples import lengths_of
from job.model.architecture import read_config
from job.records import Example

SMALLEST_INCREMENT = 256
"""Without `Shapes`, the length of a padded sequence is a multiple of at least this many tokens."""
GRID = 128
"""Lengths chosen for a whole run are multiples of at least this many tokens, like the tiles of matrix products."""
SEGMENTS = 8
"""The number of segments of a padded sequence is rounded up to a multiple of this, or to `FEW_SEGMENTS`."""
FEW_SEGMENTS = (2, 4)
"""Numbers of segments of a sequence with one to three examples. The more segments there are, empty ones included, the
fewer of the GPU's multiprocessors the attention kernel's backward pass uses; see `model.fused.long_attention`."""


def padded_length(tokens: int) -> int:
    """The length to which this number of tokens is padded without `Shapes`: a few per cent more."""
    increment = length_increment(tokens)
    return -(-tokens // increment) * increment


def length_increment(tokens: int) -> int:
    """The difference between two neighbouring lengths of padded sequences of about this many tokens."""
    return max(SMALLEST_INCREMENT, 1 << max(0, (tokens - 1).bit_length() - 5))


def padded_segments(examples: int) -> int:
    """The number of segments of a padded sequence of this many examples: examples and padding, rounded up."""
    segments = examples + 1
    return next((few for few in FEW_SEGMENTS if segments <= few), -(-segments // SEGMENTS) * SEGMENTS)


@dataclass(frozen=True)
class Shapes:
    """The shapes that a run's packed sequences are padded to: (length, segments), the shortest first."""

    shapes: tuple[tuple[int, int], ...] = ()
    longest_padding: int = 0
    """Maximum tokens of padding of any sequence."""

    def of(self, tokens: int, examples: int) -> tuple[int, int]:
        """The shape of a sequence with this number of tokens and examples: the shortest that it fits into.

        If it fits into none, its own length and number of segments, rounded up.
        """
        fitting = (shape for shape in self.shapes if tokens <= shape[0] and examples < shape[1])
        return next(fitting, (padded_length(tokens), padded_segments(examples)))


ANY = Shapes()
"""No shapes were chosen for the run: each sequence is padded by `padded_length` and `padded_segments`."""


def choose_shapes(sequences: Sequence[tuple[int, int]], recording_tokens: int) -> Shapes:
    """The shapes for which recording all CUDA graphs and computing all padding takes the least time together.

    A short run gets few shapes, since a recording takes longer than the padding that it saves; a long run gets most
    multiples of `GRID`. The shape of a sequence affects the last bits of its gradient. Therefore the choice depends
    only on what is the same in every attempt of a run, and is the same whether anything is recorded or not.

    Args:
        sequences: Tokens and examples of each packed sequence of the whole run, in any order.
        recording_tokens: Tokens that are computed in the time of one recording.
    """
    counts: dict[int, int] = {}
    segments: dict[int, int] = {}
    for tokens, examples in sequences:
        # At most 1/64 more tokens, so that few lengths have to be tried.
        increment = max(GRID, 1 << max(0, (tokens - 1).bit_length() - 7))
        length = -(-tokens // increment) * increment
        counts[length] = counts.get(length, 0) + 1
        segments[length] = max(segments.get(length, 0), padded_segments(examples))
    lengths = sorted(counts)
    # Dynamic programming: consecutive lengths form groups, and a group is padded to its longest length. least[i] is the
    # least cost of the i shortest lengths if a group ends there; last[i] is where that group starts.
    least, last = [0], [0]
    for end in range(1, len(lengths) + 1):
        costs, covered = [], 0
        for start in range(end - 1, -1, -1):
            covered += counts[lengths[start]]
            costs.append((least[start] + recording_tokens + covered * lengths[end - 1], start))
        cost, start = min(costs)
        least.append(cost)
        last.append(start)
    shapes, end = [], len(lengths)
    while end:
        start = last[end]
        shapes.append((lengths[end - 1], max(segments[length] for length in lengths[start:end])))
        end = start
    return shapes_of_before(shapes, sequences)


def shapes_of_before(shapes: Sequence[tuple[int, int]], sequences: Sequence[tuple[int, int]]) -> Shapes:
    """`Shapes` from the list of shapes that an earlier attempt chose, perhaps by another version of `choose_shapes`.

    Args:
        shapes: (length, segments), in any order.
        sequences: As for `choose_shapes`.
    """
    ordered = Shapes(tuple(sorted(shapes)))
    return replace(ordered, longest_padding=max((ordered.of(*one)[0] - one[0] for one in sequences), default=0))


def longest_shape(sequences: Sequence[tuple[int, int]]) -> int:
    """An upper bound, in tokens, of the shapes that any version chooses; a checkpoint with larger ones is not valid."""
    return 2 * max((tokens for tokens, _ in sequences), default=0) + SMALLEST_INCREMENT


def longest_segment(examples: Sequence[Example], budget: int, most: int | None = None) -> int:
    """Upper bound of the tokens of a segment of a sequence padded without `Shapes`, including the segment of padding.

    Args:
        examples: The examples.
        budget: The token budget: a sequence has at most these tokens, or one example.
        most: Tokens of the longest example that is padded; None if all are.
    """
    longest = max(length if most is None else min(length, most) for length in lengths_of(examples))
    return max(longest, length_increment(max(longest, budget)))


RECORDING_TOKENS = 4_600
"""Tokens that Mistral-7B's shape trains on in the time of one recording: 0.27 s at 16,920 tokens/s, on an H200.

In the same 20 steps, 7 recordings took 1.13 s more than 2, and saved 0.22 s of padding
(`tests/bench/results/2026-11-29-h200-recordings-and-scoring.jsonl`).
"""
_MISTRAL_7B = 32, 7_110_393_856
"""Mistral-7B's number of layers, and of weights that a token is multiplied with."""
_SMALLEST_FACTOR = 6
"""SmolLM2-135M, with 1/50 of the weights, trained only six times as fast there: it does not use the whole GPU."""


def recording_tokens(layers: int, parameters: int) -> int:
    """Tokens that are trained on in the time of one recording, which grows with the number of layers.

    It depends on the model only, not on the machine, because it affects the shapes, and so the last bits.

    Args:
        layers: Number of decoder layers.
        parameters: Number of weights that a token is multiplied with.
    """
    faster = min(_SMALLEST_FACTOR, _MISTRAL_7B[1] / parameters)
    return int(RECORDING_TOKENS * layers / _MISTRAL_7B[0] * faster)


def recording_tokens_of(model: Any) -> int:
    """`recording_tokens` of a PEFT model."""
    try:
        sizes = read_config(model.get_base_model().config.to_dict())
    except ValueError:  # an unknown architecture, whose sequences are not padded
        return RECORDING_TOKENS
    return recording_tokens(sizes.layers, sizes.used_parameters + sizes.head_parameters)


class RunShapes:
    """The shapes of a run by token budget, chosen for all its steps on first use.

    They are the same in all processes, because the slowest process determines the time of a step.

    Args:
        recording_tokens: Tokens that a process computes in the time of one recording.
        at_most: Tokens of the longest example that is padded (longer ones are long rows); None if all are padded.
    """

    def __init__(self, recording_tokens: int, at_most: int | None = None) -> None:
        self._recording_tokens, self._at_most = recording_tokens, at_most
        self._known: dict[tuple[int, int | None], Shapes] = {}

    def of(self, steps: Steps, budget: int) -> Shapes:
        """The shapes for this batch plan and token budget."""
        if (budget, steps.divided_above) not in self._known:
            cost = self._recording_tokens * steps.world_size  # while one records a graph, all wait
            self.set(steps, budget, choose_shapes(self.sequences(steps, budget), cost))
        return self._known[budget, steps.divided_above]

    def set(self, steps: Steps, budget: int, shapes: Shapes) -> None:
        """Sets the shapes, to those of a checkpoint."""
        self._known[budget, steps.divided_above] = shapes

    def sequences(self, steps: Steps, budget: int) -> list[tuple[int, int]]:
        """(tokens, examples) of each padded sequence of all processes."""
        return steps.sequences(budget, self._at_most)
