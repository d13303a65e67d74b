"""Pinned main memory, with CUDA's functions replaced: failures are handled, and all memory is unpinned."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from job.training.activation_store import pinned, release

GPU = torch.device("cuda")


@pytest.mark.parametrize("allowed", [True, False])
def test_a_refusal_is_not_reported_by_the_next_launch(monkeypatch: pytest.MonkeyPatch, *, allowed: bool) -> None:
    """CUDA keeps the error of a call until a launch reports it; the caller's own launches must not."""
    kept: list[str] = []
    registered: set[int] = set()

    def register(address: int, _size: int, _flags: int) -> int:
        (registered.add(address) if allowed else kept.append("out of memory"))
        return 0 if allowed else 2

    def launch(*_: object, **__: object) -> None:
        if kept:
            raise RuntimeError(f"CUDA error: {kept.pop()}")

    driver = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=registered.remove)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch, "zeros", launch)
    if allowed:
        buffers = {0: pinned(8, GPU), 1: pinned(0, GPU)}
        assert registered == {buffers[0].data_ptr()}
        release(buffers, GPU)
    else:
        with pytest.raises(RuntimeError, match="no more main memory that can be pinned"):
            pinned(8, GPU)
    assert not registered
    launch()
