"""The validations of a run so far: which is due, whether training stops early, and the adapter of the best one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from job.checkpoints.trainer_state import read_validations, write_validations
from job.model.lora import trainable
from job.records import ValidationMetrics
from job.training.config import Recipe
from job.training.early_stopping import is_due, progress


class ValidationHistory:
    """Collects the metrics of a run's validations, and keeps the adapter of the best one where the recipe says so.

    Args:
        model: The PEFT model that is trained.
        recipe: When to validate, when training stops early, and which adapter is kept.
    """

    def __init__(self, model: Any, recipe: Recipe) -> None:
        self._model, self._recipe = model, recipe
        self.metrics: list[ValidationMetrics] = []
        self._best: dict[str, torch.Tensor] | None = None
        """The adapter of the best validation, on the CPU by name; None unless the recipe keeps that one."""

    def is_due(self, step: int) -> bool:
        """Whether a validation after `step`, the last step that was done, is due and was not made yet."""
        every = self._recipe.validate_every_steps
        last_validated = self.metrics[-1].step if self.metrics else -1
        return every is not None and last_validated < step and is_due(step, every, self._recipe.total_steps)

    def add(self, metrics: ValidationMetrics) -> None:
        """Adds a validation of the model as it is now, and copies its adapter to the CPU if it is the best one."""
        self.metrics.append(metrics)
        if self._recipe.keep == "best" and progress(self.metrics).best_step == metrics.step:
            self._best = self._copied_adapter()

    @property
    def stopped_early(self) -> bool:
        """Whether JOB_TRAIN__STOP_AFTER validations in a row have not been better than the best one."""
        return bool(self.metrics) and progress(self.metrics).stopped(self._recipe.stop_after)

    def use_kept_adapter(self) -> None:
        """Puts the adapter of the best validation into the model, in place, if that one is kept."""
        if self._best is not None:
            with torch.no_grad():
                for name, parameter in trainable(self._model).items():
                    parameter.copy_(self._best[name])

    def write(self, checkpoint: Path, step: int) -> None:
        """Writes the validations into the folder of a step's checkpoint; the best adapter too, if it is another one."""
        newest = progress(self.metrics).best_step == step
        write_validations(checkpoint, self.metrics, None if newest else self._best)

    def restore(self, checkpoint: Path, step: int) -> None:
        """Reads what `write` wrote; the model has the adapter of the checkpoint's step already.

        Raises:
            ValueError: The checkpoint has no validations, or lacks the best adapter, which the recipe keeps.
        """
        self.metrics, best = read_validations(checkpoint)
        if self._recipe.keep == "best":
            now = self._copied_adapter()
            if best is None and progress(self.metrics).best_step != step:
                raise ValueError(f"the checkpoint in {checkpoint} lacks the adapter of the best validation")
            self._best = now if best is None else best

    def _copied_adapter(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().to("cpu", copy=True) for name, p in trainable(self._model).items()}
