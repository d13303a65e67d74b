"""How much GPU memory this process has and has used, and how much of it the job may use."""

from __future__ import annotations

import resource


def free_gpu_bytes(gigabytes: float | None) -> int:
    """Bytes of GPU memory that this process may still allocate.

    Args:
        gigabytes: `JOB_TRAIN__GPU_MEMORY_GB`, in units of 1e9 bytes; None for no limit.
    """
    return gpu_memory(gigabytes)[1]


def give_back_memory() -> None:
    """Returns the GPU memory that torch has reserved but does not use to the driver."""
    import torch

    torch.cuda.empty_cache()


def limit_memory(gigabytes: float | None) -> None:
    """Limits the GPU memory that torch may allocate in this process; `gigabytes` as in `free_gpu_bytes`."""
    import torch

    if gigabytes is not None:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))


def gpu_memory(gigabytes: float | None) -> tuple[int, int]:
    """(total bytes, free bytes) of this process's GPU, within the limit; `gigabytes` as in `free_gpu_bytes`."""
    import torch

    free, total = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # what torch has reserved but not allocated
    if gigabytes is None:
        return total, free
    limit = min(total, int(gigabytes * 1e9))
    return limit, min(free, limit - torch.cuda.memory_allocated())


def memory_in_use() -> int:
    """Bytes: the peak that torch allocated on the GPU since the process began, or the process's peak on a CPU."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
