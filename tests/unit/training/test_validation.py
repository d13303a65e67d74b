"""Validation: the loss on held-out rows, early stopping, and the choice of the best adapter."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from job.checkpoints.trainer_state import validate_trainer_state
from job.distributed.processes import ALONE, Alone
from job.distributed.ranks import Place
from job.errors import TrainingFailed
from job.model.fused.frozen_weights import fuse_layers
from job.model.fused.kernels import TORCH
from job.model.lora import add_adapter, trainable
from job.records import PEFT, Example, ExecutionPlan, ValidationMetrics, ValidationRecord
from job.training.config import Hooks, Recipe, StepAbandoned, TrainingResult
from job.training.early_stopping import due_steps, is_due, progress, validation_record
from job.training.trainer import train
from job.training.validation import Validation
from tests.helpers import LINEAR, fill_adapter, make_examples, make_model
from tests.unit.training import recipes
from tests.unit.training.recipes import PLAN
from tests.unit.training.test_step import make_step

EXAMPLES, HELD_OUT = make_examples(24), make_examples(10, prompt=0.4)
RECIPE = replace(
    recipes.RECIPE,
    total_steps=20,
    learning_rate=3e-2,
    scheduler="constant",
    global_batch_size=4,
    micro_batch_tokens=150,
    optimizer="adamw_8bit",
    save_every_steps=3,
    validate_every_steps=2,
    stop_after=2,
    keep="best",
)
ONCE = replace(RECIPE, total_steps=1, validate_every_steps=1, stop_after=None, keep="last", learning_rate=0.0)


class Killed(Exception):
    """Stands for a kill: it gets through everything."""


def run(
    model: Any,
    tokenizer: Any,
    folder: Path,
    recipe: Recipe = RECIPE,
    *,
    resume: Path | None = None,
    examples: Sequence[Example] = EXAMPLES,
    held_out: Sequence[Example] = HELD_OUT,
    plan: ExecutionPlan = PLAN,
    **hooks: Any,
) -> tuple[TrainingResult, list[Path]]:
    """Trains; returns the checkpoints, too."""
    saved: list[Path] = []
    hooks = {"on_metrics": lambda _: None, "on_save": lambda path, _: saved.append(path), "stop": lambda: False} | hooks
    made = train(
        model,
        tokenizer,
        examples,
        recipe=recipe,
        plan=plan,
        hooks=Hooks(**hooks),
        folder=folder,
        resume=resume,
        validation=held_out,
    )
    return made, saved


def bits(model: Any) -> list[bytes]:
    """All bits of the adapter."""
    return [p.detach().numpy().tobytes() for p in trainable(model).values()]


def facts(trained: TrainingResult) -> list[dict[str, Any]]:
    """Steps and validations without what was measured."""
    return [{k: v for k, v in asdict(m).items() if k != "measured"} for m in (*trained.history, *trained.validations)]


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder."""
    return max(folder.iterdir(), default=None) if folder.exists() else None


def trl_eval_loss(base_folder: Path, tokenizer: Any, folder: Path) -> float:
    """The `eval_loss` of TRL's own trainer as its manual has it: padded rows, all of them in one batch."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32, attn_implementation="sdpa")
    model = fill_adapter(add_adapter(base, rank=16, alpha=16, dropout=0.0, target_modules=LINEAR, seed=1))
    columns = {
        "input_ids": [list(example.input_ids) for example in HELD_OUT],
        "completion_mask": [[int(target) for target in example.targets] for example in HELD_OUT],
    }
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_eval_batch_size=len(HELD_OUT),
        completion_only_loss=True,
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    rows = Dataset.from_dict(columns)
    trainer = SFTTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    return float(trainer.evaluate()["eval_loss"])


def test_the_loss_is_trls_eval_loss(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The validation loss is `eval_loss` of SFTTrainer.evaluate on the same rows, with dropout in training or not."""
    expected = trl_eval_loss(base_folder, tokenizer, tmp_path / "trl")
    for dropout in (0.0, 0.5):
        model = fill_adapter(make_model(base_folder, dropout=dropout))
        trained, _ = run(model, tokenizer, tmp_path, ONCE)
        assert [validation.step for validation in trained.validations] == [0, 1]
        for validation in trained.validations:
            assert validation.loss == pytest.approx(expected, rel=1e-5)
            assert validation.target_tokens == sum(sum(example.targets) for example in HELD_OUT)


def test_budget_and_padding_change_only_rounding(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Other micro-batches, and the padded sequences of a GPU, give the same loss, also where rows are the longest."""
    long = [*HELD_OUT, *make_examples(1, shortest=300, longest=300)]
    losses = []
    ways = ((10_000, PEFT), (40, PEFT), (10_000, "fused layers, torch"), (40, "fused all, torch"))
    for budget, forward in ways:
        model = fill_adapter(make_model(base_folder))
        if forward != PEFT:
            assert fuse_layers(model, keep_dequantized=True, kernels=TORCH) == "all"
        recipe, plan = replace(ONCE, micro_batch_tokens=budget), replace(PLAN, forward=forward)
        trained, _ = run(model, tokenizer, tmp_path, recipe, plan=plan, held_out=long)
        losses.append(trained.validations[0].loss)
    assert losses == pytest.approx([losses[0]] * len(ways), rel=1e-6)


def test_training_is_the_same_with_and_without_validation(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """A validation changes no bit of what is trained, dropout included."""
    recipe = replace(RECIPE, total_steps=5, stop_after=None, keep="last")
    found = []
    for interval in (2, None):
        model = make_model(base_folder, dropout=0.1)
        trained, saved = run(model, tokenizer, tmp_path / str(interval), replace(recipe, validate_every_steps=interval))
        found.append((bits(model), facts(trained)[:5]))
        names = {path.name for path in saved[-1].iterdir()}
        assert ("validation.jsonl" in names) is (interval is not None)
    assert found[0] == found[1]
    assert not trained.validations


@pytest.fixture(scope="module")
def whole(
    base_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[bytes], TrainingResult]:
    """A run that stops early, and what it keeps."""
    model = make_model(base_folder, quantization="nf4", dropout=0.1)
    trained, _ = run(model, tokenizer, tmp_path_factory.mktemp("whole"))
    return bits(model), trained


def test_training_stops_and_keeps_the_best(
    whole: tuple[list[bytes], TrainingResult], base_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """After the patience training ends, before its last step; the adapter is that of the step with the lowest loss."""
    kept, trained = whole
    found = progress(trained.validations)
    assert trained.complete
    assert found.stale == 2
    assert found.best_step + 2 * 2 == trained.history[-1].step == trained.validations[-1].step < RECIPE.total_steps
    assert found.best_step > 0
    model = make_model(base_folder, quantization="nf4", dropout=0.1)
    seen: list[list[bytes]] = []
    recipe = replace(RECIPE, stop_after=None, keep="last")
    steps: list[int] = []
    run(
        model,
        tokenizer,
        tmp_path,
        recipe,
        on_metrics=lambda metrics: (
            steps.append(metrics.step),
            seen.append(bits(model)) if metrics.step == found.best_step else None,
        ),
        stop=lambda: bool(steps) and steps[-1] == found.best_step,
    )
    assert seen == [kept]


@pytest.mark.parametrize("event", [pytest.param("on_metrics", marks=pytest.mark.long), "on_validation", "on_save"])
def test_killed_anywhere_it_ends_alike(
    whole: tuple[list[bytes], TrainingResult], event: str, base_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Killed again and again, also between a validation and its checkpoint, a run stops at the same step, same bits."""
    kept, expected = whole
    resume: Path | None = None
    for attempt in itertools.count():
        model = make_model(base_folder, quantization="nf4", dropout=0.1)
        events = itertools.count(1)
        saved: list[Path] = []

        def kill(*_: Any, here: bool = True, events: Any = events, most: int = 2 + 2 * attempt) -> None:
            if here and next(events) >= most:
                raise Killed

        hooks: dict[str, Callable[..., None]] = {
            "on_metrics": kill,
            "on_validation": kill,
            "on_save": lambda path, _, saved=saved, kill=kill: (saved.append(path), kill()),
        }
        calls = {name: hook for name, hook in hooks.items() if name == event}
        calls["on_save"] = hooks["on_save"] if event == "on_save" else lambda path, _, saved=saved: saved.append(path)
        try:
            trained, _ = run(model, tokenizer, tmp_path / str(attempt), resume=resume, **calls)
        except Killed:
            for path in saved[-1:]:
                validate_trainer_state(path, int(path.name.removeprefix("step-")))
                resume = path
            continue
        break
    assert attempt >= 1
    assert trained.complete
    assert facts(trained) == facts(expected)
    assert bits(model) == kept


def test_a_stop_in_a_validation_ends_it_soon(
    whole: tuple[list[bytes], TrainingResult], base_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """The stop flag is read between micro-batches: the step is saved without its validation, which is made after it."""
    kept, expected = whole
    model, asked, at = make_model(base_folder, quantization="nf4", dropout=0.1), itertools.count(), []
    trained, saved = run(
        model,
        tokenizer,
        tmp_path / "stopped",
        on_progress=lambda: at.append(next(asked)),
        stop=lambda: len(at) == 4,  # in the second validation, after its first block
    )
    assert not trained.complete
    assert [validation.step for validation in trained.validations] == [0]
    assert saved[-1].name == "step-00000002"
    again = make_model(base_folder, quantization="nf4", dropout=0.1)
    trained, _ = run(again, tokenizer, tmp_path / "again", resume=saved[-1])
    assert facts(trained) == facts(expected)
    assert bits(again) == kept


def test_a_stop_before_the_first_step_trains_nothing(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """A validation before training that is stopped leaves no checkpoint and no step."""
    trained, saved = run(make_model(base_folder), tokenizer, tmp_path, stop=lambda: True)
    assert (trained.history, trained.validations, trained.complete, saved) == ((), (), False, [])


def test_a_run_that_has_stopped_trains_no_further(
    whole: tuple[list[bytes], TrainingResult], base_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Resumed from the checkpoint of the step where it stopped, a run does no step, and keeps the same adapter."""
    kept, expected = whole
    model = make_model(base_folder, quantization="nf4", dropout=0.1)
    _, saved = run(model, tokenizer, tmp_path / "whole")
    assert saved[-1].name == f"step-{expected.history[-1].step:08d}"
    assert {"best.safetensors", "validation.jsonl"} < {path.name for path in saved[-1].iterdir()}
    steps: list[int] = []
    again = make_model(base_folder, quantization="nf4", dropout=0.1)
    trained, _ = run(
        again, tokenizer, tmp_path / "again", resume=saved[-1], on_metrics=lambda metrics: steps.append(metrics.step)
    )
    assert not steps
    assert trained.complete
    assert facts(trained) == facts(expected)
    assert bits(again) == kept


def test_a_checkpoint_that_lacks_the_best_adapter_is_refused(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Nothing is kept in place of the best adapter."""
    _, saved = run(make_model(base_folder), tokenizer, tmp_path / "whole")
    (saved[-1] / "best.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks the adapter of the best validation"):
        run(make_model(base_folder), tokenizer, tmp_path / "again", resume=saved[-1])


def test_a_loss_that_is_not_finite_ends_training(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """No validation with NaN is compared with others."""
    model = make_model(base_folder)
    with torch.no_grad():
        next(iter(trainable(model).values())).fill_(torch.nan)
    with pytest.raises(TrainingFailed, match="validation loss after step 0 is nan"):
        run(model, tokenizer, tmp_path)


class Part(Alone):
    """One of two processes: what it adds up is kept."""

    def __init__(self, rank: int) -> None:
        self.place = Place(rank=rank, world_size=2)
        self.parts: list[float] = []

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Keeps this process's part."""
        self.parts.append(float(tensor))


def make_validation(model: Any, **given: Any) -> Validation:
    """A validation whose loss is the number of target tokens, in floating point."""
    how: dict[str, Any] = {
        "block": 4,
        "step": make_step(model, 150)[0],
        "summed_loss": lambda examples: torch.tensor(float(sum(sum(e.targets) for e in examples))),
        "hooks": Hooks(lambda _: None, lambda *_: None, lambda: False),
        "processes": ALONE,
    }
    return Validation(model, HELD_OUT, **how | given)


class BesideAFullOne(Part):
    """The other process runs out of memory in its first block, and then frees some."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.asked: list[bool] = []

    def agree(self, *, repeat: bool) -> bool:
        """What this process or the other one needs."""
        self.asked.append(repeat)
        return repeat or len(self.asked) == 1


def test_a_block_is_repeated_if_another_process_ran_out_of_memory(base_folder: Path) -> None:
    """Else the two would add up different blocks; this process's part is the same, counted once."""
    model, found = make_model(base_folder), []
    for processes in (Part(0), BesideAFullOne(0)):
        sizes: list[int] = []

        def summed(examples: Sequence[Example], sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(len(examples))
            return torch.tensor(float(sum(sum(e.targets) for e in examples)))

        make_validation(model, processes=processes, summed_loss=summed)()
        found.append((processes.parts, sizes))
    (parts, sizes), (parts_beside, sizes_beside) = found
    assert parts_beside == parts
    first = len(sizes_beside) - len(sizes)
    assert sizes_beside == sizes[:first] + sizes
    assert first > 0


def test_processes_share_the_rows_out(base_folder: Path) -> None:
    """Every row is in exactly one process's part."""
    model, parts = make_model(base_folder), [Part(0), Part(1)]
    assert make_validation(model)() == 1.0
    for part in parts:
        make_validation(model, processes=part)()
    assert all(part.parts[0] > 0 for part in parts)
    assert sum(part.parts[0] for part in parts) == sum(sum(example.targets) for example in HELD_OUT)


def test_memory_that_runs_out_halves_the_budget(base_folder: Path) -> None:
    """A block is computed again with half the budget, which stays; with one row at a time it is an error."""
    calls: list[int] = []

    def loss(examples: Sequence[Example]) -> torch.Tensor:
        calls.append(len(examples))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.tensor(float(sum(sum(e.targets) for e in examples)))

    validation = make_validation(make_model(base_folder), summed_loss=loss)
    assert validation() == 1.0
    assert validation.budget == 75

    def never(_examples: Sequence[Example]) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(TrainingFailed, match="memory ran out in a validation"):
        make_validation(make_model(base_folder), summed_loss=never)()


def test_processes_stop_together(base_folder: Path) -> None:
    """What the processes agreed on ends a validation after the block; the flag of one alone does not."""
    model, part = make_model(base_folder), Part(0)
    part.stopping = True
    with pytest.raises(StepAbandoned):
        make_validation(model, processes=part)()
    mine = Hooks(lambda _: None, lambda *_: None, lambda: True)
    make_validation(model, processes=Part(0), hooks=mine)()


def losses(*values: float) -> list[ValidationMetrics]:
    """Validations with these losses, two steps apart."""
    return [ValidationMetrics(2 * index, 0.0, loss, 1, 1, {"seconds": 1.0}) for index, loss in enumerate(values)]


def test_the_best_step_is_the_first_of_the_lowest() -> None:
    """An equal loss is no improvement; the patience counts from the best validation, the one before training too."""
    assert progress(losses(3, 2, 2, 2.5)).best_step == 2
    assert progress(losses(3, 2, 2, 2.5)).stale == 2
    assert progress(losses(1, 2)).best_step == 0
    assert progress(losses(3, 2, 2)).stopped(1)
    assert not progress(losses(3, 2, 2)).stopped(2)
    assert not progress(losses(3, 4, 5, 6)).stopped(None)


def test_validations_are_due_at_the_ends_and_between() -> None:
    """Before training, at each interval, and after the last step."""
    assert [step for step in range(11) if is_due(step, 4, 10)] == due_steps(4, 10) == [0, 4, 8, 10]
    assert due_steps(5, 10) == [0, 5, 10]
    assert due_steps(20, 10) == [0, 10]


def test_the_record_says_what_was_kept() -> None:
    """The manifest's figures follow from the losses."""
    rewards = [{"rewards/margins": float(step)} for step in range(6)]
    made = [
        replace(one, preference=found) for one, found in zip(losses(5, 4, 3, 3.5, 3.25, 3.75), rewards, strict=True)
    ]
    how: dict[str, Any] = {"every_steps": 2, "stop_after": 3}
    best = ValidationRecord(
        **how,
        count=6,
        first_loss=5,
        last_loss=3.75,
        best_loss=3,
        best_step=4,
        stale=3,
        planned_steps=20,
        stopped_early=True,
        keep="best",
        kept_step=4,
        seconds=6.0,
        preference=rewards[2],
    )
    assert validation_record(made, total_steps=20, keep="best", **how) == best
    last = replace(best, planned_steps=10, stopped_early=False, keep="last", kept_step=10, preference=rewards[5])
    assert validation_record(made, total_steps=10, keep="last", **how) == last
