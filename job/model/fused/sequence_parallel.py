"""Sequence-parallel attention (Ulysses): the tokens of one row are split over processes, its heads during attention.

Of N processes, rank r holds tokens r/N to (r + 1)/N of the row in every operation that works token by token. Attention
needs all tokens, but each head is independent. So one all-to-all before attention redistributes the tensors from tokens
to heads, and another one after it redistributes them back:

    (own tokens, all heads) -> (all tokens, own heads), attention, (all tokens, own heads) -> (own tokens, all heads)

The backward pass sends the gradients the same two ways in reverse. The exchanges only move numbers, so the result
differs from that of a single process only in the order in which gradients are summed: first over the tokens of each
process, and then over the processes.

Each process computes whole key/value heads, with the query heads that share them (grouped-query attention). With more
processes than key/value heads, several processes hold a copy of the same key/value head and each takes a part of its
query heads; the gradients of the copies are summed in fp32, in the order of the ranks. Neither the number of tokens nor
that of key/value heads has to be a multiple of the number of processes.

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


class AllToAll(Protocol):
    """The part of `distributed.Processes` that is used here."""

    place: Any
    """`rank` and `world_size` of this process."""

    def all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int]
    ) -> None:
        """Fills `received` with one part from each process, and sends each its part of `sent`.

        Args:
            received: (sum of `received_sizes`,), in the dtype of `sent`.
            sent: (sum of `sent_sizes`,).
            received_sizes: Numbers that come from each process, by rank.
            sent_sizes: Numbers that go to each process, by rank.
        """


def parts(count: int, processes: int) -> list[slice]:
    """Splits `count` tokens or heads into one contiguous range per process; their sizes differ by at most one."""
    ends = [count * rank // processes for rank in range(processes + 1)]
    return [slice(*ends_of_one) for ends_of_one in pairwise(ends)]


@dataclass(frozen=True)
class HeadPartition:
    """Which attention heads each process computes.

    Attributes:
        queries: The query heads of each process, by rank.
        keys: Its key/value heads; several processes may have the same one.
    """

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]

    def counts(self, rank: int) -> tuple[int, int]:
        """(query heads, key/value heads) that process `rank` computes."""
        return _size(self.queries[rank]), _size(self.keys[rank])


def share_heads(heads: int, kv_heads: int, processes: int) -> HeadPartition:
    """Assigns attention heads to processes.

    Args:
        heads: Query heads.
        kv_heads: Key/value heads, each shared by `heads / kv_heads` query heads.
        processes: Number of processes that compute the row.

    Raises:
        ValueError: These heads cannot be divided by the number of processes; see
            `training.sequence_parallel.why_not_divided`.
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
    return HeadPartition(tuple(queries), tuple(keys))


@dataclass(frozen=True)
class SequenceParallelGroup:
    """The processes that compute a row together.

    Attributes:
        processes: All processes of the run.
        barrier: Waits until every process is about to exchange tensors; see `placed_weights.computing_together`.
    """

    processes: AllToAll
    barrier: Callable[[], None]

    @property
    def size(self) -> int:
        """How many processes there are."""
        return int(self.processes.place.world_size)

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return int(self.processes.place.rank)

    def all_to_all(self, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int]) -> torch.Tensor:
        """An all-to-all of a flat tensor, once all processes are at the barrier; sizes as for `AllToAll.all_to_all`.

        Returns:
            (sum of `received_sizes`,), in the dtype of `sent`.

        Raises:
            OtherOutOfMemory: Memory ran out in another process (`placed_weights`).
            JobError: Another process has ended.
        """
        received = sent.new_empty(sum(received_sizes))
        # After the allocation, which may run out of memory: the process reports that at the barrier, and the others do
        # not wait for its tensors.
        self.barrier()
        self.processes.all_to_all(received, sent, received_sizes, sent_sizes)
        return received


def to_heads(sp_group: SequenceParallelGroup, tokens: int, sent: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """From a split by tokens to a split by heads: one all-to-all.

    Args:
        sp_group: The processes.
        tokens: Tokens of the whole row.
        sent: For each rank the tensors that it gets, (own tokens, some of its heads, head size) each; they are
            concatenated along the heads.

    Returns:
        (all tokens, own heads, head size).
    """
    head_counts = [sum(x.shape[1] for x in to_one) for to_one in sent]
    own_tokens, _, head_size = sent[0][0].shape
    sizes = [own_tokens * heads * head_size for heads in head_counts]
    flat = sent[0][0].new_empty(sum(sizes))
    for to_one, heads, part in zip(sent, head_counts, flat.split_with_sizes(sizes), strict=True):
        torch.cat(list(to_one), 1, out=part.view(own_tokens, heads, head_size))
    own_heads = head_counts[sp_group.rank]
    received_sizes = [_size(part) * own_heads * head_size for part in parts(tokens, sp_group.size)]
    received = sp_group.all_to_all(flat, received_sizes, sizes)
    return received.view(tokens, own_heads, head_size)


def to_tokens(
    sp_group: SequenceParallelGroup, by_heads: torch.Tensor, head_counts: Sequence[int]
) -> list[torch.Tensor]:
    """From a split by heads back to a split by tokens: one all-to-all.

    Args:
        sp_group: The processes.
        by_heads: (all tokens, own heads, head size), contiguous.
        head_counts: Number of heads of each rank.

    Returns:
        By rank, (own tokens, heads of that rank, head size).
    """
    tokens, own_heads, head_size = by_heads.shape
    by_rank = parts(tokens, sp_group.size)
    own_tokens = _size(by_rank[sp_group.rank])
    sizes = [own_tokens * heads * head_size for heads in head_counts]
    sent_sizes = [_size(part) * own_heads * head_size for part in by_rank]
    received = sp_group.all_to_all(by_heads.view(-1), sizes, sent_sizes)
    return [part.view(own_tokens, -1, head_size) for part in received.split_with_sizes(sizes)]


class SequenceParallelAttention:
    """Attention in one layer of a row that is divided over processes; used like the `RowAttention` that it calls.

    Args:
        attention: Computes this process's heads over all tokens of the row.
        sp_group: The processes.
        tokens: Tokens of the whole row.
    """

    def __init__(self, attention: RowAttention, sp_group: SequenceParallelGroup, tokens: int) -> None:
        self._attention, self._sp_group, self._tokens = attention, sp_group, tokens

    @property
    def output(self) -> Output | None:
        """`RowAttention.output`: for all tokens of the row, and this process's heads only."""
        return self._attention.output

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None
    ) -> torch.Tensor:
        """Attention of this process's tokens to all tokens of the row.

        Args:
            query: (1, query heads, own tokens, head size).
            key: (1, key/value heads, own tokens, head size).
            value: As `key`.
            scaling: Factor of the scores; None for 1 / sqrt(head size).
            window: How many keys a query sees, its own included; None for all up to its own.

        Returns:
            (1, own tokens, query heads, head size).
        """
        heads = share_heads(query.shape[1], key.shape[1], self._sp_group.size)
        partition = self._sp_group, self._tokens, heads
        by_heads = _ToHeads.apply(*(x[0].transpose(0, 1) for x in (query, key, value)), *partition)  # type: ignore[no-untyped-call]
        query, key, value = (x.transpose(0, 1)[None] for x in by_heads)
        out = self._attention(query, key, value, scaling, window)
        return _ToTokens.apply(out[0], *partition)[None]  # type: ignore[no-any-return, no-untyped-call]


class _ToHeads(torch.autograd.Function):
    """Queries, keys and values, (own tokens, heads, head size) each -> (all tokens, own heads, head size) each.

    One all-to-all sends all three: what a process gets of them is concatenated along the heads.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd calls it so
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sp_group: SequenceParallelGroup,
        tokens: int,
        heads: HeadPartition,
    ) -> tuple[torch.Tensor, ...]:
        ctx.partition = sp_group, heads
        sent = [
            [query[:, queries], key[:, keys], value[:, keys]]
            for queries, keys in zip(heads.queries, heads.keys, strict=True)
        ]
        queries, keys = heads.counts(sp_group.rank)
        return to_heads(sp_group, tokens, sent).split_with_sizes([queries, keys, keys], 1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        sp_group, heads = ctx.partition
        head_counts = [queries + 2 * keys for queries, keys in map(heads.counts, range(sp_group.size))]
        received = to_tokens(sp_group, torch.cat(gradients, 1), head_counts)
        by_rank = [
            part.split_with_sizes([queries, keys, keys], 1)
            for part, (queries, keys) in zip(received, map(heads.counts, range(sp_group.size)), strict=True)
        ]
        query, key, value = zip(*by_rank, strict=True)
        return torch.cat(query, 1), _summed(key, heads), _summed(value, heads), None, None, None


class _ToTokens(torch.autograd.Function):
    """Attention's output, (all tokens, own heads, head size) -> (own tokens, heads, head size)."""

    @staticmethod
    def forward(
        ctx: Any, out: torch.Tensor, sp_group: SequenceParallelGroup, tokens: int, heads: HeadPartition
    ) -> torch.Tensor:
        ctx.partition = sp_group, tokens, heads
        return torch.cat(to_tokens(sp_group, out.contiguous(), [_size(part) for part in heads.queries]), 1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        sp_group, tokens, heads = ctx.partition
        return to_heads(sp_group, tokens, [[gradient[:, part]] for part in heads.queries]), None, None, None


def _summed(gradients: Sequence[torch.Tensor], heads: HeadPartition) -> torch.Tensor:
    """The gradient of all key (or value) heads, (own tokens, key/value heads, head size).

    Where several processes hold a copy of a head, their gradients are summed.

    Args:
        gradients: By rank, (own tokens, key/value heads of that rank, head size).
        heads: The heads of each rank.
    """
    last = heads.keys[-1].stop
    if sum(map(_size, heads.keys)) == last:
        return torch.cat(list(gradients), 1)
    tokens, _, size = gradients[0].shape
    whole = gradients[0].new_zeros(tokens, last, size, dtype=torch.float32)
    for head_slice, part in zip(heads.keys, gradients, strict=True):
        whole[:, head_slice] += part
    return whole.to(gradients[0].dtype)


def _size(part: slice) -> int:
    return int(part.stop - part.start)
