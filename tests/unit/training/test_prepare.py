"""How a machine is going to train: what can be told without a GPU."""

from __future__ import annotations

from pathlib import Path

import torch

from job.records import PEFT
from job.training.config import CPU_MICRO_BATCH_TOKENS
from job.training.prepare import prepare, token_budget
from tests.helpers import make_model


def test_a_cpu_takes_the_plain_way(base_folder: Path) -> None:
    """Whatever is set for a GPU: PEFT's own layers, untouched."""
    model = make_model(base_folder)
    before = [type(module).forward for module in model.modules()]
    made = prepare(
        model,
        [10, 20],
        global_batch_size=2,
        quantization="nf4",
        optimizer="adamw_8bit",
        budget=100,
        keep_base=True,
        recompute=False,
        gigabytes=16,
    )
    assert made.forward == PEFT
    assert made.kept_activations
    assert not made.spare
    assert "a CPU trains" in made.reason
    assert [type(module).forward for module in model.modules()] == before
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_set_budget_holds() -> None:
    """On any machine."""
    assert token_budget(torch.device("cpu"), None, None) == CPU_MICRO_BATCH_TOKENS
    assert token_budget(torch.device("cpu"), 77, None) == token_budget(torch.device("cuda"), 77, None) == 77
