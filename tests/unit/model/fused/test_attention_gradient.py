"""Promises of the backward pass of attention in Triton, which needs a GPU or Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from job.model.fused.long_attention import CpuKernel
from job.model.packed_attention import Segment, build_layout

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
