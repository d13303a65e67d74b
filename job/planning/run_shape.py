"""The input of the forecast: the run's sizes, from the checks, else from known sizes of models and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace
from operator import itemgetter, mul

from job.common.export_formats import adapter_copies, derived, needs_merge
from job.common.methods import METHODS
from job.common.schedulers import count_warmup_steps
from job.data.batch_plan import steps_per_epoch
from job.data.examples import lengths_of, target_counts_of
from job.errors import Problem, SettingsError
from job.model.adapter_options import PLAIN
from job.model.experts import left_plain
from job.planning import known_models_and_data as known
from job.planning.auxiliary_models import AuxiliaryModel, judging, screening
from job.planning.forecast_input import HALF_PRECISION, Basis, ForwardWork, RunShape
from job.planning.input_checks import Preflight
from job.planning.plan_settings import adapter_options
from job.planning.preflight import PreflightResult
from job.planning.preflight_data import DataFacts
from job.planning.workload import Workload, count, scale
from job.records import Example
from job.settings.load import Settings
from job.settings.training_stages import split_stages
from job.training import memory_model
from job.training.config import total_steps
from job.training.early_stopping import due_steps
from job.training.execution_plan import AMPERE, VOLTA
from job.training.memory_model import Setup

CALIBRATION_BATCH, CALIBRATION_LENGTH = 8, 2048
"""Sequences of a step of auto-round, and their length in tokens at most; `job.export` has them, which needs torch."""
SMALL_GPU_TOKENS = 4096
"""Token budget for which memory is forecast if none is set: what the job uses on GPUs of 11 to 40 GiB."""


def shape_of_run(
    settings: Settings, preflight: Preflight, checks: list[PreflightResult], processes: int = 1
) -> RunShape:
    """The run's sizes: from the checks, or from the tables of known sizes if the checks read nothing.

    `processes` is their number on one machine.
    """
    setup, model_basis = _setup(settings, preflight, checks)
    workload, data_basis = _workload(settings, preflight.data)
    questions, questions_basis = _questions(settings, preflight)
    download = preflight.model.download_bytes if preflight.model else None
    if download is None:
        download = 2 * setup.architecture.parameters if setup else 0  # weights are published in half precision
    run = RunShape(
        setup=setup,
        setup_basis=model_basis,
        workload=workload,
        workload_basis=data_basis,
        validation=_validation(settings, preflight.data, workload),
        merges=_merges(settings),
        derived=tuple(derived(settings.export.formats)),
        adapter_copies=len(adapter_copies(settings.export.formats)),
        quantizing_tokens=_quantizing_tokens(settings, workload),
        reference=_reference(settings, preflight.data),
        questions=questions,
        questions_basis=questions_basis,
        answered=_answered(settings, preflight),
        budget=settings.train.micro_batch_tokens or SMALL_GPU_TOKENS,
        scoring_budget=settings.eval.batch_tokens,
        download_bytes=download
        + sum(facts.download_bytes for facts in (preflight.data, preflight.safety, preflight.judge) if facts),
        usd_per_hour=settings.cost.usd_per_hour,
        fused=settings.model.dtype != "fp32" and adapter_options(settings).not_fused is None,
        fused_from=AMPERE if settings.model.dtype == "bf16" else VOLTA,
        fp16=settings.model.dtype == "fp16",
        fp8=settings.train.compute == "fp8",
        budget_by_gpu=settings.train.micro_batch_tokens is None,
        keep_base=None if settings.model.keep_dequantized == "auto" else settings.model.keep_dequantized,
        placements=_placements(settings, processes),
        processes=processes * settings.run.nodes,
        processes_here=processes,
        full_precision=settings.eval.full_precision == "auto" and settings.model.quantization != "none",
        auxiliary=_auxiliary(settings, preflight, workload),
        keep_activations=None if (recompute := settings.train.gradient_checkpointing) == "auto" else not recompute,
        tiles=_tiles(settings, setup),
        recorded=_recorded(settings),
        offload=None if (offload := settings.train.offload_activations) == "auto" else offload,
        divide=settings.train.sequence_parallel == "auto" and settings.train.neftune_noise_alpha == 0,
        step_rows=settings.train.global_batch_size,
        warmup_steps=_warmup_steps(settings, workload),
    )
    if settings.export.run is not None:
        return _only_exported(run)
    return run if settings.train.is_one_stage else _with_first_stage(run, settings, preflight)


def _with_first_stage(run: RunShape, settings: Settings, preflight: Preflight) -> RunShape:
    """The sizes of a run that trains in two stages: those of the second stage, with the first stage's in it."""
    first, _ = split_stages(settings)
    workload, data_basis = _workload(first, preflight.first_data)
    first_stage = replace(
        run,
        workload=workload,
        workload_basis=data_basis,
        validation=_validation(first, preflight.first_data, workload),
        reference=None,
        download_bytes=0,
        merges=0,
        adapter_copies=0,
        derived=(),
        quantizing_tokens=0,
        auxiliary=(),
        tiles=_tiles(first, run.setup),
        recorded=_recorded(first),
        step_rows=first.train.global_batch_size,
        warmup_steps=_warmup_steps(first, workload),
    )
    first_download_bytes = preflight.first_data.download_bytes if preflight.first_data else 0
    return replace(run, first_stage=first_stage, download_bytes=run.download_bytes + first_download_bytes)


def _only_exported(run: RunShape) -> RunShape:
    """The sizes of a run that exports a finished one: it answers and judges no prompts, and screens no rows.

    What it takes over is fetched first. Of that only the adapter's size counts, in fp32.
    """
    adapter_bytes = memory_model.FP32 * run.setup.adapter if run.setup else 0
    return replace(
        run,
        trains=False,
        validation=None,
        reference=None,
        full_precision=False,
        answered=(0, 0),
        auxiliary=(),
        download_bytes=run.download_bytes + adapter_bytes,
    )


def _tiles(settings: Settings, setup: Setup | None) -> bool:
    """Whether long rows are computed layer by layer, where the GPU can; see `training.long_row_plan`."""
    of_tokens = settings.train.last_method == "sft" and settings.lora.dropout == 0
    return of_tokens and setup is not None and setup.architecture.in_tiles


def _recorded(settings: Settings) -> bool:
    """Whether method and noise allow CUDA graphs; see `stages.load`."""
    return settings.train.last_method == "sft" and settings.train.neftune_noise_alpha == 0


def _setup(settings: Settings, preflight: Preflight, checks: list[PreflightResult]) -> tuple[Setup | None, Basis]:
    """Model, adapter and optimizer; None if the model is unknown, or lacks a layer that LoRA should adapt."""
    basis: Basis = "computed" if preflight.model is not None else "assumed"
    architecture = preflight.model.architecture if preflight.model else known.ARCHITECTURES.get(settings.model.id)
    if architecture is None:
        return None, basis
    requested_targets, options = settings.lora.target_modules, adapter_options(settings)
    targets = architecture.groups[requested_targets] if isinstance(requested_targets, str) else requested_targets
    rank = settings.lora.rank if options.adalora is None else options.adalora.init_r
    missing = [name for name in targets if name not in architecture.linear]
    if missing:
        if preflight.model is None:  # else the check named "adapter" has inspected the layers themselves
            what = f"the model has no linear {', '.join(missing)}; it has {', '.join(sorted(architecture.linear))}"
            error = SettingsError([Problem("JOB_LORA__TARGET_MODULES", what)])
            checks.append(PreflightResult("adapter", "wrong", str(error), error))
        return None, basis
    return Setup(
        architecture=architecture,
        rank=2 * rank if options.decomposed else rank,
        targets=targets,
        quantization=settings.model.quantization,
        double_quantization=settings.model.double_quantization,
        value_bytes=memory_model.FP32 if settings.model.dtype == "fp32" else HALF_PRECISION,
        optimizer=settings.train.optimizer,
        recompute=settings.train.gradient_checkpointing is not False,
        counted=preflight.adapter.parameters if preflight.adapter and options != PLAIN else None,
        expert_adapter=architecture.expert_adapter_parameters(rank, options.layers) if options.experts else 0,
        dora=options.use_dora,
        bytes_beside=options.bytes_beside,
        merged_rows=2 * architecture.vocabulary if options.added_tokens else 0,
        plain_experts=preflight.model is not None and architecture.experts > 0 and left_plain(preflight.model.folder),
    ), basis


def _placements(settings: Settings, processes: int) -> tuple[str, ...]:
    """The possible placements of the base with `processes` processes on a machine; see `stages.placement`."""
    if settings.model.placement != "auto":
        return (settings.model.placement,)
    if settings.model.quantization == "none" or settings.model.keep_dequantized is True:
        return memory_model.PLACEMENTS[:1]
    several = processes > 1 and settings.run.nodes == 1
    return tuple(placement for placement in memory_model.PLACEMENTS if placement != "sharded" or several)


def _workload(settings: Settings, data: DataFacts | None) -> tuple[Workload | None, Basis]:
    """Counted from the rows; else scaled from a known sample of the data set; else None."""
    train = settings.train

    def steps(rows: int) -> int:
        return total_steps(rows, train.global_batch_size, train.epochs, train.max_steps)

    if data is not None:
        lengths, targets = lengths_of(data.examples), target_counts_of(data.examples)
        seed = settings.run.seed if settings.data.seed is None else settings.data.seed
        batches = {"seed": seed, "global_batch_size": train.global_batch_size}
        counted = count(lengths, targets, steps=steps(len(lengths)), **batches)
        return counted, "assumed" if data.estimated else "computed"
    samples = known.DATASET_TOKENS.get(settings.data.source)
    if samples is None:
        return None, "assumed"
    rows = min(settings.data.limit or samples[-1].rows, samples[-1].rows)
    sample = min(samples, key=lambda sample: abs(sample.rows - rows))
    return scale(
        rows,
        sample.tokens / sample.rows,
        sample.squares / sample.rows,
        min(sample.longest, train.max_length),
        global_batch_size=train.global_batch_size,
        steps=steps(rows),
    ), "assumed"


def _warmup_steps(settings: Settings, workload: Workload | None) -> int:
    train = settings.train
    return count_warmup_steps(workload.steps if workload else 0, train.warmup_steps, train.warmup_ratio)


def _validation(settings: Settings, data: DataFacts | None, workload: Workload | None) -> ForwardWork | None:
    """The validations of a run that does not stop early; None where there are none, or their rows are not known."""
    if data is None or workload is None or not data.validation:
        return None
    every = settings.train.validate_every_steps or steps_per_epoch(workload.rows, settings.train.global_batch_size)
    return _forward(data.validation, len(due_steps(every, workload.steps)))


def _reference(settings: Settings, data: DataFacts | None) -> ForwardWork | None:
    """The log-probabilities of the reference; None where the method has none, or the rows are not known."""
    if data is None or not METHODS[settings.train.last_method].reference:
        return None
    return _forward(data.examples, 1)


def _forward(examples: Sequence[Example], count: int) -> ForwardWork:
    return ForwardWork(
        count=count,
        rows=len(examples),
        tokens=sum(lengths_of(examples)),
        target_tokens=sum(target_counts_of(examples)),
        longest=max(lengths_of(examples)),
    )


def _auxiliary(settings: Settings, preflight: Preflight, workload: Workload | None) -> tuple[AuxiliaryModel, ...]:
    """The classifier and the judge, as far as their inputs are known."""
    models, answer = [], settings.eval.prompts_max_new_tokens
    if preflight.safety is not None and workload is not None:
        seen_rows = workload.steps * settings.train.global_batch_size
        rows, tokens = workload.rows, round(workload.rows * workload.tokens / seen_rows)
        if read_data := [data for data in (preflight.first_data, preflight.data) if data is not None]:
            counts = [data.audit.rows if data.audit else len(data.examples) for data in read_data]
            mean_lengths = [sum(lengths_of(data.examples)) / len(data.examples) for data in read_data]
            rows, tokens = sum(counts), round(sum(map(mul, counts, mean_lengths)))
        models.append(screening(rows, tokens, 2 * len(preflight.prompts), answer, preflight.safety.weights))
    if preflight.judge is not None and preflight.prompts:
        judgements = 2 * len(preflight.prompts)
        tokens = 2 * sum(preflight.prompts) + judgements * (2 * answer + preflight.judge.question_tokens)
        value_bytes = HALF_PRECISION  # on a GPU
        models.append(judging(judgements, tokens, preflight.judge.weights, value_bytes, served=preflight.judge.served))
    return tuple(models)


def _answered(settings: Settings, preflight: Preflight) -> tuple[int, int]:
    """Tokens of the longest prompt that is answered, and of it with the answer, as far as they are known.

    A longer question of a task loses its beginning, or is refused.
    """
    lengths, most = [(0, 0)], settings.train.max_length
    if preflight.questions is not None:
        answer, answered = (
            preflight.questions.answered - preflight.questions.prompt,
            min(preflight.questions.answered, most),
        )
        lengths.append((max(0, answered - answer), answered))
    if settings.eval.prompts is not None:
        answer, longest = settings.eval.prompts_max_new_tokens, max(preflight.prompts, default=0)
        lengths.append((longest, longest + answer))
    return max(lengths, key=itemgetter(1))


def _merges(settings: Settings) -> int:
    """How many candidates of a merge are made, as far as that is known before the base's weights are."""
    two_candidates = settings.export.merge_onto == "best" and settings.model.quantization != "none"
    return (1 + two_candidates) * needs_merge(settings.export.formats)


def _quantizing_tokens(settings: Settings, workload: Workload | None) -> int:
    """Tokens of all steps of auto-round; at most, where the rows are unknown."""
    at_once = CALIBRATION_BATCH * CALIBRATION_LENGTH
    if workload is not None:
        rows = min(settings.export.calibration_rows, workload.rows)
        epochs = workload.steps * settings.train.global_batch_size / workload.rows
        at_once = min(at_once, int(rows * workload.tokens / max(1, workload.rows * epochs)))
    return settings.export.quantization_steps * at_once


def _questions(settings: Settings, preflight: Preflight) -> tuple[known.TaskTokens | None, Basis]:
    """Counted from the questions; else from known tasks; else None."""
    if preflight.questions is not None:
        return preflight.questions, "computed" if preflight.tokenizer is not None else "assumed"
    tables = [known.TASK_TOKENS.get(task) for task in settings.eval.tasks]
    limited = [table.first(settings.eval.limit) for table in tables if table is not None]
    if len(limited) < len(tables):
        return None, "assumed"
    return known.TaskTokens(*(sum(parts) for parts in zip(*map(astuple, limited), strict=True))), "assumed"
