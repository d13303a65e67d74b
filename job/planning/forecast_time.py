"""Forecast of time: hours of a run on a GPU, without interruptions."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

from job.common.export_formats import GGUF, MERGED, find_format
from job.planning import time_model
from job.planning.auxiliary_models import seconds as auxiliary_seconds
from job.planning.forecast_input import EVALUATIONS, HALF_PRECISION, RunShape
from job.planning.forecast_memory import (
    computed_in_tiles,
    gpus_of_longest_row,
    scores_original_base,
)
from job.planning.gpu_prices import Gpu
from job.planning.known_models_and_data import TaskTokens
from job.planning.scaling import SCORING_EFFICIENCY, Division, divide
from job.planning.workload import Workload
from job.records import ExecutionPlan
from job.training import memory_model
from job.training.execution_plan import AMPERE
from job.training.memory_model import Setup

DOWNLOAD_RATE = 250e6
START_SECONDS = 20.0
LOADING_RATE = 0.75e9
"""Assumed: DOWNLOAD_RATE in bytes a second for what is fetched, START_SECONDS for starting, and LOADING_RATE in bytes a
second at which the base's files are hashed, read from a local disk and quantized. Measured for Mistral-7B with an H200
and four cores, before imports were made shorter: 39 s the first time, 20 s where the quantized base was in the cache,
so 14.5 GB in 19 s; 29 s in all with an H100 (`2026-11-28-h200-job.jsonl`, `2026-11-28-h100-job.jsonl`)."""
MERGED_PER_SECOND = 30e6
GGUF_PER_SECOND = 6e6
LLAMA_CPP_FLOPS = 23e9
"""Of one processor core, measured on a model of 86 million weights in bf16 with AVX-512: weights cast to fp8 (merging
is assumed to be as fast), weights made Q8_0 with the start of the process, operations as llama.cpp scores Q8_0."""
CORES = 8
"""Assumed, of the machine with the GPU: llama.cpp scores on all of them, all else is done on one."""


def hours_of_run(gpu: Gpu, run: RunShape, setup: Setup, execution: ExecutionPlan | None) -> float | None:
    """Hours from start to end without interruptions; None if data or speed (as in fp32) is unknown."""
    if run.questions is None or setup.value_bytes != HALF_PRECISION or (run.trains and run.workload is None):
        return None
    first_stage_seconds = 0.0
    if run.first_stage is not None:
        first_stage_hours = hours_of_run(gpu, run.first_stage, setup, execution)
        if first_stage_hours is None:
            return None
        first_stage_seconds = 3600 * first_stage_hours
    if execution is not None:
        setup = replace(setup, recompute=not execution.kept_activations)
    division, training = Division(run.processes, scoring=SCORING_EFFICIENCY if run.processes > 1 else 1.0), 0.0
    if run.trains and run.workload is not None:
        division = _division(gpu, run, run.workload, setup)
        training = _training_seconds(gpu, run, run.workload, setup, execution, division=division)
    evaluation = _evaluation_seconds(gpu, run, run.questions, setup, execution, division=division)
    start = START_SECONDS + loading_seconds(setup) + run.download_bytes / DOWNLOAD_RATE
    # The base's answers of a first stage serve the second, those of the unquantized base too.
    evaluations = run.trains * (EVALUATIONS if run.first_stage is None else EVALUATIONS - 1)
    if run.first_stage is None and scores_original_base(gpu, run, setup):
        evaluations += 1
        start += reading_original_seconds(setup)
    evaluations += run.exported - _gguf_formats(run)
    exporting = _exporting_seconds(gpu, run, setup)
    rates = {"disk": DOWNLOAD_RATE, "processor": CORES * LLAMA_CPP_FLOPS}
    auxiliary = sum(auxiliary_seconds(model, gpu, **rates) for model in run.auxiliary)
    return (first_stage_seconds + start + training + exporting + evaluations * evaluation + auxiliary) / 3600


def _training_seconds(
    gpu: Gpu, run: RunShape, workload: Workload, setup: Setup, execution: ExecutionPlan | None, *, division: Division
) -> float:
    """Seconds of all optimizer steps, validations and the reference."""
    speed: dict[str, Any] = {"rate": gpu.flops, "bandwidth": gpu.bandwidth}
    utilisation, training = time_model.UTILISATION, 0.0
    if execution is not None:
        utilisation, training = _fused_utilisation(gpu, run, setup, execution)
    # Of the busiest GPU; each reads all weights for its own micro-batches.
    micro_batches = max(workload.steps, ceil(workload.tokens / division.parts / run.micro_batch))
    flops = round(time_model.training_flops(setup, workload.tokens, workload.squares) / division.parts)
    passes = (3 if setup.recompute else 2) * micro_batches
    busiest = time_model.seconds(flops, passes, setup, used=utilisation, transfers=2 * micro_batches, **speed)
    training += busiest / division.training
    for rows in filter(None, (run.validation, run.reference)):  # passes of the training path, with its micro-batches
        forward = rows.count * time_model.evaluation_flops(setup, rows.tokens, rows.target_tokens) // division.gpus
        at_once = division.gpus * min(run.micro_batch, max(workload.largest_step, rows.longest))
        passes = rows.count * ceil(rows.tokens / at_once)
        training += time_model.seconds(forward, passes, setup, used=utilisation, **speed) / division.scoring
    return training


def _evaluation_seconds(
    gpu: Gpu, run: RunShape, questions: TaskTokens, setup: Setup, execution: ExecutionPlan | None, *, division: Division
) -> float:
    """Seconds in which one model scores all questions."""
    utilisation = time_model.UTILISATION if execution is None else time_model.SCORING_UTILISATION
    flops = time_model.evaluation_flops(setup, questions.tokens, questions.reads) // division.gpus
    passes = ceil(questions.tokens / division.gpus / run.scoring_budget)
    computing = time_model.seconds(flops, passes, setup, used=utilisation, rate=gpu.flops, bandwidth=gpu.bandwidth)
    return computing / division.scoring + time_model.SCORING_SECONDS


def _exporting_seconds(gpu: Gpu, run: RunShape, setup: Setup) -> float:
    """Seconds in which all formats are made, and scored where llama.cpp does that."""
    # Written by the processor, read again to be scored, and uploaded if it is published.
    published = run.export_bytes - max(0, run.merges - 1) * run.format_bytes(MERGED)
    exporting = (2 * run.export_bytes + published) / DOWNLOAD_RATE + run.merges * merging_seconds(setup)
    for name in run.derived:
        if find_format(name).calibrated:
            flops = quantizing_flops(run, setup)
            exporting += time_model.seconds(flops, 0, setup, rate=gpu.flops, bandwidth=gpu.bandwidth)
        else:
            exporting += converting_seconds(name, setup)
    return exporting + _gguf_formats(run) * llama_cpp_seconds(run, setup)


def _gguf_formats(run: RunShape) -> int:
    """How many formats llama.cpp scores, not the GPU."""
    return sum(name.startswith(GGUF) for name in run.derived)


def _fused_utilisation(gpu: Gpu, run: RunShape, setup: Setup, execution: ExecutionPlan) -> tuple[float, float]:
    """(share of the data sheet's operations a second that fused layers reach in training, seconds of recording)."""
    a, recorded = setup.architecture, execution.recorded and run.recorded
    if computed_in_tiles(run, run.micro_batch):
        utilisation = time_model.LONG_ROW_UTILISATION["triton" if a.attends_by_triton(gpu.capability) else "flash"]
    elif recorded:
        utilisation = time_model.FUSED_UTILISATION
    else:  # before Ampere, attention goes segment by segment: not measured, and assumed to be no faster than PEFT's
        utilisation = time_model.UNRECORDED_UTILISATION if gpu.capability >= AMPERE else time_model.UTILISATION
    if a.experts and a.expert_width < time_model.FINE_EXPERTS:
        utilisation = min(utilisation, time_model.FINE_EXPERTS_UTILISATION)
    seconds = time_model.RECORDING_SECONDS if recorded and not computed_in_tiles(run, run.micro_batch) else 0.0
    return utilisation * (time_model.FP8_SPEEDUP if run.fp8 else 1.0), seconds


def _division(gpu: Gpu, run: RunShape, workload: Workload, setup: Setup) -> Division:
    """How the work is divided over the GPUs of the run."""
    over = gpus_of_longest_row(run, setup, memory_model.usable_bytes(gpu.memory_bytes))
    return divide(
        run.processes,
        step_rows=min(run.step_rows, workload.rows),
        step_tokens=workload.tokens / workload.steps,
        rows_divided=over > 1,
    )


def loading_seconds(setup: Setup) -> float:
    """Seconds in which the base's files are hashed, read and quantized at the start of a run."""
    return HALF_PRECISION * setup.architecture.parameters / LOADING_RATE


def reading_original_seconds(setup: Setup) -> float:
    """Seconds in which the files of the unquantized base are read from the disk."""
    return HALF_PRECISION * setup.architecture.parameters / DOWNLOAD_RATE


def merging_seconds(setup: Setup) -> float:
    """Seconds of one candidate of the merge."""
    return setup.architecture.parameters / MERGED_PER_SECOND


def converting_seconds(name: str, setup: Setup) -> float:
    """Seconds for a format that is computed on one core: fp8, GGUF."""
    rate = GGUF_PER_SECOND if name.startswith(GGUF) else MERGED_PER_SECOND
    return setup.architecture.parameters / rate


def quantizing_flops(run: RunShape, setup: Setup) -> int:
    """Operations of auto-round: each layer forward and backward on the tokens of each step, as in full training."""
    return 6 * setup.architecture.linear_parameters * run.quantizing_tokens


def llama_cpp_seconds(run: RunShape, setup: Setup) -> float:
    """Seconds in which llama.cpp scores all questions."""
    if run.questions is None:
        return 0.0
    flops = time_model.evaluation_flops(setup, run.questions.tokens, run.questions.reads)
    return flops / (CORES * LLAMA_CPP_FLOPS)
