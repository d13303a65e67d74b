"""The layout of a packed sequence: its segments, and which tokens each of its tokens sees.

A packed sequence is many sequences laid end to end without padding, none of which attends to another. The queries of a
segment see, causally, the segment itself, and before it an optional prefix: another segment (a question that several
choices share), with what that one sees (examples that several questions share). Training uses no prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from job.common.device_copies import to_device

_BLOCK = 64
"""Tokens whose attention is computed together where segments have prefixes. Each costs as much as the one among them
that sees the most, so there should not be many; each call takes time, so there should not be few."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None, int | None], torch.Tensor]
"""(query, key, value, scaling, window) -> output; shapes as of `packed_attention.packed_attention`."""


@dataclass(frozen=True)
class Segment:
    """Tokens `start:end` of a packed sequence.

    They also attend to `prefix_start:prefix_end` before them, the beginning of another segment, and to all that this
    one attends to.
    """

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0


@dataclass(frozen=True, eq=False)
class Block:
    """Queries `start:end` of a packed sequence, and the keys that at least one of them sees.

    `keys`, (keys,) int64, says which tokens these are; None where they are the queries' own. `mask`, (queries, keys)
    bool, says which key each query sees; None where each sees all up to itself.
    """

    start: int
    end: int
    keys: torch.Tensor | None
    mask: torch.Tensor | None

    def keys_of(self, x: torch.Tensor) -> torch.Tensor:
        """(1, heads, tokens, head size) -> (1, heads, keys, head size)."""
        return x[:, :, self.start : self.end] if self.keys is None else x.index_select(2, self.keys)


@dataclass(frozen=True, eq=False)
class Layout:
    """The segments of one packed sequence, and what the variable-length kernel needs of them, on its device."""

    segments: tuple[Segment, ...]
    queries: torch.Tensor
    """(segments + 1,) int32: where each segment's queries start, and their number."""
    keys: torch.Tensor
    """(segments + 1,) int32: the same for the keys."""
    longest_query: int
    longest_key: int
    """No segment has more."""
    attend: Attend | None = None
    """Computes plain causal attention in place of the kernels below, where it is given."""
    _blocks: dict[int | None, list[Block]] = field(default_factory=dict, repr=False)

    @cached_property
    def seen(self) -> tuple[tuple[range, ...], ...]:
        """For each segment the tokens that it sees before its own, in the order of their positions."""
        return _seen(self.segments)

    @cached_property
    def copied_keys(self) -> int:
        """How many keys the segments see in all; 0 where none has a prefix, so that nothing is copied."""
        return sum(_keys(self.segments, self.seen)) if any(self.seen) else 0

    @cached_property
    def key_index(self) -> torch.Tensor | None:
        """(keys,) int64: which token of the sequence each key is; None where the keys are the sequence itself."""
        if not any(self.seen):
            return None
        own = zip(self.seen, self.segments, strict=True)
        ranges = [torch.arange(r.start, r.stop) for seen, s in own for r in (*seen, range(s.start, s.end))]
        return to_device(torch.cat(ranges), self.queries.device)

    @cached_property
    def last_seen_by(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """(tokens,): the end of the tokens that see each token.

        Those that see token j are j itself and all up to this end: the segments are in the order in which a tree of
        prefixes is walked, a segment before all that see it, and these before any other.

        Raises:
            ValueError: They are not in this order.
        """
        sizes = [s.end - s.start for s in self.segments]
        segment_ends = np.repeat(np.array([s.end for s in self.segments], np.int32), sizes)
        ends, last = segment_ends.copy(), {s.start: s.end for s in self.segments}
        for s in reversed(self.segments):  # those that see a segment come behind it
            if s.prefix_start < s.prefix_end:
                part = ends[s.prefix_start : s.prefix_end]
                np.maximum(part, last[s.start], out=part)
                last[s.prefix_start] = max(last[s.prefix_start], last[s.start])
        # If the number of queries that see a token equals its distance to the last of them, all between see it.
        if int((ends - segment_ends).sum(dtype=np.int64)) != sum(
            n * sum(map(len, s)) for n, s in zip(sizes, self.seen, strict=True)
        ):
            raise ValueError("a segment sees one that is not the last before it without a prefix")
        return ends

    @cached_property
    def depths(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """(tokens,): how many tokens each sees besides itself."""
        sizes = [sum(map(len, seen)) for seen in self.seen]
        parts = zip(sizes, self.segments, strict=True)
        return np.concatenate([np.arange(size, size + s.end - s.start, dtype=np.int32) for size, s in parts])

    def seen_before(self, token: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The tokens that this one sees before itself; what tokens behind it see is among them, or behind it, too."""
        return np.flatnonzero(self.last_seen_by[:token] > token)

    def blocks(self, window: int | None = None) -> list[Block]:
        """The sequence cut into blocks, each query seeing its last `window` keys; made for the first layer that asks.

        Raises:
            ValueError: As `last_seen_by`.
        """
        if window not in self._blocks:
            starts = [i for i, seen in enumerate(self.seen) if not seen]
            trees = (self.segments[first:end] for first, end in pairwise([*starts, len(self.segments)]))
            self._blocks[window] = [block for tree in trees for block in self._blocks_of(tree, window)]
        return self._blocks[window]

    def _blocks_of(self, tree: Sequence[Segment], window: int | None) -> Iterator[Block]:
        """The first segment, and the others, which see it."""
        start, end = tree[0].start, tree[-1].end
        single = len(tree) == 1
        if single and (window is None or window >= end - start):
            yield Block(start, end, None, None)
            return
        step = end - start if single else _BLOCK
        for first in range(start, end, step):
            last = min(first + step, end)
            before = self.seen_before(first)
            keys = np.concatenate([before, np.arange(first, last)])
            query = np.arange(first, last)[:, None]
            sees = (keys <= query) & (query < self.last_seen_by[keys])
            if window is not None:
                sees &= self.depths[keys] > self.depths[first:last, None] - window
            device = self.queries.device
            index = torch.from_numpy(keys).to(device) if len(before) else None
            yield Block(first, last, index, torch.from_numpy(sees).to(device))


def _seen(segments: Sequence[Segment]) -> tuple[tuple[range, ...], ...]:
    by_start: dict[int, tuple[range, ...]] = {}
    for s in segments:
        prefix = range(s.prefix_start, s.prefix_end)
        by_start[s.start] = (*by_start[s.prefix_start], prefix) if prefix else ()
    return tuple(by_start.values())


def _keys(segments: Sequence[Segment], visible: Sequence[Sequence[range]]) -> list[int]:
    """How many keys the last query of each segment sees."""
    return [sum(map(len, before)) + s.end - s.start for before, s in zip(visible, segments, strict=True)]


def build_layout(segments: Sequence[Segment], device: torch.device) -> Layout:
    """Lays out the segments of one packed sequence; they must cover it without gaps, in order.

    Raises:
        KeyError: A prefix does not begin where a segment begins.
    """
    keys = _keys(segments, _seen(segments))
    query_offsets = to_device(torch.tensor([0, *(s.end for s in segments)], dtype=torch.int32), device)
    key_offsets = to_device(torch.tensor([0, *keys]).cumsum(0).to(torch.int32), device)
    return Layout(tuple(segments), query_offsets, key_offsets, max(s.end - s.start for s in segments), max(keys))
