"""Forecast of a run: steps, memory, disk, and for each GPU whether it fits, hours and dollars.

`forecast_input` describes the run, `forecast_memory` and `forecast_time` compute, `forecast_notes` writes what is said
of a GPU. The formulas are in `training.memory_model` and `time_model`, with their sources. Every estimate says whether
it is computed, measured or assumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from job.common.export_formats import GGUF, MERGED, find_format
from job.common.formatting import size
from job.common.resources import checkpoint_bytes, required_bytes
from job.planning import time_model
from job.planning.forecast_input import Basis, RunShape
from job.planning.forecast_memory import (
    answer_bytes,
    computed_in_tiles,
    execution_on,
    gpus_for_a_row,
    gpus_of_longest_row,
    largest_micro_batch,
    main_memory_bytes,
    original_base_bytes,
    peak_bytes,
    placed_on,
    quantized_base_bytes,
    run_on,
    scoring_bytes,
    training_memory,
)
from job.planning.forecast_notes import why_it_does_not_fit, why_slower
from job.planning.forecast_time import (
    CORES,
    converting_seconds,
    hours_of_run,
    llama_cpp_seconds,
    merging_seconds,
    quantizing_flops,
)
from job.planning.gpu_prices import Gpu
from job.training import memory_model
from job.training.execution_plan import FP8_CAPABILITY
from job.training.memory_model import LONG_ROW, Setup
from job.training.sequence_parallel import row_memory


@dataclass(frozen=True)
class Estimate:
    """A number and its basis: computed from known facts, measured by this command, or assumed."""

    name: str
    value: float
    unit: str
    basis: Basis
    note: str = ""


@dataclass(frozen=True)
class GpuForecast:
    """A run on GPUs of one kind: on one, or on all of the run's processes.

    `budget_recomputing` and `budget_keeping` are the largest micro-batches that fit, in tokens, with activations
    recomputed and kept; 0 where not even the longest example fits. `keeps` names what the job would keep in memory
    instead of recomputing it (base, activations); `hours` are computed for that, and `usd` for all `gpus` together.
    A run that trains nothing has budgets of 0, and keeps nothing.
    `usd_per_hour` is the price of one GPU, or of the run if it was set. `base_held` is the base's placement.
    `machine` is the cheapest that has as many GPUs, and the main memory where one is known to.
    """

    name: str
    memory_bytes: int
    fits: bool
    note: str
    keeps: str
    budget_recomputing: int
    budget_keeping: int
    hours: float | None
    usd_per_hour: float
    usd: float | None
    machine: str
    base_held: str = "gpu"
    divided_over: int = 1
    """Over how many GPUs the longest row is divided."""
    gpus: int = 1
    """How many share the work."""
    main_memory_needed: int = 0
    """Bytes of main memory that a machine must have for weights and activations that are kept there; 0 for none."""
    main_memory_enough: bool = True
    """Whether the machine is known to have them."""


def estimates(run: RunShape) -> Iterator[Estimate]:
    """Everything that does not depend on the GPU."""
    yield from _of_data(run)
    if run.setup is None:
        return
    setup, basis = run.setup, run.setup_basis
    if len(run.placements) == 1 and run.placements[0] != "gpu":
        setup = replace(setup, placement=run.placements[0], processes=run.processes)
    yield Estimate("base parameters", setup.architecture.parameters, "", basis)
    yield Estimate("adapter parameters", setup.adapter, "", basis)
    yield from _of_operations(run, setup)
    yield from _of_training_memory(run, setup) if run.trains else _of_loaded_memory(run, setup)
    yield from _of_evaluation(run, setup, _weaker(basis, run.questions_basis))
    if run.full_precision:
        peak = quantized_base_bytes(setup) + original_base_bytes(run, setup)
        yield Estimate("peak, unquantized base", peak, "bytes", basis, "left out where it does not fit")
    if run.trains:
        yield Estimate("checkpoint", checkpoint_bytes(setup.adapter, setup.optimizer), "bytes", basis)
    yield from _of_exports(run, setup, basis)
    disk_note = f"{size(run.download_bytes, ' ')} of it to fetch first"
    yield Estimate("disk", disk_bytes(run), "bytes", basis, disk_note)


def disk_bytes(run: RunShape) -> int:
    """Bytes of disk that the run needs; for an unknown model those of its data only."""
    trained = run.setup if run.trains else None
    checkpoint = checkpoint_bytes(trained.adapter, trained.optimizer) if trained else 0
    return required_bytes([run.download_bytes, run.export_bytes], checkpoint)


def _of_operations(run: RunShape, setup: Setup) -> Iterator[Estimate]:
    basis, weaker_basis = run.setup_basis, _weaker(run.setup_basis, run.workload_basis)
    if run.trains and run.workload is not None:
        flops = time_model.training_flops(setup, run.workload.tokens, run.workload.squares)
        yield Estimate("training", flops, "FLOP", weaker_basis, "with recomputation" if setup.recompute else "")
    if run.first_stage is not None and (before := run.first_stage.workload) is not None:
        flops = time_model.training_flops(setup, before.tokens, before.squares)
        yield Estimate("training, first stage", flops, "FLOP", _weaker(basis, run.first_stage.workload_basis))
    if run.validation is not None:
        held_out = run.validation
        validating = held_out.count * time_model.evaluation_flops(setup, held_out.tokens, held_out.target_tokens)
        yield Estimate("validation, all", validating, "FLOP", weaker_basis, "forward passes; an early stop saves some")
    if run.reference is not None:
        passes = time_model.evaluation_flops(setup, run.reference.tokens, run.reference.target_tokens)
        yield Estimate(
            "reference, once", passes, "FLOP", weaker_basis, "log-probabilities of all rows, before training"
        )
    if run.questions is not None:
        scoring = run.evaluations * time_model.evaluation_flops(setup, run.questions.tokens, run.questions.reads)
        times = {1: "once", 2: "twice"}.get(run.evaluations, f"{run.evaluations} times")
        note = "one of them by the unquantized base, where it fits" if run.full_precision else ""
        yield Estimate(f"evaluation, {times}", scoring, "FLOP", _weaker(basis, run.questions_basis), note)


def _of_training_memory(run: RunShape, setup: Setup) -> Iterator[Estimate]:
    basis, weaker_basis = run.setup_basis, _weaker(run.setup_basis, run.workload_basis)
    memory = training_memory(replace(run, divide=False), setup, run.micro_batch)
    yield from _of_loaded_memory(run, setup)
    yield Estimate("memory: gradients", memory.gradients, "bytes", basis, "fp32")
    yield Estimate("memory: optimizer", memory.optimizer, "bytes", basis, setup.optimizer)
    yield from _of_activations(run, setup, memory.activations, weaker_basis)
    yield Estimate(
        "peak in training",
        memory.total,
        "bytes",
        weaker_basis,
        f"+- {memory_model.MARGIN:.0%}, and the driver's context; with more memory, more is kept",
    )


def _of_loaded_memory(run: RunShape, setup: Setup) -> Iterator[Estimate]:
    memory = memory_model.training_memory(setup, 0)
    bits = "NF4, " if setup.quantization == "nf4" else ""
    elsewhere = {"sharded": f"; layers sharded over {run.processes} GPUs", "host": "; layers in main memory"}
    base_note = f"{bits}embedding and output layer unchanged{elsewhere.get(setup.placement, '')}"
    yield Estimate("memory: base", memory.weights, "bytes", run.setup_basis, base_note)
    yield Estimate("memory: adapter", memory.adapter, "bytes", run.setup_basis, "fp32, and autocast's copy")


def _of_activations(run: RunShape, setup: Setup, activations: int, basis: Basis) -> Iterator[Estimate]:
    handling = "recomputed" if setup.recompute else "kept"
    batch_note = f"{handling}, micro-batches of {run.micro_batch:,} tokens"
    if computed_in_tiles(run, run.micro_batch):
        batch_note = f"a row of {run.micro_batch:,} tokens, in tiles"
        if run.offload is not False:
            host = memory_model.long_row_host_bytes(setup, run.micro_batch, kept_attention=False)
            yield Estimate("main memory: activations", host, "bytes", basis, "where they do not fit on the GPU")
    yield Estimate("memory: activations", activations, "bytes", basis, batch_note)
    if (over := gpus_for_a_row(run, setup)) > 1 and computed_in_tiles(run, run.micro_batch):
        shared = row_memory(setup, run.micro_batch, over, offload=run.offload, copies=run.attention_copies).activations
        note = f"of each of {over} GPUs, if the row does not fit on one"
        yield Estimate("memory: activations, divided", shared, "bytes", basis, note)


def _of_evaluation(run: RunShape, setup: Setup, basis: Basis) -> Iterator[Estimate]:
    sequences_note = f"packed sequences of {run.scoring_budget:,} tokens"
    need = scoring_bytes(run, setup)
    if not run.trains:
        need = peak_bytes(run, setup)
        sequences_note += (
            ", by the merged model, which is not quantized" if run.merges and setup.quantization != "none" else ""
        )
    yield Estimate("peak in evaluation", need, "bytes", basis, sequences_note)
    prompt, tokens = run.answered
    if tokens:
        cache = size(memory_model.cache_bytes(setup, tokens), " ")
        note = f"a prompt of {prompt:,} tokens and {tokens - prompt:,} new ones; {cache} of it is the cache"
        yield Estimate("peak, answers", answer_bytes(run, setup), "bytes", basis, note)


def _of_exports(run: RunShape, setup: Setup, basis: Basis) -> Iterator[Estimate]:
    if run.merges:
        sizes = [f"merged {size(run.format_bytes(MERGED), ' ')}{', twice' if run.merges > 1 else ''}"]
        sizes += [f"{name} {size(run.format_bytes(name), ' ')}" for name in run.derived]
        note = f"{', '.join(sizes)}{'; one merge is published' if run.merges > 1 else ''}"
        yield Estimate("exported models", run.export_bytes, "bytes", basis, note)
        yield Estimate("merging", run.merges * merging_seconds(setup), "s", "assumed", "on one processor core")
    for name in run.derived:
        label = f"quantizing, {name}"
        if find_format(name).calibrated:
            yield Estimate(label, quantizing_flops(run, setup), "FLOP", "assumed", "by auto-round")
        else:
            yield Estimate(label, converting_seconds(name, setup), "s", "assumed", "on one processor core")
        if name.startswith(GGUF) and run.questions is not None:
            note = f"llama.cpp on {CORES} processor cores; the GPU waits"
            yield Estimate(f"scoring, {name}", llama_cpp_seconds(run, setup), "s", "assumed", note)


def _warmup_note(run: RunShape) -> str:
    """That a run of few steps ends before its learning rate has risen; else nothing."""
    if run.workload is None or run.workload.steps > run.warmup_steps:
        return ""
    what = f"the warmup takes {run.warmup_steps:,}: the learning rate never reaches its peak"
    return f"{what}; set JOB_TRAIN__WARMUP_RATIO=0.1"


def _of_data(run: RunShape) -> Iterator[Estimate]:
    if run.first_stage is not None and (before := run.first_stage.workload) is not None:
        basis = run.first_stage.workload_basis
        yield Estimate("examples, first stage", before.rows, "", basis)
        yield Estimate("optimizer steps, first stage", before.steps, "", basis, _warmup_note(run.first_stage))
        yield Estimate("tokens, first stage", before.tokens, "", basis, "all epochs")
    if run.trains and run.workload is not None:
        workload, basis = run.workload, run.workload_basis
        yield Estimate("examples", workload.rows, "", basis)
        yield Estimate("optimizer steps", workload.steps, "", basis, _warmup_note(run))
        yield Estimate("tokens", workload.tokens, "", basis, "all epochs")
        yield Estimate("target tokens", workload.target_tokens, "", basis, "tokens that the loss counts")
        yield Estimate("longest example", workload.longest, "tokens", basis)
        yield Estimate("largest step", workload.largest_step, "tokens", basis, "no micro-batch is larger")
    if run.validation is not None:
        yield Estimate("validation rows", run.validation.rows, "", run.workload_basis)
        yield Estimate("validations", run.validation.count, "", run.workload_basis, "before, during and after training")
    if run.questions is not None:
        yield Estimate("questions", run.questions.count, "", run.questions_basis)
    for auxiliary in run.auxiliary:
        yield Estimate(f"{auxiliary.name}, texts", auxiliary.texts, "", run.workload_basis)
        yield Estimate(f"{auxiliary.name}, tokens", auxiliary.tokens, "", "assumed", auxiliary.note)
        if auxiliary.flops is not None:
            yield Estimate(auxiliary.name, auxiliary.flops, "FLOP", "assumed", "by the size of the model's files")


def forecast_gpu(gpu: Gpu, run: RunShape, setup: Setup) -> GpuForecast:
    """Whether the run fits on a GPU, how long it takes and what it costs there."""
    needs_tiles = run.trains and run.tiles and run.workload is not None and run.workload.longest > LONG_ROW
    run = run_on(gpu, run, setup)
    setup = placed_on(gpu, run, setup)
    usable = memory_model.usable_bytes(gpu.memory_bytes)
    fits = peak_bytes(run, setup) <= usable and not (run.fp8 and gpu.capability < FP8_CAPABILITY)
    execution = execution_on(gpu, run, setup)
    hours = hours_of_run(gpu, run, setup, execution) if fits else None
    divided_over = gpus_of_longest_row(run, setup, usable) if fits and run.trains else 1
    held = main_memory_bytes(gpu, run, setup) if fits else 0
    rented = _rented(gpu, run, held)
    keeps = {"base": execution.kept_base, "activations": execution.kept_activations} if execution else {}
    if fits:
        note = why_slower(gpu, run, setup, execution, hours)
    else:
        note = why_it_does_not_fit(gpu, run, setup, needs_tiles=needs_tiles)
    return GpuForecast(
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        fits=fits,
        note=note,
        keeps=", ".join(name for name, is_kept in keeps.items() if is_kept) if fits and run.trains else "",
        budget_recomputing=_largest_budget(run, replace(setup, recompute=True), usable),
        budget_keeping=_largest_budget(run, replace(setup, recompute=False), usable),
        hours=hours,
        usd_per_hour=rented.usd_per_hour,
        usd=None if hours is None else hours * rented.usd_per_hour * rented.priced,
        machine=rented.name,
        base_held=setup.placement,
        divided_over=divided_over,
        gpus=run.processes,
        main_memory_needed=held,
        main_memory_enough=held <= rented.main_memory,
    )


@dataclass(frozen=True)
class _Rented:
    """What a run rents: its name, the price of an hour, for how many GPUs it is paid, main memory known to be there."""

    name: str
    usd_per_hour: float
    priced: int
    main_memory: int


def _rented(gpu: Gpu, run: RunShape, main_memory: int) -> _Rented:
    """The machines for a run that needs so many bytes of main memory on each; the user's, if their price is set."""
    if run.usd_per_hour is not None:
        return _Rented("your price", run.usd_per_hour, 1, 0)  # the price of all machines, of which no more is known
    machine = gpu.machine(run.processes_here, main_memory)
    if machine is None:
        largest = max(gpu.machines, key=lambda machine: machine.gpus)
        return _Rented(f"none with {run.processes_here} GPUs", largest.usd_per_gpu, run.processes, 0)
    known = machine.memory_for(run.processes_here) or 0
    return _Rented(machine.name_for(run.processes_here), machine.usd_per_gpu, run.processes, known)


def _largest_budget(run: RunShape, setup: Setup, usable: int) -> int:
    return largest_micro_batch(run, setup, usable) if run.trains else 0


def _weaker(*bases: Basis) -> Basis:
    """The basis of an estimate that combines several."""
    return "assumed" if "assumed" in bases else "computed"
