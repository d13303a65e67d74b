"""A GPU's work for rows of one shape, recorded once and replayed: nothing is waited for between its kernels.

Python launches a kernel in about the time that a fast GPU takes to run one, thousands of times in a step. A recording
(a CUDA graph) launches them all at once. It computes what was recorded, on whatever its inputs then hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from job.log import get_logger

Work = Callable[..., torch.Tensor]

_FULL = ("out of memory", "ALLOC_FAILED")


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that a GPU is full; what allocates beside torch has no class of its own for that."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _FULL):
            return True
        error = error.__context__
    return False


@dataclass(frozen=True)
class _Recording:
    graph: Any
    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor


class CudaGraphs:
    """Does the same as `work`, called with tensors, sooner.

    Args:
        work: What it does depends on its inputs' shapes and contents alone. It waits for nothing, draws nothing at
            random, keeps nothing of what it makes but what it returns, and what else it changes stays where it is.
        first: Inputs to try it on beforehand, so that its libraries are ready.

    What a call returns is valid until the next call.
    """

    def __init__(self, work: Work, first: tuple[torch.Tensor, ...]) -> None:
        self._work = work
        # One stream for all recordings: they share its memory, and libraries are ready on it.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}
        self.possible = True
        """Whether nothing has gone wrong with recording."""
        self._beside(first)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Replays the recording for these shapes, which is made if there is none."""
        self.prepare(*inputs)
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self._recordings:
            return self._beside(inputs)
        recording = self._recordings[shapes]
        for place, value in zip(recording.inputs, inputs, strict=True):
            place.copy_(value)
        recording.graph.replay()
        return recording.output

    def prepare(self, *inputs: torch.Tensor) -> None:
        """Records the work for these shapes, without doing it."""
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self._recordings and self.possible:
            self._record(shapes, inputs)

    def _record(self, shapes: tuple[torch.Size, ...], inputs: tuple[torch.Tensor, ...]) -> None:
        graph, kept = torch.cuda.CUDAGraph(), tuple(x.clone() for x in inputs)
        try:
            # The outer one: a recording that fails does not leave its stream.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                output = self._work(*kept)
        except RuntimeError as error:
            full = out_of_memory(error)
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        else:
            self._recordings[shapes] = _Recording(graph, kept, output)
            return
        if full:  # an error of its own: the one that was caught holds on to all that the work had made
            raise torch.OutOfMemoryError(reason)
        self.possible = False
        get_logger().warning("the GPU's work cannot be recorded: it is launched piece by piece", reason=reason)

    def _beside(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Does the work as it comes, on the stream that is recorded."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = self._work(*inputs)
        current.wait_stream(self._stream)
        return output
