"""Checks of pull that need the model's configuration or the number of rows, and not the model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job.common.export_formats import needs_merge
from job.common.resources import main_memory
from job.data.batch_plan import Steps, targets_of
from job.data.examples import lengths_of
from job.data.token_cache import Tokens
from job.errors import Problem, check_all, raise_problems
from job.model.adapter_options import MANY_STEPS, make_options, too_few_steps
from job.model.device import choose_device
from job.model.files import build_empty, read_config
from job.model.informed_init import too_few_targets
from job.model.load_base import inspect
from job.model.start_adapter import check_start_fits
from job.records import Example, Pulled
from job.runs.attempt import Attempt
from job.runs.layout import Stage
from job.settings.schema import Export, Lora, Model, Train
from job.stages.first_values import eva_batches
from job.stages.placement import divides_over, placement_problems, setup_before_loading
from job.training.config import total_steps
from job.training.execution_plan import AMPERE
from job.training.gpu_capability import compute_capability
from job.training.gpu_memory import gpu_memory
from job.training.memory_check import Sharing, refuse_rows
from job.training.memory_model import FP32, weight_bytes
from job.training.model_checks import model_problems


@dataclass(frozen=True)
class CheckedSettings:
    """The settings that are checked here.

    Attributes:
        model: Settings of the base.
        lora: Settings of the adapter.
        train: Settings of this training stage.
        device: `JOB_RUN__DEVICE`.
        seed: Seed of the order of the rows.
        export: Settings of the export, which the last training stage makes.
        gate_format: `JOB_GATE__ON` of the last training stage.
    """

    model: Model
    lora: Lora
    train: Train
    device: str
    seed: int
    export: Export
    gate_format: str


def check_model(attempt: Attempt, folder: Path, settings: CheckedSettings) -> None:
    """Refuses settings that the model's configuration excludes, before its weights and the data are downloaded.

    Args:
        attempt: Each of its processes on this machine loads the base; exports are written to its work folder.
        folder: The folder with the model's config.json.
        settings: The settings to check.

    Raises:
        DataError, SettingsError: The same errors that loading the model, training or the export would raise.
        Unreachable: The merged model does not fit on this machine's GPU, or the exports do not fit on its disk.
    """
    lora, model, train, export = settings.lora, settings.model, settings.train, settings.export
    options = make_options(dict(lora), train.max_steps or MANY_STEPS, model.add_tokens)
    adapter_options: dict[str, Any] = {"targets": lora.target_modules, "rank": lora.rank, "options": options}
    export_settings: dict[str, Any] = {
        "formats": export.formats,
        "onto": export.merge_onto,
        "gate_format": settings.gate_format,
    }
    local_processes = attempt.processes.place.local_world_size

    def problems(config: Any, empty: Any) -> Iterator[Problem]:
        settings_of_model: dict[str, Any] = {
            "compute": train.compute,
            "placement": model.placement,
            "optimizer": train.optimizer,
        }
        yield from model_problems(config, empty, **adapter_options, **settings_of_model)
        yield from placement_problems(model, train, lora, folder=folder, processes=local_processes, options=options)
        if needs_merge(export.formats):
            from job.export.model_checks import export_problems

            export_settings["device"] = choose_device(settings.device)
            yield from export_problems(config, empty, **export_settings, nf4=model.quantization == "nf4")

    _, empty = inspect(folder, max_length=train.max_length, **adapter_options, problems=problems)
    if needs_merge(export.formats):
        from job.stages.export_check import check_least_size

        check_least_size(attempt.work, empty, export.formats, choose_device(settings.device))


def check_files_of_exports(attempt: Attempt, original: Path | None, export: Export) -> None:
    """Refuses before the first training stage what the last one could not export of the base's own files.

    Args:
        attempt: Its stop flag is checked while files are read.
        original: Folder of the base's own files; None if they are not on this machine.
        export: Settings of the export, which the last training stage makes.

    Raises:
        DataError: The tokenizer cannot be loaded.
        SettingsError: A format cannot be made.
    """
    if original is not None and needs_merge(export.formats):
        from job.export.model_checks import file_problems

        raise_problems(file_problems(export.formats, original, attempt.check_stop))


def check_start_on(base: Path, start: Path, settings: CheckedSettings) -> None:
    """Refuses an adapter to start from that does not fit this base, before the base's weights are downloaded.

    Args:
        base: The folder with the base's config.json.
        start: The folder of the adapter to start from.
        settings: Say which layers get an adapter, and of which kind.

    Raises:
        SettingsError: The adapter does not fit.
    """
    lora, train = settings.lora, settings.train
    options = make_options(dict(lora), train.max_steps or MANY_STEPS, settings.model.add_tokens)
    empty = build_empty(base, read_config(base))
    check_start_fits(start, empty, targets=lora.target_modules, rank=lora.rank, options=options)


def check_rows(attempt: Attempt, folder: Path, settings: CheckedSettings, tokens: Tokens) -> None:
    """Refuses settings that do not fit the rows, during the download of the weights; only in the first attempt.

    Args:
        attempt: Its processes may divide a long row.
        folder: The folder with the base's config.json.
        settings: The settings to check.
        tokens: The tokenized rows.

    Raises:
        SettingsError: With all problems that are certain before the model is loaded.
    """
    if attempt.recorded(Stage.PULL, Pulled) is not None:
        return
    longest, longest_at = max(lengths_of(tokens.examples)), tokens.record.longest_at
    check_all(
        (
            ("steps", lambda: raise_problems(step_problems(settings, tokens.examples))),
            ("longest row", lambda: refuse_long_row(attempt, folder, settings, longest, longest_at)),
        )
    )


def step_problems(settings: CheckedSettings, examples: Sequence[Example]) -> Iterator[Problem]:
    """Yields problems of the number of steps and tokens: too few steps for AdaLoRA, too few target tokens for EVA.

    Args:
        settings: The settings to check.
        examples: All rows to train on.
    """
    train, lora = settings.train, settings.lora
    steps = total_steps(len(examples), train.global_batch_size, train.epochs, train.max_steps)
    yield from too_few_steps(make_options(dict(lora), steps, settings.model.add_tokens))
    if lora.init == "eva":
        plan = Steps(examples, settings.seed, train.global_batch_size, steps)
        # Whether sequences are packed is known when the model is loaded; without it, batches have fewer tokens.
        most = max(targets_of(batch) for batch in eva_batches(plan, packed=True))
        if most < lora.rank:
            yield too_few_targets(lora.rank)


def refuse_long_row(attempt: Attempt, folder: Path, settings: CheckedSettings, longest: int, where: str) -> None:
    """Refuses a row that does not fit even on an otherwise empty GPU, during the download of the weights.

    `training.prepare` can refuse shorter rows later, when the attention kernel is known, and how much memory the
    loaded model leaves.

    Args:
        attempt: Its processes may divide the row.
        folder: The folder with the base's config.json.
        settings: The settings to check.
        longest: Tokens of the longest row.
        where: File and line of the row; empty if they are not known.

    Raises:
        SettingsError: The row certainly does not fit.
    """
    train, lora, device = settings.train, settings.lora, choose_device(settings.device)
    if device.type != "cuda" or (capability := compute_capability()) < AMPERE:
        return
    options = make_options(dict(lora), MANY_STEPS, settings.model.add_tokens)
    if (setup := setup_before_loading(settings.model, train, lora, folder, options)) is None:
        return
    from job.model.fused.long_attention import FLASH, TRITON, copies_of

    architecture, place = setup.architecture, attempt.processes.place
    setup = replace(setup, processes=place.world_size)
    copies = None
    tiles = architecture.in_tiles and options.not_fused is None and lora.dropout == 0 and setup.value_bytes < FP32
    if tiles and train.last_method == "sft":
        kernels = (FLASH, TRITON) if architecture.attends_by_triton(capability) else (FLASH,)
        copies = min(copies_of(architecture, device, kernel) for kernel in kernels)
    smallest_setup = replace(setup, placement="gpu" if settings.model.placement == "gpu" else "host")
    processes = 1 if copies is None else divides_over(setup, train)
    refuse_rows(
        setup,
        longest,
        free_bytes=gpu_memory(train.gpu_memory_gb)[0] - weight_bytes(smallest_setup),
        host_bytes=main_memory().total_bytes // place.local_world_size,
        offload=None if train.offload_activations == "auto" else train.offload_activations,
        copies=copies,
        where=where,
        sharing=Sharing(processes, processes),
    )
