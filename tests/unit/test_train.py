"""Training: a step is a fact. What it learns does not depend on how it is carried out."""

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

from job import batches
from job.errors import JobError
from job.model import add_adapter, recompute_activations, trainable
from job.records import Example, Question, StepMetrics
from job.scoring import score_row
from job.train import Hooks, Recipe, Trained, flat_inputs, step_seed, substitute, total_steps, train
from tests.helpers import EOS, LINEAR, PAD, fill_adapter, make_examples, make_model

EXAMPLES = make_examples(8)
RECIPE = Recipe(
    seed=3,
    total_steps=1,
    learning_rate=1e-3,
    scheduler="linear",
    warmup_steps=0,
    weight_decay=0.01,
    max_grad_norm=1e9,  # so that the gradient that reaches the optimizer is the step's own
    global_batch_size=8,
    micro_batch_tokens=10_000,
    optimizer="adamw_torch",
    gradient_checkpointing=False,
    save_every_steps=1000,
)


def run(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    recipe: Recipe,
    folder: Path,
    *,
    stop_after: int | None = None,
    resume: Path | None = None,
) -> tuple[Trained, list[Path]]:
    """Trains, and stops after so many steps if asked to; returns the saved states too."""
    steps: list[StepMetrics] = []
    saved: list[Path] = []
    hooks = Hooks(steps.append, lambda path, _: saved.append(path), lambda: len(steps) == stop_after)
    return train(model, tokenizer, examples, recipe, hooks, folder, resume), saved


@contextmanager
def gradients() -> Iterator[list[dict[int, torch.Tensor]]]:
    """Collects, for each optimizer step within it, the gradients that the optimizer gets, by place of the parameter."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    found: list[dict[int, torch.Tensor]] = []

    def note(optimizer: Any, *_: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        found.append({place: p.grad.detach().clone() for place, p in enumerate(parameters) if p.grad is not None})

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def assert_same(one: dict[int, torch.Tensor], other: dict[int, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Each parameter's gradient is the same within a tolerance relative to its norm, and none is missing or zero."""
    assert one.keys() == other.keys()
    assert one
    for place, gradient in one.items():
        assert gradient.norm() > 0
        assert (gradient - other[place]).norm() <= tolerance * gradient.norm(), place


def adapter_hash(model: Any) -> str:
    """Hash of all bits of the adapter."""
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trainable(model).values())).hexdigest()


def facts(trained: Trained) -> str:
    """All that the metrics say but for what a clock measured."""
    return json.dumps([{k: v for k, v in asdict(step).items() if k != "measured"} for step in trained.history])


def plain_trl(
    base_folder: Path, tokenizer: Any, examples: Sequence[Example], folder: Path, rows: int
) -> tuple[float, dict[int, torch.Tensor]]:
    """One step over all examples by TRL as its manual has it: padded batches of `rows`, its collator and its loss."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32, attn_implementation="sdpa")
    model = fill_adapter(add_adapter(base, rank=16, alpha=16, dropout=0.0, target_modules=LINEAR, seed=1))
    columns = {
        "input_ids": [list(example.input_ids) for example in examples],
        "completion_mask": [[int(target) for target in example.targets] for example in examples],
    }
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=len(examples) // rows,
        completion_only_loss=True,
        max_grad_norm=1e9,
        optim="adamw_torch",
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer)
    with gradients() as found:
        trainer.train()
    return trainer.state.log_history[0]["loss"], found[0]


def ours(
    base_folder: Path, tokenizer: Any, examples: Sequence[Example], folder: Path, **changes: Any
) -> tuple[float, dict[int, torch.Tensor]]:
    """One step over all examples by the job."""
    model = fill_adapter(make_model(base_folder))
    with gradients() as found:
        trained, _ = run(model, tokenizer, examples, replace(RECIPE, **changes), folder)
    return trained.history[0].loss, found[0]


@pytest.mark.parametrize("prompt", [0.0, 0.5], ids=["all", "completion"])
def test_a_step_is_what_plain_trl_learns(base_folder: Path, tokenizer: Any, tmp_path: Path, prompt: float) -> None:
    """Loss and gradient agree between padded TRL, one flat batch, and micro-batches of three budgets."""
    examples = make_examples(8, prompt=prompt)
    loss, gradient = plain_trl(base_folder, tokenizer, examples, tmp_path, rows=8)
    pieces = {budget: len(batches.micro_batches([len(e.input_ids) for e in examples], budget)) for budget in (10_000, 160, 90, 30)}
    assert len(set(pieces.values())) == 4, pieces
    for budget in pieces:
        own_loss, own = ours(base_folder, tokenizer, examples, tmp_path, micro_batch_tokens=budget)
        assert own_loss == pytest.approx(loss, rel=1e-5)
        assert_same(gradient, own)
