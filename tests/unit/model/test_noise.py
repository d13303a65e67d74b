"""Noise of a model's own routers in training is turned off, without another change to what the model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from job.model.load_base import PLAIN, load_base
from job.model.lora import add_adapter
from job.model.packed_attention import use
from tests.families.models import make_model as make_family


def adapted(folder: Path) -> Any:
    """The family's model as the job trains it, with its own attention and a fresh adapter."""
    cpu = torch.device("cpu")
    how = {"quantization": "none", "double_quantization": False, "dtype": torch.float32, "device": cpu}
    base = load_base(folder, max_length=64, **how)
    use(base, PLAIN)
    return add_adapter(base, rank=4, alpha=4, dropout=0.1, target_modules=("q_proj",), seed=1)


@pytest.mark.parametrize(("family", "rates"), [("phimoe", {}), ("mixtral", {"router_jitter_noise": 0.3})])
def test_a_router_draws_nothing_in_training_and_evaluates_as_published(
    tmp_path: Path, family: str, rates: dict[str, Any]
) -> None:
    """Phi-MoE chooses experts by its rate in evaluation, and at random in training; Mixtral's noise is training's only.

    Two forward passes in training mode agree, and evaluation agrees with the class that readers load.
    """
    from transformers import AutoModelForCausalLM

    make_family(family, tmp_path, **rates)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["router_jitter_noise"] > 0
    ids = torch.arange(5, 45)[None]
    published = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    model = adapted(tmp_path)
    with torch.no_grad():
        model.eval()
        assert torch.allclose(model(ids).logits, published(ids).logits, atol=1e-5)
        model.train()
        for module in model.modules():  # LoRA's dropout, which is no noise of the model's own
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        assert torch.equal(model(ids).logits, model(ids).logits)
        published.train()
        assert not torch.equal(published(ids).logits, published(ids).logits)  # otherwise this tests nothing


def test_an_adapter_in_such_a_block_keeps_its_dropout(tmp_path: Path) -> None:
    """Only the module that draws noise stays in evaluation mode, not what lies within it."""
    make_family("mixtral", tmp_path, router_jitter_noise=0.3)
    model = adapted(tmp_path).train()
    kept = [module for module in model.modules() if not module.training]
    assert kept
    assert all(part.training for module in kept for part in module.children())
