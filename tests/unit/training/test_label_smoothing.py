"""Label smoothing of fine-tuning is that of transformers' LabelSmoother, however the loss is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from job.model.load_base import PLAIN
from job.model.packed_attention import use
from job.records import ExecutionPlan
from job.training import trainer
from job.training.packing import alone_inputs
from tests.helpers import fill_adapter, make_examples, make_model
from tests.unit.training.recipes import PLAN
from tests.unit.training.training_runs import LAYERS, RECIPE, THROUGHOUT, assert_same, fused_model, gradients, run

EXAMPLES = make_examples(5)
SMOOTHING = 0.1
STEP = replace(RECIPE, global_batch_size=len(EXAMPLES), label_smoothing=SMOOTHING)


def packed(folder: Path) -> Any:
    """Sequences go through PEFT's layers packed."""
    return fill_adapter(make_model(folder))


def one_by_one(folder: Path) -> Any:
    """Sequences go through the model's own forward one at a time."""
    made = fill_adapter(make_model(folder))
    use(made.get_base_model(), PLAIN)
    return made


def of_transformers(folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of the step by its LabelSmoother, on the logits of each example alone."""
    from transformers.trainer_pt_utils import LabelSmoother

    from job.model.lora import trainable

    made = one_by_one(folder).train()
    targets = sum(sum(example.targets) for example in EXAMPLES)
    total = 0.0
    for example in EXAMPLES:
        inputs = alone_inputs(example, made.device)
        logits = made(input_ids=inputs["input_ids"]).logits
        mean = LabelSmoother(SMOOTHING)({"logits": logits}, inputs["labels"], shift_labels=True)
        loss = mean * sum(example.targets) / targets
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad for name, p in trainable(made).items()}


@pytest.mark.parametrize(
    ("make", "plan", "plain"),
    [
        pytest.param(packed, PLAN, True, id="packed"),
        pytest.param(packed, PLAN, False, id="packed, another head"),
        pytest.param(one_by_one, PLAN, True, id="one by one"),
        pytest.param(fused_model, LAYERS, True, id="fused"),
        pytest.param(fused_model, THROUGHOUT, True, id="fused and padded"),
    ],
)
def test_it_is_that_of_transformers(  # noqa: PLR0917 - fixtures
    make: Callable[[Path], Any],
    plan: ExecutionPlan,
    plain: bool,  # noqa: FBT001 - a parameter
    base_folder: Path,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loss and gradient of a step in fp32, within 1e-5; also where the head is one whose logits have to be formed."""
    if not plain:
        monkeypatch.setattr(trainer, "can_sum", lambda _: False)
    expected, wanted = of_transformers(base_folder)
    made = make(base_folder)
    with gradients(made) as found:
        trained, _ = run(made, tokenizer, EXAMPLES, STEP, tmp_path, plan=plan)
    assert trained.history[0].loss == pytest.approx(expected, rel=1e-5)
    assert_same(wanted, found[0])


def test_validation_has_it_too(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The validation loss is the training loss on other rows, as transformers' `eval_loss` is."""
    losses = []
    for smoothing in (0.0, SMOOTHING):
        recipe = replace(STEP, label_smoothing=smoothing, learning_rate=0.0, validate_every_steps=1)
        trained = trainer.train(
            packed(base_folder),
            tokenizer,
            EXAMPLES,
            recipe=recipe,
            plan=PLAN,
            hooks=trainer.Hooks(lambda _: None, lambda *_: None, lambda: False),
            folder=tmp_path,
            validation=EXAMPLES,
        )
        losses.append(trained.history[0].loss)
        assert trained.validations[0].loss == pytest.approx(losses[-1], rel=1e-6)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
