"""The backward pass of attention in Triton; needs a GPU or Triton's interpreter."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from job.model import fused
from job.model.fused.long_attention import CpuKernel
from job.model.packed_layout import Segment, build_layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.skipif(
    DEVICE == "cpu" and "TRITON_INTERPRET" not in os.environ, reason="Triton needs a GPU, or TRITON_INTERPRET=1"
)
@pytest.mark.parametrize("ends", [(100,), (37, 100), (128, 130)])
def test_gradients_are_those_of_torch(ends: tuple[int, ...]) -> None:
    """For rows that end within a block, several of them, windows on every side of a block, heads that share keys."""
    from job.model.fused.attention_gradient import Tiles, attention_gradient

    draw, tokens = torch.Generator().manual_seed(0), ends[-1]
    # Queries as the rotation gives them: head by head.
    query = torch.randn(4, tokens, 16, generator=draw).transpose(0, 1)
    key, value = (torch.randn(tokens, 2, 16, generator=draw) for _ in range(2))
    gradient = torch.randn(tokens, 4, 16, generator=draw)
    segments = list(zip((0, *ends), ends, strict=False))
    close = 1e-5 if DEVICE == "cpu" else 1e-2  # a GPU's products round fp32 to 10 bits
    for window in (None, 5, 20, 70):
        kernel = CpuKernel(build_layout([Segment(*s) for s in segments], torch.device("cpu")), 0.3, window)
        saved = [query, key, value, *kernel.forward(query, key, value)]
        expected = kernel.backward(gradient, *saved)
        for queries, keys in ((16, 32), (32, 32)):
            found = attention_gradient(
                *(x.to(DEVICE) for x in (gradient, *saved)),
                segments=segments,
                scale=0.3,
                window=window,
                by_key=Tiles(queries, keys, 1, 4),
                by_query=Tiles(keys, queries, 1, 4),
            )
            for one, other in zip(found, expected, strict=True):
                assert (one.cpu() - other).norm() <= close * other.norm()
    with pytest.raises(ValueError, match="multiple of its queries"):
        attention_gradient(
            *(x.to(DEVICE) for x in (gradient, *saved)),
            segments=segments,
            scale=0.3,
            window=None,
            by_key=Tiles(32, 16, 1, 4),
        )


def test_what_triton_keeps_refers_to_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator that Triton is given stays with it; a row's autograd graph is freed all the same."""

    class Kernel:
        def __getitem__(self, _grid: Any) -> Callable[..., None]:
            return lambda *_, **__: None

    kept: list[Any] = []
    stub = SimpleNamespace(
        jit=lambda *functions, **_: Kernel() if functions else lambda _: Kernel(),
        cdiv=lambda number, by: -(-number // by),
        set_allocator=kept.append,
        language=SimpleNamespace(constexpr=float),
    )
    monkeypatch.setitem(sys.modules, "triton", stub)
    attention_gradient = runpy.run_path(str(Path(fused.__file__).with_name("attention_gradient.py")))[
        "attention_gradient"
    ]
    trained = torch.nn.Parameter(torch.ones(20, 2, 16))

    def node() -> Any:
        return trained.expand_as(trained).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

    query, x = trained * 2, torch.ones(20, 2, 16)
    node().metadata["made"] = "by the row"
    attention_gradient(x, query, x, x, x, torch.ones(2, 20), segments=[(0, 20)], scale=1.0, window=None)
    del query
    assert not node().metadata
    assert kept[0](3, 1, None).shape == (3,)
