"""Dropout masks as a function of counters: those of Philox, with the right share, and the same by Triton's kernel."""

from __future__ import annotations

import pytest
import torch

from job.model.fused import dropout
from job.model.fused.dropout import drop
from job.model.fused.kernels import Kernels
from tests.unit.model.fused.test_kernels import kernel_sets


def state(seed: int, micro_batch: int) -> torch.Tensor:
    """As `reseed` fills it."""
    return torch.tensor([seed, micro_batch])


def test_the_numbers_are_those_of_the_paper() -> None:
    """Philox4x32-10 by the known answers of its authors' library (Random123, kat_vectors)."""
    found = dropout._random(1, 4, state(0, 0), 0)
    assert found.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]
    # Counter 243f6a88 85a308d3 13198a2e 03707344 cannot be asked for, but its key can: of all ones.
    assert dropout._random(1, 4, state(-1, 0), 0).tolist() != found.tolist()


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_the_share_of_what_is_dropped_is_the_rate(rate: float) -> None:
    """Within five standard deviations; the mean stays, and no two layers, rows or columns have the same mask."""
    ones = torch.ones(512, 260)
    found = drop(ones, state(5, 0), 1, rate)
    spread = (rate * (1 - rate) / ones.numel()) ** 0.5
    assert abs(float((found == 0).float().mean()) - rate) < 5 * spread
    assert float(found.max()) == pytest.approx(1 / (1 - rate))
    masks = [drop(ones, state(*key), number, rate) for key, number in (((5, 0), 2), ((5, 1), 1), ((6, 0), 1))]
    assert not any(torch.equal(mask, found) for mask in masks)
    assert len({tuple(row) for row in found.tolist()}) == len(found)
    assert len({tuple(column) for column in found.T.tolist()}) == len(found.T)


@pytest.mark.parametrize(
    ("kernels", "device"), [(k, d) for k, _, d in kernel_sets()], ids=["torch", "triton"][: len(kernel_sets())]
)
@pytest.mark.parametrize("width", [64, 130])
def test_kernels_drop_the_same(kernels: Kernels, device: torch.device, width: int) -> None:
    """Bit for bit what torch's operations drop, whatever the width (fp32: the interpreter rounds bf16 otherwise)."""
    x = torch.randn(33, width, generator=torch.Generator().manual_seed(0)).to(device)
    seed = state(0x0123456789ABCDEF, 3).to(device)
    assert torch.equal(kernels.drop(x, seed, 4, 0.3), drop(x, seed, 4, 0.3))
