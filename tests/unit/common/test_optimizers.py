"""The table of optimizers: every entry is what the real optimizer is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from job.checkpoints import optimizer_state, trainer_state
from job.common.optimizers import OPTIMIZERS, OptimizerSpec, substitute
from job.common.resources import checkpoint_bytes
from job.settings.schema import Train

NUMBERS = 5000
"""More than the 4,096 from which bitsandbytes keeps a tensor's state in 8 bits; no multiple of a block."""


def make(name: str) -> tuple[Any, torch.nn.Parameter]:
    """The optimizer that Trainer makes of the name, after one step on a CPU, and what it optimizes."""
    from transformers import Trainer, TrainingArguments

    kind, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(optim=name, use_cpu=True))
    parameter = torch.nn.Parameter(torch.ones(NUMBERS))
    optimizer = kind([parameter], **options)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer, parameter


@pytest.mark.parametrize("name", [name for name, spec in OPTIMIZERS.items() if "cpu" in spec.devices])
def test_an_entry_describes_the_real_optimizer(name: str) -> None:
    """Names, shapes and dtypes of the state's tensors, and their bytes, are those of the optimizer after a step."""
    optimizer, parameter = make(name)
    spec = OPTIMIZERS[name]
    tensors, plain = trainer_state.split_optimizer_state(optimizer.state_dict())
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

    assert name in {known.value for known in OptimizerNames}
    assert ("cpu" in spec.devices) == (spec.on_cpu is None)
    assert "cpu" in OPTIMIZERS[substitute(name, "cpu")[0]].devices


def test_a_cpu_substitutes_the_paged_optimizer_and_says_so() -> None:
    """What has no implementation on a CPU is replaced by its nearest equivalent, never silently."""
    name, said = substitute("paged_adamw_8bit", "cpu")
    assert name == "adamw_8bit"
    assert said is not None
    assert "paged_adamw_8bit -> adamw_8bit" in said
    assert substitute("paged_adamw_8bit", "cuda") == ("paged_adamw_8bit", None)
    assert substitute("adamw_torch", "cpu") == ("adamw_torch", None)


def test_the_settings_offer_what_the_table_has() -> None:
    """Choices are the table's entries, and nothing else in the job names an optimizer but the setting's default."""
    assert Train.model_json_schema()["properties"]["optimizer"]["enum"] == list(OPTIMIZERS)
    root = Path(__file__).parents[3] / "job"
    naming = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if re.search(r'"[a-z_]*adamw_(8bit|torch|32bit)|"8bit"', path.read_text(encoding="utf-8"))
    }
    assert naming == {"common/optimizers.py", "settings/schema.py"}
