"""Pinned (page-locked) main memory: a GPU copies from and to it by DMA while it computes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def pin(memory: torch.Tensor, device: torch.device) -> bool:
    """Pins a tensor's memory, and returns whether the machine allows it; give it back by `unpin` before it is freed.

    torch's own pinned memory is not used: its sizes are rounded up to powers of two, nearly twice as much at worst.

    Args:
        memory: In main memory, contiguous, not empty.
        device: A GPU.
    """
    import torch

    if int(_driver().cudaHostRegister(memory.data_ptr(), memory.numel() * memory.element_size(), 0)) == 0:
        return True
    # CUDA keeps the error, and the next launch would report it as its own. Reading the error clears it.
    with suppress(RuntimeError):
        torch.zeros(1, device=device)
    return False


def unpin(memories: Iterable[torch.Tensor], device: torch.device) -> None:
    """Gives memory back for which `pin` returned True, once no copy is in progress."""
    import torch

    memories = list(memories)
    if memories:
        torch.cuda.synchronize(device)
    for memory in memories:
        _driver().cudaHostUnregister(memory.data_ptr())


def _driver() -> Any:
    import torch

    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
