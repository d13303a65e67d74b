"""The shapes that packed sequences are padded to: few, so that few CUDA graphs are recorded in a run.

A shape is a length in tokens and a number of segments (`packing.PaddedSequence`). Shapes affect the last bits of a
gradient, so they follow from what is the same in every attempt of a run. No tensors here.
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
"""The length of a padded sequence that was not planned is a multiple of at least this many tokens."""
GRID = 128
"""Lengths that are chosen for a whole run are multiples of at least this many tokens, as the tiles of products are."""
SEGMENTS = 8
"""The number of segments of a padded sequence is rounded up to a multiple of this, or to `FEW_SEGMENTS`."""
FEW_SEGMENTS = (2, 4)
"""Of a sequence with one to three examples. The attention kernel's backward pass uses the fewer of a GPU's processors
the more segments there are, empty ones included; see `model.fused.long_attention`."""


def padded_length(tokens: int) -> int:
    """The length to which so many tokens are padded at least: a few per cent more tokens."""
    step = length_increment(tokens)
    return -(-tokens // step) * step


def length_increment(tokens: int) -> int:
    """The step between the lengths of padded sequences of about so many tokens."""
    return max(SMALLEST_INCREMENT, 1 << max(0, (tokens - 1).bit_length() - 5))


def padded_segments(examples: int) -> int:
    """The number of segments of a padded sequence of so many examples, at least: they and the padding, rounded up."""
    segments = examples + 1
    return next((few for few in FEW_SEGMENTS if segments <= few), -(-segments // SEGMENTS) * SEGMENTS)


@dataclass(frozen=True)
class Shapes:
    """The shapes that a run's packed sequences are padded to: (length, segments), the shortest first."""

    shapes: tuple[tuple[int, int], ...] = ()
    longest_padding: int = 0
    """Tokens of padding that no sequence has more of."""

    def of(self, tokens: int, examples: int) -> tuple[int, int]:
        """The shape of a sequence of so many tokens and examples; one of its own where it is none of the run's."""
        fitting = (shape for shape in self.shapes if tokens <= shape[0] and examples < shape[1])
        return next(fitting, (padded_length(tokens), padded_segments(examples)))


ANY = Shapes()
"""Each sequence has a shape of its own, by its length."""


def choose_shapes(sequences: Sequence[tuple[int, int]], recording_tokens: int) -> Shapes:
    """The shapes that take the least time in all: to record each, and to compute the padding of every sequence.

    Few in a short run, where a recording takes longer than the padding that it saves; in a long one most multiples of
    `GRID`. The shape of a sequence affects the last bits of its gradient. So the choice follows from
    what is the same in every attempt of a run, and is the same whether anything is recorded or not.

    Args:
        sequences: Tokens and examples of each packed sequence of the whole run, in any order.
        recording_tokens: Tokens that are computed in the time of one recording.
    """
    counts: dict[int, int] = {}
    segments: dict[int, int] = {}
    for tokens, examples in sequences:
        step = max(GRID, 1 << max(0, (tokens - 1).bit_length() - 7))  # at most a 64th more, so there are few to try
        length = -(-tokens // step) * step
        counts[length] = counts.get(length, 0) + 1
        segments[length] = max(segments.get(length, 0), padded_segments(examples))
    lengths = sorted(counts)
    # least[i]: the least cost of the i shortest lengths, the longest of them chosen; last[i]: how many the one before
    # that covers. A group of neighbouring lengths is padded to its longest.
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
    """The shapes that an earlier attempt chose, perhaps by another version of `choose_shapes`.

    Args:
        shapes: (length, segments), in any order.
        sequences: As for `choose_shapes`.
    """
    chosen = Shapes(tuple(sorted(shapes)))
    return replace(chosen, longest_padding=max((chosen.of(*one)[0] - one[0] for one in sequences), default=0))


def longest_shape(sequences: Sequence[tuple[int, int]]) -> int:
    """More tokens than any version pads a run's sequences to; for what a checkpoint says."""
    return 2 * max((tokens for tokens, _ in sequences), default=0) + SMALLEST_INCREMENT


def longest_segment(examples: Sequence[Example], budget: int, most: int | None = None) -> int:
    """Upper bound of the tokens of a segment of a padded sequence, including the segment of padding.

    Valid for sequences of at most `budget` tokens, or of one example, without `Shapes`; of examples of at most `most`
    tokens.
    """
    longest = max(length if most is None else min(length, most) for length in lengths_of(examples))
    return max(longest, length_increment(max(longest, budget)))


RECORDING_TOKENS = 4_600
"""Tokens that Mistral-7B's shape trains on in the time of a recording: 0.27 s at 16,920 tokens/s, on an H200.

Of the same 20 steps, 7 recordings took 1.13 s more than 2, though their padding took 0.22 s less
(`tests/bench/results/2026-11-29-h200-recordings-and-scoring.jsonl`).
"""
_MISTRAL_7B = 32, 7_110_393_856
"""Its layers, and the weights that a token is multiplied with."""
_SMALLEST_FACTOR = 6
"""SmolLM2-135M, a fiftieth of the weights, trained six times as fast there: a small model keeps no GPU busy."""


def recording_tokens(layers: int, parameters: int) -> int:
    """Tokens that are trained on in the time of a recording, which grows with the layers.

    A function of the model alone, not of the machine: it affects the shapes, and so the last bits.

    Args:
        layers: Of the decoder.
        parameters: Weights that a token is multiplied with.
    """
    faster = min(_SMALLEST_FACTOR, _MISTRAL_7B[1] / parameters)
    return int(RECORDING_TOKENS * layers / _MISTRAL_7B[0] * faster)


def recording_tokens_of(model: Any) -> int:
    """`recording_tokens` of a PEFT model."""
    try:
        of = read_config(model.get_base_model().config.to_dict())
    except ValueError:  # an unknown architecture, whose sequences are not padded
        return RECORDING_TOKENS
    return recording_tokens(of.layers, of.used_parameters + of.head_parameters)


class RunShapes:
    """The shapes of a run by token budget, chosen for all its steps when they are first asked for.

    They are the same in all processes, since the slowest of them decides how long a step takes.

    Args:
        recording_tokens: Tokens that a process computes in the time of one recording.
        at_most: Tokens of the longest example that goes into a padded sequence; None where any may.
    """

    def __init__(self, recording_tokens: int, at_most: int | None = None) -> None:
        self._recording_tokens, self._at_most = recording_tokens, at_most
        self._known: dict[tuple[int, int | None], Shapes] = {}

    def of(self, steps: Steps, budget: int) -> Shapes:
        """The shapes for micro-batches of so many tokens."""
        if (budget, steps.divided_above) not in self._known:
            cost = self._recording_tokens * steps.world_size  # while one records a graph, all wait
            self.keep(steps, budget, choose_shapes(self.sequences(steps, budget), cost))
        return self._known[budget, steps.divided_above]

    def keep(self, steps: Steps, budget: int, shapes: Shapes) -> None:
        """Sets the shapes: those of a checkpoint."""
        self._known[budget, steps.divided_above] = shapes

    def sequences(self, steps: Steps, budget: int) -> list[tuple[int, int]]:
        """(tokens, examples) of each padded sequence of all processes."""
        return steps.sequences(budget, self._at_most)
