"""Training runs for tests: started, killed and resumed, and their losses, gradients and adapters compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from job.model.fused.frozen_weights import fuse_layers
from job.model.fused.kernels import TORCH
from job.model.lora import trainable
from job.records import Example, ExecutionPlan, StepMetrics
from job.training.config import Hooks, Recipe, TrainingResult
from job.training.trainer import train
from tests.helpers import fill_adapter, make_examples, make_model
from tests.unit.training import recipes
from tests.unit.training.recipes import PLAN

EXAMPLES = make_examples(8)
LONGER = make_examples(20)
"""Three steps an epoch, the last of four examples."""
RECIPE = replace(
    recipes.RECIPE,
    weight_decay=0.01,
    max_grad_norm=1e9,  # so that the gradient that reaches the optimizer is the step's own
    save_every_steps=1000,
)


LAYERS = replace(PLAN, forward="fused layers, torch")
"""The fused layers on sequences without padding."""


THROUGHOUT = replace(PLAN, forward="fused all, torch")
"""The same on padded ones, as on a GPU but without CUDA graphs."""


def run(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    recipe: Recipe,
    folder: Path,
    *,
    plan: ExecutionPlan = PLAN,
    stop_after: int | None = None,
    resume: Path | None = None,
    longest_at: str = "",
) -> tuple[TrainingResult, list[Path]]:
    """Trains, and stops after so many steps if asked to; returns the saved states too."""
    steps: list[StepMetrics] = []
    saved: list[Path] = []
    hooks = Hooks(
        steps.append,
        lambda path, _: saved.append(path),
        lambda: len(steps) == stop_after,
        place_of=lambda _tokens: longest_at,
    )
    made = train(model, tokenizer, examples, recipe=recipe, plan=plan, hooks=hooks, folder=folder, resume=resume)
    return made, saved


@contextmanager
def gradients(model: Any) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Collects, for each optimizer step within it, the gradients that the optimizer gets, by name of the parameter."""
    found: list[dict[str, torch.Tensor]] = []

    def note(optimizer: Any, *_: Any) -> None:
        got = sum(float(p.grad.square().sum()) for group in optimizer.param_groups for p in group["params"])
        found.append({name: p.grad.detach().clone() for name, p in trainable(model).items() if p.grad is not None})
        assert got == pytest.approx(sum(float(x.square().sum()) for x in found[-1].values()), rel=1e-5)

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Each parameter's gradient is the same within a tolerance relative to its norm, and none is missing or zero."""
    assert one.keys() == other.keys()
    assert one
    for place, gradient in one.items():
        assert gradient.norm() > 0
        assert (gradient - other[place]).norm() <= tolerance * gradient.norm(), place


def adapter_hash(model: Any) -> str:
    """Hash of all bits of the adapter."""
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trainable(model).values())).hexdigest()


def facts(trained: TrainingResult) -> str:
    """All that the metrics say but for what a clock measured."""
    return json.dumps([{k: v for k, v in asdict(step).items() if k != "measured"} for step in trained.history])


def fused_model(base_folder: Path, *, fp8: bool = False, **made: Any) -> Any:
    """The tiny model with the fused layers, as a GPU runs it."""
    model = fill_adapter(make_model(base_folder, **made))
    assert fuse_layers(model, keep_dequantized=True, kernels=TORCH, fp8=fp8) == "all"
    return model


RESUMED = replace(
    RECIPE,
    total_steps=6,
    warmup_steps=2,
    max_grad_norm=1.0,
    micro_batch_tokens=150,
    save_every_steps=2,
    learning_rate=2e-3,
)
