"""Memory that runs out ends in words and with a code that is not retried."""

from __future__ import annotations

import errno

import pytest
import torch

from job.common.out_of_memory import memory_errors
from job.errors import DataError, Problem, TrainingFailed


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 MiB"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"),
        RuntimeError("CUDA_ERROR_OUT_OF_MEMORY"),
        ValueError("a library says: Cannot allocate memory (os error 12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_is_said_in_words(error: Exception) -> None:
    """Whoever allocates: the message says in what, and what to lower, and the code is 70."""
    with pytest.raises(TrainingFailed, match=r"while training; use .* with more memory, or lower A") as raised:
        fail(error)
    assert raised.value.exit_code == 70


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), DataError([Problem("row 1", "out of memory")]), KeyError("a")]
)
def test_other_errors_pass(error: Exception) -> None:
    """What is no lack of memory stays what it is."""
    with pytest.raises(type(error)) as raised:
        fail(error)
    assert raised.value is error


@memory_errors("training", "lower A")
def fail(error: Exception) -> None:
    """Fails as it is told."""
    raise error
