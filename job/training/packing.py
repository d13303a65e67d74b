"""Packs examples end to end into one sequence, without padding or padded to one of few shapes.

Each example is a segment: its positions start at 0, and it does not attend to other segments
(`model/packed_attention.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from job.common.device_copies import to_device
from job.data.examples import lengths_of
from job.model.packed_attention import Segment, build_layout
from job.records import Example

IGNORED = -100
"""The label of a token that is no target, as in torch's cross-entropy and TRL."""
SMALLEST_INCREMENT = 256
"""The length of a padded sequence that was not planned is a multiple of at least this many tokens."""
GRID = 128
"""Lengths that are chosen for a whole run are multiples of at least this many tokens, as the tiles of products are."""
SEGMENTS = 8
"""The number of segments of a padded sequence is rounded up to a multiple of this, or to `FEW_SEGMENTS`."""
FEW_SEGMENTS = (2, 4)
"""Of a sequence with one to three examples. The attention kernel's backward pass uses the fewer of a GPU's processors
the more segments there are, empty ones included; see `model.fused.long_attention`."""


def packed_inputs(examples: Sequence[Example], device: torch.device) -> dict[str, Any]:
    """Lays examples end to end in one sequence without padding.

    Returns:
        Inputs of the model: `input_ids`, `labels` (token ids, or -100 for all but target tokens) and `position_ids`,
        each (1, tokens) int64, and the `layout` that keeps the examples apart. Labels are not shifted: each is at the
        position of its own token, and the loss shifts them. Since no example's first token is a target, shifting by one
        never pairs tokens of two examples.
    """
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    segments = []
    for example in examples:
        segments.append(Segment(len(ids), len(ids) + len(example.input_ids)))
        ids += example.input_ids
        labels += (t if target else IGNORED for t, target in zip(example.input_ids, example.targets, strict=True))
        positions += range(len(example.input_ids))
    rows = torch.tensor([ids, labels, positions], device=device)  # one copy to the device instead of three
    return {
        "input_ids": rows[0:1],
        "labels": rows[1:2],
        "position_ids": rows[2:3],
        "layout": build_layout(segments, device),
    }


def alone_inputs(example: Example, device: torch.device) -> dict[str, Any]:
    """One unpacked example, for a model without packing: `input_ids` and `labels`, each (1, tokens) int64."""
    labels = [t if target else IGNORED for t, target in zip(example.input_ids, example.targets, strict=True)]
    ids, labelled = torch.tensor([[*example.input_ids], labels], device=device)
    return {"input_ids": ids[None], "labels": labelled[None]}


@dataclass(frozen=True, eq=False)
class PaddedSequence:
    """A packed sequence, padded to one of few shapes, so that a CUDA graph can be reused for many sequences.

    The padding is a segment of its own without target tokens.
    """

    tokens: torch.Tensor
    """(3, length) int64: token ids; what each position is to predict, or -100; positions. Labels are shifted."""
    ends: torch.Tensor
    """(segments + 1,) int32: where each segment starts, then the length, repeated for empty segments."""
    segments: tuple[Segment, ...]
    """The non-empty segments."""


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


def longest_segment(examples: Sequence[Example], budget: int, most: int | None = None) -> int:
    """Upper bound of the tokens of a segment of a padded sequence, including the segment of padding.

    Valid for sequences of at most `budget` tokens, or of one example, without `Shapes`; of examples of at most `most`
    tokens.
    """
    longest = max(length if most is None else min(length, most) for length in lengths_of(examples))
    return max(longest, length_increment(max(longest, budget)))


def blank_sequence(shape: tuple[int, int], device: torch.device) -> PaddedSequence:
    """A sequence of padding alone, of this (length, segments)."""
    length, segments = shape
    tokens = torch.zeros((3, length), dtype=torch.int64, device=device)
    tokens[1] = IGNORED
    ends = torch.full((segments + 1,), length, dtype=torch.int32, device=device)
    ends[0] = 0
    return PaddedSequence(tokens, ends, (Segment(0, length),))


def padded_sequence(
    examples: Sequence[Example],
    device: torch.device,
    shapes: Shapes = Shapes(),
) -> PaddedSequence:
    """Lays examples end to end in one sequence and pads it to one of the shapes."""
    return _sequence(examples, device, *shapes.of(sum(lengths_of(examples)), len(examples)))


def unpadded_sequence(examples: Sequence[Example], device: torch.device) -> PaddedSequence:
    """The same without padding; `ends` has no empty segments."""
    return _sequence(examples, device, sum(lengths_of(examples)), len(examples))


def _sequence(examples: Sequence[Example], device: torch.device, length: int, slots: int) -> PaddedSequence:
    """The examples in one sequence of this length, whose `ends` have so many slots for segments."""
    ends = [0, *accumulate(len(example.input_ids) for example in examples)]
    used = ends[-1]
    tokens = np.zeros((3, length), dtype=np.int64)
    ids, labels, positions = tokens  # views: writing to them writes to `tokens`
    labels[:] = IGNORED
    places = np.arange(length)
    for example, (start, end) in zip(examples, pairwise(ends), strict=True):
        ids[start:end] = example.input_ids
        labels[start : end - 1] = np.where(example.targets[1:], ids[start + 1 : end], IGNORED)
        positions[start:end] = places[: end - start]
    if used < length:
        positions[used:] = places[: length - used]
        ends.append(length)
    segments = tuple(map(Segment, ends, ends[1:]))
    ends += [length] * (slots + 1 - len(ends))
    return PaddedSequence(
        to_device(torch.from_numpy(tokens), device), to_device(torch.tensor(ends, dtype=torch.int32), device), segments
    )
