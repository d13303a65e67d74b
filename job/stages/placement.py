"""Chooses the placement of the base's 4-bit weights before they are loaded: as set, or the fastest that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from job.common.formatting import size
from job.common.gpu_context import CONTEXT_BYTES
from job.common.resources import available_bytes
from job.data.examples import lengths_of
from job.distributed.processes import Processes
from job.errors import Problem, raise_problems
from job.model.adapter_options import PLAIN, AdapterOptions
from job.model.architecture import read_config as read_architecture
from job.model.experts import left_plain
from job.model.files import read_config
from job.settings.schema import Lora, Model, Train
from job.stages.handoff import Sources
from job.training.execution_plan import AMPERE, choose_placement, longest_sequence
from job.training.gpu_capability import compute_capability
from job.training.gpu_memory import free_gpu_bytes
from job.training.memory_model import (
    LONG_ROW,
    MAIN_MEMORY_SHARE,
    PLACEMENTS,
    Setup,
    attention_copies,
    copies_in_main_memory,
    evaluation_bytes,
    packed_bytes,
    training_memory,
    usable_bytes,
)
from job.training.sequence_parallel import least_memory, why_not_divided


def decide_placement(
    model: Model,
    train: Train,
    lora: Lora,
    sources: Sources,
    processes: Processes,
    *,
    device: Any,
    budget: int,
    scoring_tokens: int,
    options: AdapterOptions,
) -> tuple[str, str]:
    """(placement of the base's 4-bit weights, one of `PLACEMENTS`, the same in all processes; why, if not `gpu`).

    Args:
        model: Settings of the base.
        train: Settings of training.
        lora: Settings of the adapter.
        sources: The base's folder, and the examples.
        processes: All processes of the run.
        device: The device of this process.
        budget: The token budget of a micro-batch.
        scoring_tokens: The most tokens of one forward pass that scores questions.
        options: The adapter's options.

    Raises:
        SettingsError: JOB_MODEL__PLACEMENT is `host`, but there is too little main memory.
    """
    requested, world, setup = model.placement, processes.place, None
    if model.quantization != "none":
        setup = setup_before_loading(model, train, lora, sources.folder, options)
    need = 0 if setup is None else packed_bytes(setup) * world.local_world_size
    # Read once on each machine: a process that read it later would count what another one has already loaded.
    available = processes.broadcast_on_machine("available main memory", available_bytes)
    free = int(MAIN_MEMORY_SHARE * available)
    raise_problems(_too_little_main_memory(requested, setup, world.local_world_size, available))
    if requested != "auto":
        return requested, "" if requested == "gpu" else f"JOB_MODEL__PLACEMENT is {requested}"
    placement, why = "gpu", ""
    if device.type == "cuda" and setup is not None and model.keep_dequantized is not True:
        setup = replace(
            setup,
            processes=world.world_size,
            recompute=train.gradient_checkpointing is not False,
            counted=_counted(lora, sources.folder, options),
        )
        # Between machines, gathering a layer over the network would take longer than copying it from main memory.
        one_machine = world.world_size > 1 and world.world_size == world.local_world_size
        possible = {"gpu": True, "sharded": one_machine, "host": need <= free}
        placement, why = _fastest_that_fits(
            setup,
            lengths_of(sources.examples),
            global_batch_size=train.global_batch_size,
            budget=budget,
            scoring_tokens=scoring_tokens,
            gigabytes=train.gpu_memory_gb,
            placements=[name for name in PLACEMENTS if possible[name]],
            tiles=setup.architecture.in_tiles
            and train.last_method == "sft"
            and lora.dropout == 0
            and options.not_fused is None,
            offload=None if (offload := train.offload_activations) == "auto" else offload,
            divide_over=divides_over(setup, train),
        )
    placement, why = max(
        processes.gather("placement", [placement, why]), key=lambda proposal: PLACEMENTS.index(proposal[0])
    )
    return placement, why


def placement_problems(
    model: Model, train: Train, lora: Lora, *, folder: Path, processes: int, options: AdapterOptions
) -> Iterator[Problem]:
    """Yields the problems of main memory that `decide_placement` would raise, as far as they can be known already.

    Args:
        model: Settings of the base.
        train: Settings of training.
        lora: Settings of the adapter.
        folder: Folder of the base's config.json.
        processes: Number of processes on this machine; each will have a copy.
        options: The adapter's.
    """
    if model.placement == "host":
        setup = setup_before_loading(model, train, lora, folder, options)
        yield from _too_little_main_memory(model.placement, setup, processes, available_bytes())


def _too_little_main_memory(requested: str, setup: Setup | None, processes: int, available: int) -> Iterator[Problem]:
    """The problem of a base that is set to be in main memory, if it does not fit into `available` bytes."""
    free = int(MAIN_MEMORY_SHARE * available)
    if setup is None or requested != "host" or packed_bytes(setup) * processes <= free:
        return
    copies = copies_in_main_memory(setup, processes)
    remaining = f"of {size(available, ' ')} that are left on this machine or in its container"
    usable = f"{remaining}, {size(free, ' ')} can safely be used"
    fix = "use gpu, fewer processes (JOB_RUN__PROCESSES), or a machine or container with more memory"
    yield Problem("JOB_MODEL__PLACEMENT", f"is host, and {copies}; {usable}; {fix}")


def _fastest_that_fits(
    setup: Setup,
    lengths: Sequence[int],
    *,
    global_batch_size: int,
    budget: int,
    scoring_tokens: int,
    gigabytes: float | None,
    placements: Sequence[str],
    tiles: bool = False,
    offload: bool | None = None,
    divide_over: int = 1,
) -> tuple[str, str]:
    """(the fastest placement with which training and scoring fit on this GPU; why, if not `gpu`).

    Args:
        setup: The model, its adapter, and how they will be trained.
        lengths: Tokens of each example.
        global_batch_size: Examples of a step.
        budget: The token budget of a micro-batch.
        scoring_tokens: The most tokens of one forward pass that scores questions.
        gigabytes: How much of the GPU may be used, in units of 1e9 bytes; None for all.
        placements: Those to choose from, of `PLACEMENTS`, the fastest first.
        tiles: As in `training_memory`.
        offload: As in `training_memory`.
        divide_over: How many processes may compute a long row together.
    """
    tokens = longest_sequence(lengths, global_batch_size, budget)
    tiles = tiles and max(lengths) > LONG_ROW and compute_capability() >= AMPERE
    copies = attention_copies(setup.architecture, compute_capability()) if tiles else 0

    def needs(sharded_setup: Setup) -> int:
        scoring = evaluation_bytes(sharded_setup, scoring_tokens, scoring_tokens // 2)
        if tiles and tokens > LONG_ROW:
            return max(least_memory(sharded_setup, tokens, divide_over, offload=offload, copies=copies).total, scoring)
        return max(training_memory(sharded_setup, tokens).total, scoring)

    memory = free_gpu_bytes(gigabytes) + CONTEXT_BYTES  # `usable_bytes` subtracts the context, which exists by now
    placement = choose_placement(setup, memory_bytes=memory, placements=placements, needs=needs)
    if placement == "gpu":
        return placement, ""
    need, usable = (size(number, " ") for number in (needs(setup), usable_bytes(memory)))
    return placement, f"with the base on the GPU the run would need {need}, and {usable} can safely be used"


def divides_over(setup: Setup, train: Train) -> int:
    """How many processes may compute a long row together: all of the setup's, or 1 (`training.sequence_parallel`)."""
    if train.sequence_parallel == "off" or train.neftune_noise_alpha > 0:
        return 1
    return 1 if why_not_divided(setup.architecture, setup.processes) else setup.processes


def setup_before_loading(model: Model, train: Train, lora: Lora, folder: Path, options: AdapterOptions) -> Setup | None:
    """The input of the memory formulas, before the base is loaded; None if they do not cover its architecture."""
    try:
        architecture = read_architecture(read_config(folder).to_dict())
    except ValueError:
        return None
    requested_targets = lora.target_modules
    targets = architecture.groups[requested_targets] if isinstance(requested_targets, str) else requested_targets
    rank = lora.rank if options.adalora is None else options.adalora.init_r
    return Setup(
        architecture=architecture,
        rank=2 * rank if options.decomposed else rank,
        targets=tuple(name for name in targets if name in architecture.linear),
        quantization=model.quantization,
        double_quantization=model.double_quantization,
        value_bytes=4 if model.dtype == "fp32" else 2,
        optimizer=train.optimizer,
        recompute=True,
        plain_experts=architecture.experts > 0 and left_plain(folder),
        expert_adapter=architecture.expert_adapter_parameters(rank, options.layers) if options.experts else 0,
        dora=options.use_dora,
        bytes_beside=options.bytes_beside,
        merged_rows=2 * architecture.vocabulary if options.added_tokens else 0,
    )


def _counted(lora: Lora, folder: Path, options: AdapterOptions) -> int | None:
    """The adapter's parameters by the model itself, where rank and targets do not say how many; else None.

    Of modules that are trained whole they may be gigabytes.
    """
    if options == PLAIN:
        return None
    from job.model.files import build_empty
    from job.model.lora import count_parameters

    empty = build_empty(folder, read_config(folder))
    return count_parameters(empty, rank=lora.rank, target_modules=lora.target_modules, options=options)
