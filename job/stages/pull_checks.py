"""Checks of pull that need the model's configuration or the number of rows, and not the model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from job.common.export_formats import needs_merge
from job.errors import Problem
from job.model.adapter_options import MANY_STEPS, make_options, too_few_steps
from job.model.base import choose_device, inspect
from job.runs.attempt import Attempt
from job.settings.load import Settings
from job.stages.placement import placement_problems
from job.training.config import total_steps
from job.training.model_checks import model_problems


def check_model(attempt: Attempt, folder: Path, settings: Settings, later: Sequence[Settings]) -> None:
    """Refuses settings that the model's configuration excludes, before its weights and the data are downloaded.

    Args:
        attempt: Of its processes the number on this machine counts.
        folder: Holds the model's config.json.
        settings: Those of this training stage.
        later: Those of the stages after it; the last one exports.

    Raises:
        DataError, SettingsError: The same errors that loading the model, training or the export would raise.
    """
    lora, model, train, last = settings.lora, settings.model, settings.train, (later or [settings])[-1]
    options = make_options(dict(lora), train.max_steps or MANY_STEPS, model.add_tokens)
    named: dict[str, Any] = {"targets": lora.target_modules, "rank": lora.rank, "options": options}
    export: dict[str, Any] = {
        "formats": last.export.formats,
        "onto": last.export.merge_onto,
        "judged": last.gate.on,
        "nf4": model.quantization == "nf4",
    }

    here = attempt.processes.place.local_world_size

    def problems(config: Any, empty: Any) -> Iterator[Problem]:
        yield from model_problems(config, empty, **named, compute=train.compute, placement=model.placement)
        yield from placement_problems(model, train, lora, folder=folder, processes=here, options=options)
        if needs_merge(last.export.formats):
            from job.export.model_checks import export_problems

            yield from export_problems(config, empty, **export, device=choose_device(settings.run.device))

    inspect(folder, max_length=train.max_length, **named, problems=problems)


def step_problems(settings: Settings, rows: int) -> Iterator[Problem]:
    """What does not fit the number of steps that so many rows make."""
    train = settings.train
    steps = total_steps(rows, train.global_batch_size, train.epochs, train.max_steps)
    yield from too_few_steps(make_options(dict(settings.lora), steps, settings.model.add_tokens))
