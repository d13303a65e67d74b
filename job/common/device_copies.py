"""Copies between the host and a GPU that wait for nothing the GPU is still computing.

A plain copy waits until the GPU has done all that was launched before it. Meanwhile the host launches nothing, and
after it the GPU waits for the host. From and to pinned memory a copy is launched like a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device; itself where the device is the host."""
    if device.type != "cuda":
        return tensor.to(device)
    # torch reuses the pinned memory no sooner than the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(*tensors: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Launches the copies of tensors to the host.

    Returns:
        What waits for the copies, and for nothing that is launched later, and gives them.
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
