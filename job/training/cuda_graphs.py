"""CUDA graphs: a GPU's kernels for inputs of one shape, recorded once and then launched together.

Python launches a kernel in about the time that a fast GPU takes to run one, thousands of times in a step. A graph
launches all of them at once, without work on the host in between. It repeats the recorded kernels on the current values
of its input tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from job.common.formatting import first_line
from job.common.out_of_memory import out_of_memory
from job.log import get_logger

Work = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class _Recording:
    """A graph, its input tensors and its output tensor, whose addresses are recorded in the graph."""

    graph: Any
    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor


class CudaGraphs:
    """Called with tensors, computes the same as `work`, with one launch per call.

    Work can be recorded only if it

    - does not synchronize with the host: no `.item()`, no shape that depends on values;
    - draws no random numbers;
    - has static addresses: besides its inputs it reads and writes only tensors that keep their addresses, and only its
      output is used afterwards;
    - depends only on shapes and values of its inputs.

    The tensor that a call returns is overwritten by the next call.

    Args:
        work: Work as described above, which returns one tensor.
        first: Inputs for a warm-up call without recording: libraries allocate their workspaces when first called,
            which is not allowed while recording.
        leaves: Tensors whose gradients the work computes.
    """

    def __init__(self, work: Work, first: tuple[torch.Tensor, ...], leaves: Sequence[torch.nn.Parameter] = ()) -> None:
        self._work, self._leaves = work, leaves
        # One stream and one pool for all graphs: they never run at once, so each may use the others' memory.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}
        self.possible = True
        """False once recording has failed; then calls launch the work kernel by kernel."""
        self._run_unrecorded(first)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Launches the graph for inputs of these shapes, which is recorded if there is none."""
        self.prepare(*inputs)
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self._recordings:
            return self._run_unrecorded(inputs)
        recording = self._recordings[shapes]
        # In place, because the graph reads the addresses that it was recorded with. The graph waits for the copies,
        # which are on the same stream.
        for recorded, value in zip(recording.inputs, inputs, strict=True):
            recorded.copy_(value)
        recording.graph.replay()
        return recording.output

    def prepare(self, *inputs: torch.Tensor) -> None:
        """Records the work for inputs of these shapes, without computing it."""
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self._recordings and self.possible:
            self._record(shapes, inputs)

    def _record(self, shapes: tuple[torch.Size, ...], inputs: tuple[torch.Tensor, ...]) -> None:
        """Records the work; if that fails for another reason than memory, sets `possible` to false.

        Raises:
            torch.OutOfMemoryError: There is too little memory; a later call may record.
        """
        graph, static_inputs = torch.cuda.CUDAGraph(), tuple(x.clone() for x in inputs)
        forget_accumulators(self._leaves)
        try:
            # The outer context restores the current stream, which a failed recording does not.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                output = self._work(*static_inputs)
        except RuntimeError as error:
            full = out_of_memory(error)
            reason = first_line(error, 300)
        else:
            self._recordings[shapes] = _Recording(graph, static_inputs, output)
            return
        _end_allocations(self._pool)
        if full:  # a new error: the caught one would keep all tensors of the failed work alive
            raise torch.OutOfMemoryError(reason)
        self.possible = False
        get_logger().warning("CUDA graphs cannot be captured: kernels are launched one by one", reason=reason)

    def _run_unrecorded(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Computes the work kernel by kernel, on the stream of the recordings."""
        current = torch.cuda.current_stream()
        # The streams wait for each other on the GPU, without the host: the recording stream for the inputs, the current
        # stream for the output.
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = self._work(*inputs)
        current.wait_stream(self._stream)
        return output


def forget_accumulators(leaves: Sequence[torch.nn.Parameter]) -> None:
    """Makes autograd create new AccumulateGrad nodes for the leaves, on the stream of their next use.

    While anything keeps an earlier autograd graph alive, its AccumulateGrad nodes are reused, on the stream on which
    they were created: the default stream, on which nothing can be recorded. torch creates new nodes for a leaf whose
    dtype has changed, so the dtype is changed and restored. The memory of the leaf and of its gradient stays the same,
    and the earlier autograd graph still adds to this gradient.
    """
    for leaf in leaves:
        data = leaf.data
        leaf.data = data.new_empty(0, dtype=torch.float32 if data.dtype is torch.float16 else torch.float16)
        leaf.data = data


def _end_allocations(pool: Any) -> None:
    """After a failed recording, ends it for torch's allocator too, which otherwise could not free memory any more."""
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)  # noqa: SLF001 - as `torch.cuda.use_mem_pool` does
    except RuntimeError:  # torch has already ended it
        return
    torch._C._cuda_releasePool(device, pool)  # noqa: SLF001 - a graph whose recording has failed does not release it
