"""What `plan` advises where a run fits on none of the GPUs: which settings would really make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from job.common.formatting import enumeration, size
from job.common.gpu_context import CONTEXT_BYTES
from job.planning.forecast import forecast_gpu
from job.planning.forecast_input import RunShape
from job.planning.forecast_memory import answer_bytes, placed_on, run_on, scoring_bytes, training_memory
from job.planning.gpu_prices import Gpu
from job.training import memory_model
from job.training.memory_model import Setup


def advice_to_fit(gpus: Sequence[Gpu], run: RunShape, setup: Setup, *, limit: float | None, longest_at: str) -> str:
    """What would help a run that fits on none of the GPUs, by what it lacks on the one with the most memory.

    Args:
        gpus: With all their memory, at least one.
        run: The run.
        setup: Its model.
        limit: JOB_TRAIN__GPU_MEMORY_GB.
        longest_at: File and line of the longest row to train on; empty if they are not known.
    """
    largest = max(gpus, key=lambda gpu: gpu.memory_bytes)
    capped = with_memory_limit(largest, limit)
    run_there = run_on(capped, run, setup)
    placed = placed_on(capped, run_there, setup)
    usable = memory_model.usable_bytes(capped.memory_bytes)
    advice = [*_of_limit(gpus, run, setup, limit), *_of_settings(run_there, placed, usable, longest_at)]
    return "; ".join(advice) or "what each lacks is said above"


def with_memory_limit(gpu: Gpu, gigabytes: float | None) -> Gpu:
    """The GPU, with no more memory than JOB_TRAIN__GPU_MEMORY_GB."""
    return gpu if gigabytes is None else replace(gpu, memory_bytes=min(gpu.memory_bytes, int(gigabytes * 1e9)))


def _of_limit(gpus: Sequence[Gpu], run: RunShape, setup: Setup, limit: float | None) -> Iterator[str]:
    if limit is None:
        return
    fit = [gpu.name for gpu in gpus if forecast_gpu(gpu, run, setup).fits]
    names = "all of them" if len(fit) == len(gpus) > 1 else enumeration(fit) if fit else "none"
    without = f"without it, {names} {'fit' if len(fit) > 1 else 'fits'}"
    yield f"JOB_TRAIN__GPU_MEMORY_GB={limit:g} limits them: raise or remove it ({without})"


def _of_settings(run: RunShape, setup: Setup, usable: int, longest_at: str) -> Iterator[str]:
    """What a run lacks on a GPU of `usable` bytes, each with the setting that is about it."""
    if usable <= 0:
        yield f"the driver alone takes {size(CONTEXT_BYTES, ' ')}"
        return
    loaded = memory_model.training_memory(setup, 0) if run.trains else None
    held = memory_model.weight_bytes(setup) if loaded is None else loaded.total
    if held > usable:
        what = f"{size(held, ' ')} are needed before a token is computed, and {size(usable, ' ')} can be used"
        yield f"{what}: a smaller model, JOB_MODEL__PLACEMENT=auto{', or a lower JOB_LORA__RANK' * run.trains}"
        return
    if run.trains:
        stages = [run] if run.first_stage is None else [run.first_stage, run]
        for stage in stages:
            yield from _of_rows(stage, setup, usable, longest_at if stage is run else "")
    if scoring_bytes(run, setup) > usable:
        yield "lower JOB_EVAL__BATCH_TOKENS"
    if answer_bytes(run, setup) > usable:
        yield "lower JOB_EVAL__PROMPTS_MAX_NEW_TOKENS, or the max_gen_toks of the task"
    if run.merges and scoring_bytes(run, replace(setup, quantization="none")) > usable:
        yield "leave out the formats of JOB_EXPORT__FORMATS that are made of the merged model, which is not quantized"


def _of_rows(run: RunShape, setup: Setup, usable: int, longest_at: str) -> Iterator[str]:
    """What the training of a stage lacks: memory for its longest row alone, or for its micro-batches."""
    longest = run.workload.longest if run.workload else 0
    if training_memory(run, setup, longest).total > usable:
        most = memory_model.largest_budget(lambda tokens: training_memory(run, setup, tokens).total, usable, longest)
        row = f"the longest row{f', {longest_at},' if longest_at else ''} has {longest:,} tokens"
        yield (
            f"{row}, and about {most:,} fit into {size(usable, ' ')}: lower JOB_TRAIN__MAX_LENGTH "
            "or JOB_LORA__RANK (JOB_DATA__ON_LONG_ROW sets what is done with longer rows)"
        )
    elif training_memory(run, setup, run.micro_batch).total > usable:
        yield "lower JOB_TRAIN__MICRO_BATCH_TOKENS"
