"""The optimizer step by itself, without a trainer and TRL."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from job.data.batch_plan import Steps
from job.distributed.processes import ALONE
from job.model.fused.frozen_weights import fuse_layers
from job.model.fused.kernels import TORCH
from job.model.lora import trainable
from job.records import Example, ExecutionPlan
from job.training import step as step_module
from job.training.config import Hooks, StepAbandoned
from job.training.flat_parameters import FlatParameters
from job.training.packing import IGNORED
from job.training.padded_shapes import Shapes
from job.training.step import StepGradient
from tests.helpers import fill_adapter, make_examples, make_model
from tests.unit.training import recipes
from tests.unit.training.recipes import PLAN

ROOT = Path(__file__).parents[3]
EXAMPLES = make_examples(16, prompt=0.5)
RECIPE = replace(
    recipes.RECIPE,
    total_steps=2,
)


def make_step(
    model: Any,
    budget: int,
    *,
    examples: Sequence[Example] = EXAMPLES,
    plan: ExecutionPlan = PLAN,
    scaler: Any = None,
    fail: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
    fits: Callable[[float], bool] = lambda _: True,
) -> tuple[StepGradient, FlatParameters]:
    """A step whose loss is the plain one, of all logits."""

    def gradient(inputs: dict[str, Any], targets: int) -> torch.Tensor:
        fail()
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits[0, :-1]
        loss = functional.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=IGNORED) / targets
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    parameters = FlatParameters(trainable(model).values(), 256)
    step = StepGradient(
        model,
        Steps(examples, RECIPE.seed, RECIPE.global_batch_size, RECIPE.total_steps),
        parameters,
        recipe=replace(RECIPE, micro_batch_tokens=budget),
        plan=plan,
        hooks=Hooks(lambda _: None, lambda *_: None, stop, fits),
        processes=ALONE,
        packed_gradient=gradient,
        scaler=scaler,
    )
    return step, parameters


@pytest.fixture(scope="module")
def model(base_folder: Path) -> Any:
    """The tiny base with an adapter, in training."""
    return fill_adapter(make_model(base_folder)).train()


def test_a_step_does_not_depend_on_its_micro_batches(model: Any) -> None:
    """Loss and gradient are the same whatever the budget, and each step starts from a gradient of zero."""
    found = {}
    for budget in (10_000, 60):
        step, parameters = make_step(model, budget)
        for number in (0, 1):
            loss = float(step(number))
            found[budget, number] = loss, parameters.gradient.clone()
    for number in (0, 1):
        (one, other) = (found[budget, number] for budget in (10_000, 60))
        assert one[0] == pytest.approx(other[0], rel=1e-6)
        torch.testing.assert_close(one[1], other[1], rtol=1e-4, atol=1e-7)
    assert found[60, 0][0] != found[60, 1][0]


def test_a_full_memory_halves_the_budget_and_repeats_the_step(model: Any) -> None:
    """What the failed try has added is not counted; the budget stays what it came to."""
    calm, parameters = make_step(model, 100)
    loss, gradient = float(calm(0)), parameters.gradient.clone()
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    shaken, parameters = make_step(model, 100, fail=fail)
    assert float(shaken(0)) == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(parameters.gradient, gradient, rtol=1e-4, atol=1e-7)
    assert (calm.budget, shaken.budget) == (100, 50)


def test_rows_of_another_weight_have_other_masks(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go through the model by themselves: a mask of dropout that both had would be drawn once for two."""
    drawn: list[int] = []
    monkeypatch.setattr(step_module, "reseed", lambda _model, _seed, number: drawn.append(number))
    passes: list[None] = []
    examples = [replace(one, weight=1 + number % 2) for number, one in enumerate(EXAMPLES)]
    step, _ = make_step(model, 10_000, examples=examples, fail=lambda: passes.append(None))
    step(0)
    assert drawn == list(range(len(passes))) == [0, 1]


def test_an_error_that_is_not_of_memory_gets_out(model: Any) -> None:
    """It is not repeated."""

    def fail() -> None:
        raise RuntimeError("shapes do not match")

    step, _ = make_step(model, 100, fail=fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        step(0)


def test_a_step_for_which_there_is_no_time_is_abandoned(model: Any) -> None:
    """Between two micro-batches it is asked whether the share that is left still fits."""
    asked: list[float] = []

    def fits(share: float) -> bool:
        asked.append(share)
        return len(asked) < 3

    step, _ = make_step(model, 60, stop=lambda: True, fits=fits)
    with pytest.raises(StepAbandoned):
        step(0)
    assert asked[0] == 1
    assert asked == sorted(asked, reverse=True)
    assert len(set(asked)) == 3


@pytest.mark.long
def test_fp16s_loss_scaling_is_in_the_gradient_and_not_in_the_loss(base_folder: Path) -> None:
    """On padded sequences as elsewhere: the optimizer's scaler takes the factor out again, and no bit is lost."""
    model = fill_adapter(make_model(base_folder, dropout=0.2)).train()
    fuse_layers(model, keep_dequantized=True, kernels=TORCH)
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu", init_scale=1024.0)):
        plan = replace(PLAN, forward="fused all, torch")
        step, parameters = make_step(model, 60, plan=plan, scaler=scaler)
        loss = float(step(0))
        if scaler is not None and scaler.is_enabled():
            assert float(parameters.gradient.norm()) == pytest.approx(1024 * float(found[0][1].norm()), rel=1e-5)
            optimizer = torch.optim.SGD([parameters.whole])
            scaler.unscale_(optimizer)
        found.append((loss, parameters.gradient.clone()))
    assert all(loss == found[0][0] and torch.equal(gradient, found[0][1]) for loss, gradient in found)
    assert float(found[0][1].norm()) > 0


def test_a_sequence_laid_out_early_is_used_for_these_examples_and_shapes_only(base_folder: Path) -> None:
    """The token budget may have changed since, and with it the shapes, on which the last bits of a gradient depend."""
    model = fill_adapter(make_model(base_folder)).train()
    fuse_layers(model, keep_dequantized=True, kernels=TORCH)
    subject = make_step(model, 60, plan=replace(PLAN, forward="fused all, torch"))[0].micro_batch
    shapes = [Shapes(((256, 8),))]
    subject._shapes = lambda: shapes[-1]
    subject.lay_out(EXAMPLES[:2])
    ready = subject._laid_out
    assert ready is not None
    assert subject._sequence(EXAMPLES[:2]) is ready.sequence
    subject.lay_out(EXAMPLES[:2])
    assert len(subject._sequence(EXAMPLES[2:5]).segments) == 3 + 1
    subject.lay_out(EXAMPLES[:2])
    shapes.append(Shapes(((512, 8),)))
    assert subject._sequence(EXAMPLES[:2]).tokens.shape == (3, 512)


def test_it_knows_no_trl() -> None:
    """Neither TRL nor transformers' Trainer is imported with it."""
    names = {"trl", "transformers.trainer"}
    code = f"import sys, job.training.step; sys.exit(str(sys.modules.keys() & {names}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"
