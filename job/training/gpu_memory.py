"""How much memory of its GPU a process has and may use."""

from __future__ import annotations


def free_gpu_bytes(gigabytes: float | None) -> int:
    """Bytes of the GPU that this process may still allocate; `gigabytes` is the limit of `limit_memory`."""
    return gpu_memory(gigabytes)[1]


def give_back_memory() -> None:
    """Frees the GPU memory that torch has reserved and does not use."""
    import torch

    torch.cuda.empty_cache()


def limit_memory(gigabytes: float | None) -> None:
    """Limits the GPU memory that torch may allocate in this process, in units of 1e9 bytes; None for no limit."""
    import torch

    if gigabytes is not None:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))


def gpu_memory(gigabytes: float | None) -> tuple[int, int]:
    """Bytes of the GPU, and of these the free ones; `gigabytes` is the limit of `limit_memory`."""
    import torch

    free, total = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # what torch has reserved but not allocated
    if gigabytes is None:
        return total, free
    limit = min(total, int(gigabytes * 1e9))
    return limit, min(free, limit - torch.cuda.memory_allocated())
