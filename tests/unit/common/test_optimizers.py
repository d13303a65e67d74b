"""The table of optimizers: every entry matches the real optimizer."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from job.checkpoints import optimizer_state
from job.common.optimizers import OPTIMIZERS, OptimizerSpec, substitute, too_high, trainer_name
from job.common.resources import checkpoint_bytes
from job.settings.schema import Train
from job.training.flat_parameters import FlatParameters
from job.training.muon import FlatMuon
from tests.unit.training.recipes import RECIPE

NUMBERS = 5000
"""More than the 4,096 from which bitsandbytes keeps a tensor's state in 8 bits; no multiple of a block."""


def make(name: str) -> tuple[Any, torch.nn.Parameter]:
    """The optimizer that the job's trainer makes of the name, after one step on a CPU, and what it optimizes."""
    from transformers import Trainer, TrainingArguments

    from job.training.trainer import _PlannedTrainer

    parameter = torch.nn.Parameter(torch.ones(NUMBERS))
    trainer: Any = SimpleNamespace(
        recipe=replace(RECIPE, optimizer=name),
        args=TrainingArguments(optim=trainer_name(name), use_cpu=True),
        model=None,
        parameters=SimpleNamespace(whole=parameter, views=lambda flat: [flat.view(50, -1)]),
        get_optimizer_cls_and_kwargs=Trainer.get_optimizer_cls_and_kwargs,
    )
    optimizer = _PlannedTrainer.create_optimizer(trainer)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer, parameter


@pytest.mark.parametrize("name", [name for name, spec in OPTIMIZERS.items() if "cpu" in spec.devices])
def test_an_entry_describes_the_real_optimizer(name: str) -> None:
    """Names, shapes and dtypes of the state's tensors, and their bytes, are those of the optimizer after a step."""
    optimizer, parameter = make(name)
    spec = OPTIMIZERS[name]
    tensors, plain = optimizer_state.split(optimizer.state_dict())
    assert {place.rpartition("/")[2] for place in tensors} == set(spec.state)
    optimizer_state.check_fit(tensors, plain, [parameter.shape], name)
    kinds = {"parameter", "parameter_pair", "blocks", "block_pair"}
    sized = [t for place, t in tensors.items() if spec.state[place.rpartition("/")[2]].shape in kinds]
    assert spec.state_bytes(NUMBERS) == sum(t.numel() * t.itemsize for t in sized)
    large = [t for t in sized if t.shape[-1] == NUMBERS]
    assert spec.bytes_per_parameter == sum(t.itemsize * t.numel() // NUMBERS for t in large)
    assert checkpoint_bytes(NUMBERS, name) == NUMBERS * (4 + spec.bytes_per_parameter)


@pytest.mark.parametrize(("name", "spec"), OPTIMIZERS.items())
def test_trainer_knows_every_entry_and_a_cpu_has_one_for_it(name: str, spec: OptimizerSpec) -> None:
    """A name that transformers does not know could not be made; what a CPU cannot run is replaced by what it can."""
    from transformers.training_args import OptimizerNames

    assert trainer_name(name) in {known.value for known in OptimizerNames}
    assert spec.own == (trainer_name(name) != name)
    assert ("cpu" in spec.devices) == (spec.on_cpu is None)
    assert "cpu" in OPTIMIZERS[substitute(name, "cpu")[0]].devices


@pytest.mark.parametrize("name", [name for name, spec in OPTIMIZERS.items() if spec.own])
def test_the_trainer_makes_what_transformers_has_no_name_for(name: str) -> None:
    """It is not the optimizer whose name transformers gets instead: a run would train with that, and nobody would know.

    `make` has the trainer's own method, so an entry that this method does not know fails here.
    """
    instead, _ = make(trainer_name(name))
    assert type(make(name)[0]) is not type(instead)


def test_a_cpu_substitutes_the_paged_optimizer_and_says_so() -> None:
    """What has no implementation on a CPU is replaced by its nearest equivalent, never silently."""
    name, said = substitute("paged_adamw_8bit", "cpu")
    assert name == "adamw_8bit"
    assert said is not None
    assert "paged_adamw_8bit -> adamw_8bit" in said
    assert substitute("paged_adamw_8bit", "cuda") == ("paged_adamw_8bit", None)
    assert substitute("adamw_torch", "cpu") == ("adamw_torch", None)


def test_the_settings_offer_what_the_table_has() -> None:
    """Choices are the table's entries; of the others than `own`, code beside it names the setting's default only."""
    assert Train.model_json_schema()["properties"]["optimizer"]["enum"] == list(OPTIMIZERS)
    names = "|".join(name for name, spec in OPTIMIZERS.items() if not spec.own)
    root = Path(__file__).parents[3] / "job"
    naming = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if re.search(rf'"({names})"|"8bit"', path.read_text(encoding="utf-8"))
    }
    assert naming == {"common/optimizers.py", "settings/schema.py"}


def test_muon_on_the_flat_adapter_is_torchs_own() -> None:
    """Three steps of changing learning rate on two matrices, the state saved and loaded in between: the same bits."""
    torch.manual_seed(0)
    start, gradients = [torch.randn(8, 64), torch.randn(32, 8)], [torch.randn(3, 8, 64), torch.randn(3, 32, 8)]
    theirs = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    mine = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    flat = FlatParameters(mine, 256)
    optimizer = FlatMuon(flat.whole, flat.views, lr=0.1, weight_decay=0.2)
    for step in range(3):
        flat.clear()
        for index, parameter in enumerate(mine):
            theirs[index].grad = gradients[index][step].clone()
            assert parameter.grad is not None
            parameter.grad.copy_(gradients[index][step])
        for one in (reference, optimizer):
            one.param_groups[0]["lr"] = 0.1 / (step + 1)
            one.step()
        saved = optimizer_state.split(optimizer.state_dict())
        optimizer = FlatMuon(flat.whole, flat.views, lr=1.0, weight_decay=0.2)
        optimizer.load_state_dict(optimizer_state.join(*saved))
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("name", [name for name, spec in OPTIMIZERS.items() if "cpu" in spec.devices])
def test_a_step_is_about_the_rate(name: str) -> None:
    """With every optimizer, however large the gradient, so that one bound holds for the rates of all."""
    optimizer, parameter = make(name)
    parameter.grad = torch.full_like(parameter, 1000)
    before = parameter.detach().clone()
    optimizer.step()
    change = float((parameter.detach() - before).abs().max()) / optimizer.param_groups[0]["lr"]
    assert 0.01 < change < 10


@pytest.mark.parametrize(
    ("rate", "noted"), [(0, False), (2e-4, False), (0.1, False), (0.11, True), (2, True), (1e9, True)]
)
def test_a_rate_that_is_likely_a_mistake(rate: float, noted: bool) -> None:  # noqa: FBT001
    """It is named, with the default."""
    why = too_high(rate)
    assert (why is not None) == noted
    assert why is None or why.startswith(f"{rate:g} is likely a mistake: ")
    assert why is None or why.endswith(f"the default is {Train().learning_rate:.0e}".replace("e-04", "e-4"))
