"""The adapter as one flat tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from job.model.adapter_files import load_adapter, save_adapter
from job.model.lora import trainable
from job.training.flat_parameters import FlatParameters
from tests.helpers import fill_adapter, make_model

SHAPES = [(3, 100), (16, 16), (1,), (5, 7, 11)]


def parameters() -> list[torch.nn.Parameter]:
    """Random ones, some of which do not fill a block."""
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]


def test_the_parameters_are_its_parts() -> None:
    """Values and shapes stay; what is done to the whole is done to each, and the other way round."""
    made, before = parameters(), [p.detach().clone() for p in parameters()]
    flat = FlatParameters(made, 256)
    assert all(torch.equal(p, b) for p, b in zip(made, before, strict=True))
    with torch.no_grad():
        flat.whole.mul_(2)
        made[0].add_(1)
    assert torch.equal(made[0], 2 * before[0] + 1)
    assert torch.equal(made[3], 2 * before[3])
    total = sum(float(p.detach().double().sum()) for p in made)
    assert float(flat.whole.detach().double().sum()) == pytest.approx(total)


def test_no_block_holds_two_tensors() -> None:
    """Each begins at a multiple of 256 numbers, as 8-bit optimizers cut; between them are zeros."""
    made = parameters()
    flat = FlatParameters(made, 256)
    starts = [p.data_ptr() - flat.whole.data_ptr() for p in made]
    assert starts == [0, 2 * 1024, 3 * 1024, 4 * 1024]
    assert flat.whole.numel() == 6 * 256
    assert flat.whole.count_nonzero() == sum(p.numel() for p in made)


def test_gradients_add_up_in_it() -> None:
    """The gradients of several backward passes land in one, also after a trainer has thrown the parts away."""
    made = parameters()
    flat = FlatParameters(made, 256)
    for _ in range(2):
        flat.clear()
        assert not flat.gradient.any()
        for _ in range(3):
            sum((number + 1) * p.sum() for number, p in enumerate(made)).backward()
        assert flat.whole.grad is flat.gradient
        for number, p in enumerate(made):
            assert p.grad is not None
            assert torch.equal(p.grad, torch.full_like(p, 3.0 * (number + 1)))
            p.grad = None
        assert float(flat.gradient.sum()) == sum(3.0 * (n + 1) * p.numel() for n, p in enumerate(made))


def test_an_optimizer_steps_each_part() -> None:
    """One parameter or many: AdamW makes the same of them."""
    made, other = parameters(), parameters()
    flat = FlatParameters(made, 256)
    flat.clear()
    one, many = torch.optim.AdamW([flat.whole], weight_decay=0.1), torch.optim.AdamW(other, weight_decay=0.1)
    for tensors, optimizer in ((made, one), (other, many)):
        sum(p.square().sum() for p in tensors).backward()
        optimizer.step()
    for p, q in zip(made, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_an_adapter_is_saved_and_loaded_as_ever(base_folder: Path, tmp_path: Path) -> None:
    """PEFT's files and ours hold the same bits whether or not the tensors are parts of a flat tensor."""
    model = fill_adapter(make_model(base_folder))
    save_adapter(model, tmp_path / "before", base=str(base_folder), revision=None)
    flat = FlatParameters(trainable(model).values(), 256)
    save_adapter(model, tmp_path / "after", base=str(base_folder), revision=None)
    save_file({name: p.detach() for name, p in trainable(model).items()}, tmp_path / "own.safetensors")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()
    assert sum(x.numel() for x in load_file(tmp_path / "own.safetensors").values()) <= flat.whole.numel()
    kept = flat.whole.detach().clone()
    fill_adapter(model, scale=1.0)
    assert not torch.equal(flat.whole, kept)
    load_adapter(model, tmp_path / "after")
    assert torch.equal(flat.whole, kept)
