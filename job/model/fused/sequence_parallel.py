"""Attention of a row whose tokens several processes have a part of each: tokens of all heads, for all tokens of some.

Process r of N has tokens r/N to (r + 1)/N of the row in everything that works token by token. Attention needs all
tokens, but works head by head. So before it each process sends every other one the queries, keys and values that belong
to that one's heads, and after it the outputs come back the same way:

    (own tokens, all heads) -> (all tokens, own heads), attention, (all tokens, own heads) -> (own tokens, all heads)

The gradients go the same ways backwards. Numbers are only moved, so what differs from a row that one process computes
is the order in which gradients are added up: over each process's tokens, then over the processes.

Each process has whole heads of keys and values with the queries that share them. Where there are fewer of these heads
than processes, each process has a part of the queries of one, and a copy of it; its gradients are summed in fp32, in
the order of the ranks. Neither tokens nor heads of keys and values need be a multiple of the processes.

Source: Jacobs et al. 2023, DeepSpeed Ulysses (arXiv:2309.14509), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from job.model.fused.long_attention import Output, RowAttention


class Group(Protocol):
    """The part of `distributed.Processes` that is used here."""

    place: Any

    def all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int]
    ) -> None:
        """Sends every process its part of a flat tensor, and receives one from each."""


def parts(count: int, processes: int) -> list[slice]:
    """So many tokens or heads in as many parts as there are processes, which differ by one at most."""
    ends = [count * rank // processes for rank in range(processes + 1)]
    return [slice(*ends_of_one) for ends_of_one in pairwise(ends)]


@dataclass(frozen=True)
class Heads:
    """Which heads each process computes: of the queries, and of keys and values."""

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]

    def number(self, rank: int) -> tuple[int, int]:
        """Of each of both in this process."""
        return _size(self.queries[rank]), _size(self.keys[rank])


def share_heads(heads: int, kv_heads: int, processes: int) -> Heads:
    """Divides the heads of attention.

    Raises:
        ValueError: They cannot be; see `training.sequence_parallel.why_not_divided`.
    """
    shared_by = heads // kv_heads
    if processes <= kv_heads:
        keys = parts(kv_heads, processes)
        queries = [slice(one.start * shared_by, one.stop * shared_by) for one in keys]
    elif processes % kv_heads == 0 and heads % processes == 0:
        queries = parts(heads, processes)
        keys = [slice(one.start // shared_by, one.start // shared_by + 1) for one in queries]
    else:
        raise ValueError(f"{processes} processes cannot share {heads} heads with {kv_heads} of keys and values")
    return Heads(tuple(queries), tuple(keys))


@dataclass(frozen=True)
class Team:
    """The processes that compute a row together.

    Attributes:
        group: All of them.
        meet: Waits until all are about to exchange tensors; see `placed_weights.computing_together`.
    """

    group: Group
    meet: Callable[[], None]

    @property
    def size(self) -> int:
        """How many they are."""
        return int(self.group.place.world_size)

    @property
    def rank(self) -> int:
        """This process's number among them."""
        return int(self.group.place.rank)

    def exchange(self, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int]) -> torch.Tensor:
        """A flat tensor's parts go to the processes, and theirs come: (sum of `received_sizes`,) in the same dtype."""
        received = sent.new_empty(sum(received_sizes))
        # After all memory that is needed here is there: once all have met, nobody waits for tensors in vain.
        self.meet()
        self.group.all_to_all(received, sent, received_sizes, sent_sizes)
        return received


def to_heads(team: Team, tokens: int, sent: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """For each process the own tokens of its heads -> (all tokens, own heads, size).

    Args:
        team: The processes.
        tokens: Of the whole row.
        sent: By rank: tensors (own tokens, some of its heads, size), which come side by side.
    """
    numbers = [sum(x.shape[1] for x in to_one) for to_one in sent]
    own, _, size = sent[0][0].shape
    sizes = [own * number * size for number in numbers]
    flat = sent[0][0].new_empty(sum(sizes))
    for to_one, number, part in zip(sent, numbers, flat.split_with_sizes(sizes), strict=True):
        torch.cat(list(to_one), 1, out=part.view(own, number, size))
    number = numbers[team.rank]
    found = team.exchange(flat, [_size(part) * number * size for part in parts(tokens, team.size)], sizes)
    return found.view(tokens, number, size)


def to_tokens(team: Team, whole: torch.Tensor, numbers: Sequence[int]) -> list[torch.Tensor]:
    """(all tokens, own heads, size) -> from each process the own tokens of its heads, (own tokens, its heads, size).

    Args:
        team: The processes.
        whole: Contiguous.
        numbers: Of the heads, by rank.
    """
    tokens, heads, size = whole.shape
    by_rank = parts(tokens, team.size)
    own = _size(by_rank[team.rank])
    sizes = [own * number * size for number in numbers]
    found = team.exchange(whole.view(-1), sizes, [_size(part) * heads * size for part in by_rank])
    return [part.view(own, -1, size) for part in found.split_with_sizes(sizes)]


class SequenceParallelAttention:
    """Attention in one layer of a row that is divided over processes; used like the `RowAttention` that it calls.

    Attributes:
        output: That of `attention`, for all tokens and the own heads.
    """

    def __init__(self, attention: RowAttention, team: Team, tokens: int) -> None:
        self._attention, self._team, self._tokens = attention, team, tokens

    @property
    def output(self) -> Output | None:
        """The kernel's output, as `RowAttention.output`."""
        return self._attention.output

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
    ) -> torch.Tensor:
        """(1, heads, own tokens, head size) each -> (1, own tokens, heads, head size)."""
        heads = share_heads(query.shape[1], key.shape[1], self._team.size)
        how = self._team, self._tokens, heads
        found = _ToHeads.apply(*(x[0].transpose(0, 1) for x in (query, key, value)), *how)  # type: ignore[no-untyped-call]
        query, key, value = (x.transpose(0, 1)[None] for x in found)
        out = self._attention(query, key, value, scaling, window)
        return _ToTokens.apply(out[0], *how)[None]  # type: ignore[no-any-return, no-untyped-call]


class _ToHeads(torch.autograd.Function):
    """Queries, keys and values, (own tokens, heads, size) each -> the same as (all tokens, own heads, size).

    One exchange for all three: the parts for a process lie side by side in the dimension of heads.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd calls it so
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, team: Team, tokens: int, heads: Heads
    ) -> tuple[torch.Tensor, ...]:
        ctx.how = team, heads
        sent = [
            [query[:, queries], key[:, keys], value[:, keys]]
            for queries, keys in zip(heads.queries, heads.keys, strict=True)
        ]
        queries, keys = heads.number(team.rank)
        return to_heads(team, tokens, sent).split_with_sizes([queries, keys, keys], 1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        team, heads = ctx.how
        numbers = [queries + 2 * keys for queries, keys in map(heads.number, range(team.size))]
        found = to_tokens(team, torch.cat(gradients, 1), numbers)
        by_rank = [
            part.split_with_sizes([queries, keys, keys], 1)
            for part, (queries, keys) in zip(found, map(heads.number, range(team.size)), strict=True)
        ]
        query, key, value = zip(*by_rank, strict=True)
        return torch.cat(query, 1), _summed(key, heads), _summed(value, heads), None, None, None


class _ToTokens(torch.autograd.Function):
    """Attention's output, (all tokens, own heads, size) -> (own tokens, heads, size)."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, team: Team, tokens: int, heads: Heads) -> torch.Tensor:
        ctx.how = team, tokens, heads
        return torch.cat(to_tokens(team, out.contiguous(), [_size(part) for part in heads.queries]), 1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        team, tokens, heads = ctx.how
        return to_heads(team, tokens, [[gradient[:, part]] for part in heads.queries]), None, None, None


def _summed(gradients: Sequence[torch.Tensor], heads: Heads) -> torch.Tensor:
    """The gradients of keys or of values by rank, (own tokens, heads of that rank, size) -> of all heads.

    Of a head that several processes have a copy of it is the sum.
    """
    last = heads.keys[-1].stop
    if sum(map(_size, heads.keys)) == last:
        return torch.cat(list(gradients), 1)
    tokens, _, size = gradients[0].shape
    whole = gradients[0].new_zeros(tokens, last, size, dtype=torch.float32)
    for place, part in zip(heads.keys, gradients, strict=True):
        whole[:, place] += part
    return whole.to(gradients[0].dtype)


def _size(part: slice) -> int:
    return int(part.stop - part.start)
