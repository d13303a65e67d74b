"""Copies between the host and a GPU that do not wait for queued GPU work.

A copy from or to pageable memory blocks the host until the GPU has done all that was launched before. Meanwhile the
host launches nothing, so afterwards the GPU is idle. From and to pinned memory a copy is launched like a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor of the host to a device; returns the tensor itself if the device is the CPU."""
    if device.type != "cuda":
        return tensor.to(device)
    # The pinned tensor may be freed at once: torch does not reuse its memory before the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(*tensors: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Launches the copies of tensors to the host.

    Returns:
        A function that waits for these copies only, not for what is launched later, and returns them.
    """
    import torch

    if not tensors[0].is_cuda:
        return lambda: tensors
    copies = tuple(torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in tensors)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def wait() -> tuple[torch.Tensor, ...]:
        done.synchronize()
        return copies

    return wait
