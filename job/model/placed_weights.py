"""A base whose 4-bit weights are not all on the device: sharded over processes, or held in main memory.

    on the device   slot 0: layer 0, 2, 4, ...      slot 1: layer 1, 3, 5, ...      (the packed bytes of one layer each)
    elsewhere       `host`: all layers in main memory.      `sharded`: 1/N of each layer on the device of each process.

The bytes of a layer are those that bitsandbytes made: packed weights, and the constants of their blocks. They are only
copied, so a layer computes the same bits wherever they came from. `placed_loading` moves them there while a base is
loaded. The tensors of a weight are views into its layer's slot, at addresses that never change; what changes is which
layer's bytes are there.

Every use of a weight reads the constants of its quantization state, and reading these first copies the layer's bytes
into the slot (`_placed_state` of `placed_loading`). So it does not matter what computes: bitsandbytes' layers, those of
`fused`, PEFT's initializations, a merge; forward, recomputed, backward, in any order. After a layer the next one in
the same direction is fetched while the layer computes: its slot is that of the layer before, which is done. A GPU
orders this by streams: a copy begins after what was launched before it, and what is launched after it waits.

Sharded, all processes have to take part in every gather. They compute different numbers of sequences, and may run out
of memory in the middle of one. So they work in rounds, within `taking_part`: in each round every process says which
layer it needs, or none, and each layer that any of them needs is gathered by all. A process that has finished or
failed takes part in further rounds, without requesting a layer, until no process requests one.

To add a placement: a class like `_Host`, its line in `open_source` and in `placement_of`, and what `PLACEMENTS` in
`training.memory_model` says.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from job.common.out_of_memory import out_of_memory
from job.common.pinned_memory import pin, unpin
from job.log import get_logger

ALIGNMENT = 256
"""Bytes to which every tensor in a slot is aligned, as torch's allocator aligns them on a GPU: kernels may choose how
they load by the address."""
_NONE = -1
"""Sent instead of a layer's number: this process needs no layer."""
_AT_BARRIER = -2
"""Sent instead of a layer's number: this process waits in `barrier` for all others."""
PLACED = "placed_weights"
"""Attribute of the base, which holds its `PlacedWeights`."""

Wait = Callable[[], None]
"""Makes what follows on the current stream wait until bytes are there."""


class AllGather(Protocol):
    """The part of `distributed.Processes` that sharding uses."""

    place: Any

    def exchange(self, number: int) -> list[int]:
        """All-gather of one number: those of all processes, by rank."""

    def gather_into(self, gathered: torch.Tensor, part: torch.Tensor) -> Wait:
        """Starts an all-gather: fills `gathered`, (processes * n,), with every process's `part`, (n,), in one dtype."""


class OtherOutOfMemory(RuntimeError):
    """GPU memory ran out in another process that computes a part of the same row."""

    def __init__(self) -> None:
        super().__init__("another process, which computes a part of the same row, is out of memory")


class LayerSource(Protocol):
    """Where layers are kept while they are not in a slot."""

    def keep(self, layer: torch.Tensor) -> int:
        """Takes the next layer, (bytes,) uint8 on the device; returns the bytes of a slot that it is fetched into."""

    def allocate(self, size: int) -> None:
        """Called once all layers are kept: allocates what fetching them needs. `size`: bytes of the largest."""

    def fetch(self, number: int, slot: torch.Tensor) -> Wait:
        """Starts to fill a slot with a layer, after what was launched before."""

    def serve(self) -> None:
        """Takes part in the gathers of others until no process needs a layer any more."""

    def release(self) -> None:
        """Frees the memory."""


class _Host:
    """All layers in main memory, pinned where there is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._layers: list[torch.Tensor] = []
        self._pinned: list[torch.Tensor] = []
        # Memory that is freed while it is pinned is given to others, and copies between it and the GPU then fail.
        # Not at the end of the process, when CUDA may be gone.
        weakref.finalize(self, unpin, self._pinned, device).atexit = False
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def keep(self, layer: torch.Tensor) -> int:
        copy = torch.empty(layer.shape, dtype=layer.dtype, device="cpu")
        if self._stream is not None:  # before it is filled, which is faster
            if pin(copy, self._device):
                self._pinned.append(copy)
            elif not self._layers:
                get_logger().warning(
                    "main memory cannot be pinned, so layers are copied to the GPU slowly; raise ulimit -l"
                )
        self._layers.append(copy.copy_(layer))
        return copy.numel()

    def allocate(self, size: int) -> None:
        """Nothing is left to do."""

    def fetch(self, number: int, slot: torch.Tensor) -> Wait:
        layer = self._layers[number]
        if self._stream is None:
            slot[: layer.numel()].copy_(layer)
            return _nothing
        self._stream.wait_stream(torch.cuda.current_stream())  # what reads the slot's last layer was launched there
        with torch.cuda.stream(self._stream):
            slot[: layer.numel()].copy_(layer, non_blocking=True)
            copied = self._stream.record_event()
        return lambda: torch.cuda.current_stream().wait_event(copied)

    def serve(self) -> None:
        """No other process needs anything of this one."""

    def release(self) -> None:
        unpin(self._pinned, self._device)
        self._pinned.clear()
        self._layers.clear()


class _Shards:
    """One of N equal parts of every layer, on this process's device; the other processes have the others."""

    def __init__(self, group: AllGather, device: torch.device) -> None:
        self._group, self._device = group, device
        self._rank, self._count = group.place.rank, group.place.world_size
        self._own: list[torch.Tensor] = []
        self._scratch: torch.Tensor | None = None
        self._scratch_filled: Wait = _nothing
        self.opened = 0
        """How many `taking_part` are open, one within the other."""

    def keep(self, layer: torch.Tensor) -> int:
        share = -(-layer.numel() // (self._count * ALIGNMENT)) * ALIGNMENT
        padded = layer.new_zeros(share * self._count)
        padded[: layer.numel()] = layer
        self._own.append(padded[share * self._rank : share * (self._rank + 1)].clone())
        return padded.numel()

    def allocate(self, size: int) -> None:
        # Now, not when another process needs a layer that this one does not: memory may have run out by then.
        self._scratch = torch.empty(size, dtype=torch.uint8, device=self._device)

    def fetch(self, number: int, slot: torch.Tensor) -> Wait:
        if not self.opened:
            raise RuntimeError("a sharded model computes outside of `taking_part`: no other process would answer")
        return self._round(number, slot)[1]

    def serve(self) -> None:
        while self._round(_NONE, None)[0] != {_NONE}:
            pass

    def barrier(self) -> None:
        """Waits until all processes are here, and gathers layers for those that still need some; see its caller.

        Raises:
            OtherOutOfMemory: Another process ran out of memory, and only serves.
        """
        while (numbers := self._round(_AT_BARRIER, None)[0]) != {_AT_BARRIER}:
            if _NONE in numbers:  # only a process whose memory ran out serves at this point
                raise OtherOutOfMemory

    def release(self) -> None:
        self._scratch_filled()
        self._own, self._scratch = [], None

    def _round(self, layer: int, slot: torch.Tensor | None) -> tuple[set[int], Wait]:
        """Gathers what any process needs; returns what all say, and how to wait for this one's layer."""
        filled: Wait = _nothing
        numbers = set(self._group.exchange(layer))
        for number in sorted(numbers - {_NONE, _AT_BARRIER}):
            own = self._own[number]
            into = slot if number == layer else self._scratch
            if into is self._scratch:
                self._scratch_filled()  # before it is filled again
            wait = self._group.gather_into(into[: own.numel() * self._count], own)  # type: ignore[index]
            if number == layer:
                filled = wait
            else:
                self._scratch_filled = wait
        return numbers, filled


def _nothing() -> None:
    """There is nothing to wait for."""


def open_source(placement: str, device: torch.device, group: AllGather | None) -> LayerSource:
    """Where the layers of a base that is being loaded will be kept, still empty.

    Args:
        placement: `host` or `sharded`.
        device: Where the model computes.
        group: The processes of the run; None for one alone.
    """
    if placement == "sharded" and group is None:
        raise ValueError("a sharded base needs the processes that share it")
    return _Host(device) if group is None or placement == "host" else _Shards(group, device)


class PlacedWeights:
    """The layers of a base in two slots of the device, filled from a source as they are needed."""

    def __init__(self, source: LayerSource, device: torch.device, sizes: Sequence[int]) -> None:
        self.source, self._count = source, len(sizes)
        source.allocate(size := max(sizes))
        self.slots = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(min(2, self._count))]
        self._holds: list[int | None] = [None] * len(self.slots)
        self._filling: list[Wait] = [_nothing] * len(self.slots)
        self._current: int | None = None
        self.backward_follows = False
        """Whether a backward pass follows the present forward pass, although that records no gradient."""

    def slot(self, number: int) -> int:
        """The one that a layer's bytes are in when it is needed."""
        return number % len(self.slots)

    def need(self, number: int) -> None:
        """Has the layer's bytes in its slot for what is launched from now on, and starts to fetch the one after it."""
        if number == self._current:
            return
        before, self._current = self._current, None
        self._fetch(number)
        self._wait(self.slot(number))
        following = self._following(before, number)
        if following is not None and self.slot(following) != self.slot(number):
            self._fetch(following)
        self._current = number

    def _fetch(self, number: int) -> None:
        slot = self.slot(number)
        if self._holds[slot] == number:
            return
        self._wait(slot)  # a fetch that was not used must end first: two must not write at the same time
        self._holds[slot] = None
        self._filling[slot] = self.source.fetch(number, self.slots[slot])
        self._holds[slot] = number

    def _wait(self, slot: int) -> None:
        filling, self._filling[slot] = self._filling[slot], _nothing
        filling()

    def _following(self, before: int | None, number: int) -> int | None:
        """Which layer will be needed next: one further in the direction of the last two; only a guess, for speed."""
        if before == number + 1:
            return number - 1 if number else None
        if number + 1 < self._count:
            return number + 1
        # Where a backward pass follows, it begins with this one.
        return None if self.backward_follows or torch.is_grad_enabled() else 0

    def release(self) -> None:
        """Frees the memory of all layers."""
        for number in range(len(self.slots)):
            self._wait(number)  # nothing may be on its way into memory that is freed
        self.source.release()
        for slot in self.slots:
            slot.untyped_storage().resize_(0)  # the weights' tensors are views of it, and may still be referenced


@contextmanager
def taking_part(model: Any) -> Iterator[None]:
    """A sharded model may compute only inside this `with` block, which all processes enter and leave together.

    Each may compute a different amount in it, or run out of memory. No effect on a model whose weights are not sharded.

    Raises:
        JobError: Another process has ended.
    """
    placed = getattr(model, PLACED, None)
    shares = None if placed is None else placed.source
    if not isinstance(shares, _Shards):
        yield
        return
    shares.opened += 1
    try:
        yield
    except RuntimeError as error:
        if shares.opened == 1 and out_of_memory(error):  # all of them will repeat it, with less memory
            shares.serve()
        raise
    else:
        if shares.opened == 1:
            shares.serve()
    finally:
        shares.opened -= 1


@contextmanager
def computing_together(model: Any, group: AllGather) -> Iterator[Callable[[], None]]:
    """For what all processes compute together: makes an out-of-memory error in one of them known to all.

    Yields `barrier`, which waits until all processes have called it as often as this one. To be called before every
    exchange of tensors, when the memory for it is allocated: behind it no process is missing because its memory ran
    out. It is called once more at the end.

    Args:
        model: The model; its weights may have any placement. Used within `taking_part`.
        group: The processes.

    Raises:
        OtherOutOfMemory: Memory ran out in another process. It counts as an error of this one's memory.
        JobError: Another process has ended.
    """
    placed = getattr(model, PLACED, None)
    shares = placed.source if placed is not None and isinstance(placed.source, _Shards) else None
    other_missing = False

    def barrier() -> None:
        nonlocal other_missing
        if shares is not None:
            shares.barrier()  # processes that are not there yet may still need layers of this one
        elif _NONE in group.exchange(_AT_BARRIER):
            other_missing = True
            raise OtherOutOfMemory

    try:
        yield barrier
        barrier()
    except RuntimeError as error:
        # With sharded weights `taking_part` tells the others. Otherwise they are told here, instead of by this
        # process's next barrier.
        if shares is None and not other_missing and out_of_memory(error):
            group.exchange(_NONE)
        raise


@contextmanager
def before_backward(model: Any) -> Iterator[None]:
    """For a forward pass without gradients that a layer-by-layer backward pass follows.

    The backward pass begins with the last layer, so the first one is not fetched behind it.
    """
    placed = getattr(model, PLACED, None)
    if placed is None:
        yield
        return
    placed.backward_follows = True
    try:
        yield
    finally:
        placed.backward_follows = False


def release(model: Any) -> None:
    """Frees the memory of a model's placed weights, if it has any; nothing can be computed with it any more."""
    if (placed := getattr(model, PLACED, None)) is not None:
        placed.release()


def placement_of(model: Any) -> str:
    """Where the 4-bit weights of a model's layers are kept: `gpu` for its device, `sharded` or `host`."""
    if (placed := getattr(model, PLACED, None)) is None:
        return "gpu"
    return "sharded" if isinstance(placed.source, _Shards) else "host"


def layer_of(weight: Any) -> Callable[[], None] | None:
    """A function that copies a placed weight's layer to the device; None for a weight that is always there."""
    bring: Callable[[], None] | None = getattr(getattr(weight, "quant_state", None), "bring", None)
    return bring
