"""Concatenates examples to one sequence, without padding or padded to one of the run's `padded_shapes`.

Each example is a segment: its positions start at 0, and it does not attend to other segments
(`model/packed_attention.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from job.common.device_copies import to_device
from job.data.examples import lengths_of
from job.model.packed_layout import Segment, build_layout
from job.records import Example
from job.training.padded_shapes import ANY, Shapes

IGNORED = -100
"""The label of a token that is not a target, as in torch's cross-entropy and TRL."""


def packed_inputs(examples: Sequence[Example], device: torch.device) -> dict[str, Any]:
    """Concatenates examples to one sequence without padding.

    Returns:
        Inputs of the model: `input_ids`, `labels` (token ids, or -100 for tokens that are not targets) and
        `position_ids`, each (1, tokens) int64, and the `layout`, by which attention separates the examples. Labels are
        not shifted: each is at the position of its own token, and the loss shifts them. Since no example's first token
        is a target, shifting by one never pairs tokens of two examples.
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
    """(3, length) int64: token ids; labels, shifted to the position that predicts them, or -100; positions."""
    ends: torch.Tensor
    """(segments + 1,) int32: the start of each segment, then the length, repeated for empty segments."""
    segments: tuple[Segment, ...]
    """The non-empty segments."""


def blank_sequence(shape: tuple[int, int], device: torch.device) -> PaddedSequence:
    """A sequence of padding only, of this (length, segments)."""
    length, segments = shape
    tokens = torch.zeros((3, length), dtype=torch.int64, device=device)
    tokens[1] = IGNORED
    ends = torch.full((segments + 1,), length, dtype=torch.int32, device=device)
    ends[0] = 0
    return PaddedSequence(tokens, ends, (Segment(0, length),))


def padded_sequence(examples: Sequence[Example], device: torch.device, shapes: Shapes = ANY) -> PaddedSequence:
    """Concatenates examples to one sequence and pads it to one of the shapes."""
    return _sequence(examples, device, *shapes.of(sum(lengths_of(examples)), len(examples)))


def unpadded_sequence(examples: Sequence[Example], device: torch.device) -> PaddedSequence:
    """Concatenates examples to one sequence without padding; `ends` has no empty segments."""
    return _sequence(examples, device, sum(lengths_of(examples)), len(examples))


def _sequence(examples: Sequence[Example], device: torch.device, length: int, slots: int) -> PaddedSequence:
    """The examples in one sequence of this length; `ends` is (slots + 1,)."""
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
