"""The adapter to TRL: what it overrides exists upstream, its loss is TRL's, and all its options have an effect."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from trl import SFTConfig, SFTTrainer

from job.training import trainer as trainer_module
from job.training.config import Hooks
from job.training.lm_head_loss import can_sum
from job.training.trainer import train
from job.training.trl_config import OPTIONS, sft_config
from tests.helpers import fill_adapter, make_examples, make_model
from tests.unit.training import recipes
from tests.unit.training.recipes import PLAN

OWN = {
    *(
        "packed_gradient",
        "before_optimizer_step",
        "after_optimizer_step",
        "callbacks_for",
        "preference_gradient",
        "steps_done",
        "log_probs",
        "metrics_of",
        "save_if_it_fits",
        "trainer_files",
        "packed_loss",
    ),
    *("validation_is_due", "summed_loss", "is_complete"),
}
"""What the adapter adds: no name of Trainer's."""
METHODS = [name for name, value in vars(trainer_module._PlannedTrainer).items() if isinstance(value, FunctionType)]
RECIPE = replace(
    recipes.RECIPE,
    micro_batch_tokens=100,
)


def upstream(name: str) -> Any:
    """The method of SFTTrainer or of a class above it that names its arguments, or the one that there is."""
    found = [vars(kind)[name] for kind in SFTTrainer.__mro__ if name in vars(kind)]
    named = [f for f in found if not any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(f).parameters.values())]
    return (named or found or [None])[0]


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"__init__"}))
def test_what_is_overridden_is_there(name: str) -> None:
    """A method that a new version renamed, or calls otherwise, would silently do nothing; a new one would be hit."""
    original = upstream(name)
    assert (original is None) == (name in OWN)
    if original is not None:
        ours, theirs = (
            [(p.name, p.kind) for p in inspect.signature(f).parameters.values()]
            for f in (vars(trainer_module._PlannedTrainer)[name], original)
        )
        assert ours == theirs


def test_all_that_the_adapter_adds_is_used() -> None:
    """The list above has nothing that is gone."""
    assert set(METHODS) >= OWN


def test_an_option_that_would_do_nothing_is_refused(tmp_path: Path) -> None:
    """Packing is the plan's, an evaluation or a data loader there is none."""
    with pytest.raises(ValueError, match="would do nothing in this trainer: dataloader_num_workers, packing"):
        sft_config(output_dir=str(tmp_path), packing=True, dataloader_num_workers=2)


def test_every_option_is_one_of_trls() -> None:
    """But for the older of two names of one option."""
    assert OPTIONS.keys() - SFTConfig.__dataclass_fields__.keys() <= {
        "activation_checkpointing",
        "gradient_checkpointing",
    }


@pytest.mark.parametrize("summed", [True, False], ids=["torch's head", "TRL's head"])
def test_the_loss_of_a_packed_batch_is_trls_own(
    base_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, summed: bool
) -> None:
    """Each micro-batch goes through `SFTTrainer.compute_loss` with the target tokens of the whole step."""
    examples = make_examples(8, prompt=0.5)
    seen: list[tuple[int, float]] = []

    def spy(self: Any, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> Any:  # noqa: FBT002
        loss = original(self, model, inputs, return_outputs, num_items_in_batch)
        seen.append((num_items_in_batch, float(loss.detach())))
        return loss

    original = SFTTrainer.compute_loss
    monkeypatch.setattr(SFTTrainer, "compute_loss", spy)
    monkeypatch.setattr(trainer_module, "can_sum", lambda base: summed and can_sum(base))
    model = fill_adapter(make_model(base_folder))
    hooks = Hooks(lambda _: None, lambda *_: None, lambda: False)
    trained = train(model, tokenizer, examples, recipe=RECIPE, plan=PLAN, hooks=hooks, folder=tmp_path)
    assert len(seen) > 1
    assert {targets for targets, _ in seen} == {trained.history[0].target_tokens}
    assert trained.history[0].loss == pytest.approx(sum(loss for _, loss in seen), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_heads_give_one_loss(
    base_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """On a CPU in fp32 torch's head and TRL's agree; in bf16 it is TRL's in any case, under autocast."""
    losses = []
    for summed in (True, False):
        monkeypatch.setattr(trainer_module, "can_sum", lambda base, summed=summed: summed and can_sum(base))
        model = fill_adapter(make_model(base_folder))
        model.get_base_model().to(dtype)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        hooks = Hooks(lambda _: None, lambda *_: None, lambda: False)
        examples = make_examples(8, prompt=0.5)
        made = train(model, tokenizer, examples, recipe=RECIPE, plan=PLAN, hooks=hooks, folder=tmp_path)
        losses.append(made.history[0].loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
