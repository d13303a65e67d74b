"""Tensors of the forward pass that wait for the backward pass: on the GPU, or in pinned host memory.

Copies run on a stream of their own, beside the computation: out as soon as a tensor is there, and back one tensor
ahead, in the reverse order. A copy changes no bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import Any, Self

import torch

from job.common.pinned_memory import pin, unpin

HostBuffers = dict[int, torch.Tensor]
"""Pinned memory by place in the store, (bytes,) uint8. Kept from step to step: to pin memory takes a while."""


def pinned(size: int, device: torch.device) -> torch.Tensor:
    """So many bytes of host memory, (size,) uint8, pinned if the device is a GPU.

    Raises:
        RuntimeError: The machine has too little memory, or does not allow that much to be pinned; it says "out of
            memory", so the step is repeated with less.
    """
    memory = torch.empty(size, dtype=torch.uint8)
    if device.type == "cuda" and size and not pin(memory, device):
        what = f"the machine has no more main memory that can be pinned (ulimit -l): {size:,} bytes of activations"
        raise RuntimeError(f"{what}; JOB_TRAIN__OFFLOAD_ACTIVATIONS=false keeps them on the GPU")
    return memory


def release(buffers: HostBuffers, device: torch.device) -> None:
    """Gives pinned memory back."""
    if device.type == "cuda":
        unpin([memory for memory in buffers.values() if len(memory)], device)
    buffers.clear()


@cache
def _copy_stream(device: torch.device) -> Any:
    """One stream for all stores: a copy that is in progress after an error is done before the next one begins."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class ActivationStore:
    """A stack of groups of tensors, kept on the device or copied to the host. Used in a `with` statement.

    Args:
        device: Where they are computed.
        host: Buffers in host memory, which are made as they are needed; None to leave the tensors where they are.
    """

    def __init__(self, device: torch.device, host: HostBuffers | None) -> None:
        self._device, self._host = device, host
        self._stream = _copy_stream(device) if host is not None and device.type == "cuda" else None
        self._kept: list[Sequence[torch.Tensor]] = []
        """By place: the tensors themselves, or what they are copied to."""
        self._leaving: deque[tuple[Any, Sequence[torch.Tensor]]] = deque()
        """Tensors that are being copied out, with the event after which their memory may be used again."""
        self._coming: tuple[int, Any, Sequence[torch.Tensor]] | None = None
        """The group that is being copied back: its place, the event after which it is there, its tensors."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            # After an error, copies may be in progress from and to memory that is freed now.
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._kept.clear()
        self._leaving.clear()
        self._coming = None

    def put(self, tensors: Sequence[torch.Tensor]) -> None:
        """Stores a group. The caller must not change the tensors, and must call `settle` before it frees them."""
        if self._host is None:
            self._kept.append(tensors)
            return
        copies = self._buffers(len(self._kept), tensors)
        if self._stream is None:
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # they have to be computed first
            with torch.cuda.stream(self._stream):
                for copy, tensor in zip(copies, tensors, strict=True):
                    copy.copy_(tensor, non_blocking=True)
                done = self._stream.record_event()
            self._leaving.append((done, tensors))
        self._kept.append(copies)

    def settle(self, waiting: int = 0) -> None:
        """Frees the device's tensors of all groups that are being copied to the host, but the last `waiting` of them.

        What runs later on the current stream waits for the copies on the GPU, without the host: freed memory that it
        writes to is no longer read.
        """
        while len(self._leaving) > waiting:
            done, _ = self._leaving.popleft()
            torch.cuda.current_stream(self._device).wait_event(done)

    def take(self) -> Sequence[torch.Tensor]:
        """Removes the last group and returns it, on the device; starts to copy the one before it back."""
        place = len(self._kept) - 1
        if self._host is None:
            return self._kept.pop()
        if self._coming is None or self._coming[0] != place:
            self._fetch(place)
        assert self._coming is not None  # noqa: S101 - for the type
        _, there, tensors = self._coming
        self._coming = None
        if there is not None:
            torch.cuda.current_stream(self._device).wait_event(there)
        self._kept.pop()
        if place:
            self._fetch(place - 1)
        return tensors

    def _fetch(self, place: int) -> None:
        # Allocated on the current stream, where they are used; their memory may be in use there until now.
        tensors = [torch.empty(x.shape, dtype=x.dtype, device=self._device) for x in self._kept[place]]
        there = None
        if self._stream is None:
            for tensor, copy in zip(tensors, self._kept[place], strict=True):
                tensor.copy_(copy)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                for tensor, copy in zip(tensors, self._kept[place], strict=True):
                    tensor.copy_(copy, non_blocking=True)
                there = self._stream.record_event()
        self._coming = place, there, tensors

    def _buffers(self, place: int, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Tensors like these in host memory, one behind the other in the buffer of this place."""
        assert self._host is not None  # noqa: S101 - for the type
        sizes = [x.numel() * x.element_size() for x in tensors]
        if place in self._host and len(self._host[place]) < sum(sizes):  # of a shorter row
            release({place: self._host.pop(place)}, self._device)
        if place not in self._host:
            self._host[place] = pinned(sum(sizes), self._device)
        memory = self._host[place]
        parts = memory[: sum(sizes)].split_with_sizes(sizes)
        return [part.view(x.dtype).view(x.shape) for part, x in zip(parts, tensors, strict=True)]
