"""The code around recording and launching CUDA graphs; `tests/bench/gpu.py` tests the graphs on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from job.training.cuda_graphs import CudaGraphs, out_of_memory


class Graph:
    """A fake CUDA graph that counts how often it is launched."""

    def __init__(self) -> None:
        self.replayed = 0

    def replay(self) -> None:
        """What torch's does."""
        self.replayed += 1


class Stream:
    """A stream in which nothing has to be waited for."""

    def wait_stream(self, _other: Any) -> None:
        """What torch's does."""


@pytest.fixture
def ended() -> list[tuple[Any, ...]]:
    """What torch's allocator has been told about failed recordings."""
    return []


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch, ended: list[tuple[Any, ...]]) -> list[Graph]:
    """Stands in for torch's recorder; returns the recordings that were begun."""
    begun: list[Graph] = []

    @contextmanager
    def graph(made: Graph, **_: Any) -> Iterator[None]:
        begun.append(made)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *x, name=name: ended.append((name, *x)), raising=False)
    return begun


def test_one_recording_a_shape(recorded: list[Graph]) -> None:
    """Work is done once beforehand and once for each shape; later calls fill the inputs and replay."""
    seen: list[torch.Tensor] = []

    def work(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.sum()

    replayed = CudaGraphs(work, (torch.zeros(1),))
    for number, size in enumerate((2, 3, 2, 3, 2)):
        replayed(torch.full((size,), float(number)))
    assert [len(x) for x in seen] == [1, 2, 3]
    assert [graph.replayed for graph in recorded] == [3, 2]
    assert seen[1].tolist() == [4.0] * 2
    assert seen[2].tolist() == [3.0] * 3


def test_what_is_prepared_is_recorded_and_not_done(recorded: list[Graph]) -> None:
    """The recording exists before the work comes; nothing is launched before."""
    replayed = CudaGraphs(torch.sum, (torch.zeros(1),))
    replayed.prepare(torch.zeros(3))
    assert [graph.replayed for graph in recorded] == [0]
    replayed(torch.ones(3))
    assert [graph.replayed for graph in recorded] == [1]


def test_what_cannot_be_recorded_is_done_all_the_same(recorded: list[Graph], ended: list[tuple[Any, ...]]) -> None:
    """The first failure ends the attempts; every call then does its work itself, and the memory can be freed."""
    calls: list[float] = []

    def work(x: torch.Tensor) -> torch.Tensor:
        if len(calls) == 1 and recorded:
            calls.append(-1)
            raise RuntimeError("operation not permitted when stream is capturing")
        calls.append(float(x[0]))
        return x.sum()

    replayed = CudaGraphs(work, (torch.zeros(1),))
    assert [float(replayed(torch.full((2,), value))) for value in (1.0, 2.0, 3.0)] == [2.0, 4.0, 6.0]
    assert calls == [0, -1, 1, 2, 3]
    assert not replayed.possible
    assert len(recorded) == 1
    assert ended == [("_cuda_endAllocateToPool", 0, 0), ("_cuda_releasePool", 0, 0)]


def test_a_graph_that_something_keeps_does_not_decide_the_stream() -> None:
    """A recording's backward pass adds by new nodes; the gradients and what is trained stay where they are."""
    leaf = torch.nn.Parameter(torch.ones(2))
    leaf.grad = torch.zeros(2)
    places = leaf.data_ptr(), leaf.grad.data_ptr()

    def node(leaf: torch.nn.Parameter) -> Any:
        return leaf.expand_as(leaf).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

    kept = (leaf * 2).sum()
    node(leaf).metadata["made"] = "before"
    found: list[Any] = []

    def work(factor: torch.Tensor) -> torch.Tensor:
        loss = (leaf * factor).sum()
        found.append(dict(node(leaf).metadata))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    CudaGraphs(work, (torch.ones(2),), [leaf])(torch.ones(2))
    assert found == [{"made": "before"}, {}]
    kept.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad.tolist() == [4, 4]
    assert (leaf.data_ptr(), leaf.grad.data_ptr()) == places


@pytest.mark.parametrize("wrapped", [False, True])
def test_too_little_memory_is_for_the_caller(*, wrapped: bool) -> None:
    """Running out of memory while recording is no reason to give recording up: the caller makes room."""

    def run_out() -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def work(x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1:
            return x.sum()
        try:
            return run_out()
        except torch.OutOfMemoryError:
            if wrapped:  # as when torch cannot end the recording either
                raise RuntimeError("capture failed") from None
            raise

    replayed = CudaGraphs(work, (torch.zeros(1),))
    with pytest.raises(torch.OutOfMemoryError) as raised:
        replayed(torch.zeros(2))
    assert raised.value.__context__ is None, "it would keep all that the work had made"
    assert replayed.possible


def test_memory_that_ran_out_beside_torch() -> None:
    """The calls of CUDA and of its libraries have no class for it: it is told by their words, however deep."""
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    deep = RuntimeError("operation failed due to a previous error during capture")
    deep.__context__ = RuntimeError("CUDA error: out of memory")
    assert out_of_memory(deep)
    assert not out_of_memory(RuntimeError("operation not permitted when stream is capturing"))
