"""Where the base's 4-bit weights will lie: as set, or the fastest place where they fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from job.common.formatting import size
from job.common.resources import available_bytes
from job.data.examples import lengths_of
from job.distributed.processes import Processes
from job.errors import Problem, SettingsError
from job.model.adapter_options import AdapterOptions
from job.model.architecture import read_config as read_architecture
from job.model.files import read_config
from job.settings.schema import Lora, Model, Train
from job.stages.handoff import Sources
from job.training.memory_model import PLACES, Setup, packed_bytes
from job.training.prepare import place_base
from job.training.sequence_parallel import why_not_divided

MAIN_MEMORY_SHARE = 0.8
"""Of the main memory that is available, what the base's weights may fill; the rest is for the job itself. Assumed."""


def decide_place(
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
    """Where the base's 4-bit weights lie, the same in all processes, and why if not on the device; see `PLACES`.

    Args:
        model: Settings of the base.
        train: Settings of training.
        lora: Settings of the adapter.
        sources: The base's folder, and the examples.
        processes: Those of the run.
        device: That of this process.
        budget: Tokens of a micro-batch.
        scoring_tokens: Tokens that are scored in one forward pass.
        options: Of the adapter.

    Raises:
        SettingsError: JOB_MODEL__PLACEMENT cannot be.
    """
    asked, world, setup = model.placement, processes.place, _setup(model, train, lora, sources.folder, options)
    if asked == "sharded" and world.world_size == 1:
        what = "is sharded, and the run has one process; start several, each with its GPU, or take gpu or host"
        raise SettingsError([Problem("JOB_MODEL__PLACEMENT", what)])
    need = 0 if setup is None else packed_bytes(setup) * world.local_world_size
    free = int(MAIN_MEMORY_SHARE * available_bytes())
    short = f"the base's 4-bit weights take {size(need, ' ')} of main memory, and {size(free, ' ')} are safe to fill"
    if asked == "host" and need > free:
        what = f"is host, and {short}; take gpu, or a machine with more memory"
        raise SettingsError([Problem("JOB_MODEL__PLACEMENT", what)])
    if asked != "auto":
        return asked, "" if asked == "gpu" else f"JOB_MODEL__PLACEMENT is {asked}"
    place, why = "gpu", ""
    if device.type == "cuda" and setup is not None and model.keep_dequantized is not True:
        setup = replace(setup, processes=world.world_size)
        # Over a network between machines, gathering every layer would take longer than copying it from main memory.
        several = world.world_size > 1 and world.world_size == world.local_world_size
        possible = {"gpu": True, "sharded": several, "host": need <= free}
        place, why = place_base(
            setup,
            lengths_of(sources.examples),
            global_batch_size=train.global_batch_size,
            budget=budget,
            scoring_tokens=scoring_tokens,
            gigabytes=train.gpu_memory_gb,
            places=[place for place in PLACES if possible[place]],
            tiles=setup.architecture.in_tiles
            and train.last_method == "sft"
            and lora.dropout == 0
            and options.not_fused is None,
            offload=None if (offload := train.offload_activations) == "auto" else offload,
            divide_over=divides_over(setup, train),
        )
    place, why = max(processes.gather("place of the base", [place, why]), key=lambda found: PLACES.index(found[0]))
    return place, why


def divides_over(setup: Setup, train: Train) -> int:
    """How many processes may compute a long row together, of those of the setup; see `training.sequence_parallel`."""
    if train.sequence_parallel == "off" or train.neftune_noise_alpha > 0:
        return 1
    return 1 if why_not_divided(setup.architecture, setup.processes) else setup.processes


def _setup(model: Model, train: Train, lora: Lora, folder: Path, options: AdapterOptions) -> Setup | None:
    """The memory formulas' input before the base is loaded; None where they do not cover it, or it is not quantized."""
    if model.quantization == "none":
        return None
    try:
        architecture = read_architecture(read_config(folder).to_dict())
    except ValueError:
        return None
    named = lora.target_modules
    targets = architecture.groups[named] if isinstance(named, str) else named
    return Setup(
        architecture=architecture,
        rank=lora.rank if options.adalora is None else options.adalora.init_r,
        targets=tuple(name for name in targets if name in architecture.linear),
        quantization=model.quantization,
        double_quantization=model.double_quantization,
        value_bytes=4 if model.dtype == "fp32" else 2,
        optimizer=train.optimizer,
        recompute=True,
    )
