"""Keeps tensors of the forward pass for the backward pass: on the GPU, or in pinned host memory.

Copies run on their own stream, concurrently with the computation: to the host as soon as a tensor is computed, and back
in reverse order, one group before it is needed. A copy changes no bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import Any, Self

import torch

from job.common.pinned_memory import pin, unpin

HostBuffers = dict[int, torch.Tensor]
"""Index of a group in the store -> its pinned memory, (bytes,) uint8. Kept from step to step: pinning is slow."""


def pinned(size: int, device: torch.device) -> torch.Tensor:
    """Host memory, (size,) uint8, pinned if the device is a GPU.

    Args:
        size: In bytes.
        device: Where the tensors are computed.

    Raises:
        RuntimeError: The machine has too little memory, or does not allow that much to be pinned. The message contains
            "out of memory", so that the step is repeated with less memory.
    """
    memory = torch.empty(size, dtype=torch.uint8)
    if device.type == "cuda" and size and not pin(memory, device):
        message = f"the machine has no more main memory that can be pinned (ulimit -l): {size:,} bytes of activations"
        raise RuntimeError(f"{message}; JOB_TRAIN__OFFLOAD_ACTIVATIONS=false keeps them on the GPU")
    return memory


def release(buffers: HostBuffers, device: torch.device) -> None:
    """Unpins and frees the buffers."""
    if device.type == "cuda":
        unpin([memory for memory in buffers.values() if len(memory)], device)
    buffers.clear()


@cache
def _copy_stream(device: torch.device) -> Any:
    """One stream for all stores: a copy that is still running after an error ends before the next store's copies."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class ActivationStore:
    """A stack of groups of tensors, kept on the device or copied to the host. Used in a `with` statement.

    Args:
        device: Where the tensors are computed.
        host: Buffers in host memory, allocated here when needed; None to keep the tensors on the device.
    """

    def __init__(self, device: torch.device, host: HostBuffers | None) -> None:
        self._device, self._host = device, host
        self._stream = _copy_stream(device) if host is not None and device.type == "cuda" else None
        self._kept: list[Sequence[torch.Tensor]] = []
        """By index of the group: its tensors, or their copies in host memory."""
        self._leaving: deque[tuple[Any, Sequence[torch.Tensor]]] = deque()
        """Tensors that are being copied to the host, with the event after which their memory may be reused."""
        self._coming: tuple[int, Any, Sequence[torch.Tensor]] | None = None
        """The group that is being copied back: its index, the event after which it is complete, its tensors."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            # After an error, copies may still be running from and to memory that is freed now.
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
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # the tensors must be computed first
            with torch.cuda.stream(self._stream):
                for copy, tensor in zip(copies, tensors, strict=True):
                    copy.copy_(tensor, non_blocking=True)
                done = self._stream.record_event()
            self._leaving.append((done, tensors))
        self._kept.append(copies)

    def settle(self, waiting: int = 0) -> None:
        """Drops the device tensors of all groups that are being copied to the host, except the last `waiting` groups.

        Later work on the current stream waits, on the GPU, for these copies, so it cannot overwrite freed memory that
        is still being read. The host does not wait.
        """
        while len(self._leaving) > waiting:
            done, _ = self._leaving.popleft()
            torch.cuda.current_stream(self._device).wait_event(done)

    def take(self) -> Sequence[torch.Tensor]:
        """Removes the last group and returns it, on the device; starts to copy the group before it back."""
        index = len(self._kept) - 1
        if self._host is None:
            return self._kept.pop()
        if self._coming is None or self._coming[0] != index:
            self._fetch(index)
        assert self._coming is not None  # noqa: S101 - for the type
        _, copied, tensors = self._coming
        self._coming = None
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
        self._kept.pop()
        if index:
            self._fetch(index - 1)
        return tensors

    def _fetch(self, index: int) -> None:
        # Allocated on the current stream, where they are used; earlier work there may still use their memory.
        tensors = [torch.empty(x.shape, dtype=x.dtype, device=self._device) for x in self._kept[index]]
        copied = None
        if self._stream is None:
            for tensor, copy in zip(tensors, self._kept[index], strict=True):
                tensor.copy_(copy)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                for tensor, copy in zip(tensors, self._kept[index], strict=True):
                    tensor.copy_(copy, non_blocking=True)
                copied = self._stream.record_event()
        self._coming = index, copied, tensors

    def _buffers(self, index: int, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Tensors of these shapes and dtypes in host memory, contiguous views of the buffer of this index."""
        assert self._host is not None  # noqa: S101 - for the type
        sizes = [x.numel() * x.element_size() for x in tensors]
        if index in self._host and len(self._host[index]) < sum(sizes):  # allocated for a shorter row
            release({index: self._host.pop(index)}, self._device)
        if index not in self._host:
            self._host[index] = pinned(sum(sizes), self._device)
        memory = self._host[index]
        parts = memory[: sum(sizes)].split_with_sizes(sizes)
        return [part.view(x.dtype).view(x.shape) for part, x in zip(parts, tensors, strict=True)]
