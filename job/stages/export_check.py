"""Checks, before training and again before the merge, that a run can be exported as its settings ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job import log
from job.common.export_formats import (
    GGUF,
    MERGED,
    derived,
    find_format,
    split_name,
    weights_bytes,
)
from job.common.formatting import size
from job.common.resources import available_bytes, check_disk, required_bytes
from job.errors import Problem, SettingsError, Unreachable
from job.export.exported_model import gpu_bytes
from job.export.merge_plan import Candidates, candidates
from job.export.model_checks import file_problems, format_problems
from job.export.quantizable import quantizable
from job.export.tensor_files import SHARD
from job.model.files import build_empty, read_config
from job.runs.attempt import Attempt
from job.settings.schema import Export
from job.stages.handoff import Loaded
from job.storage.hub import MAX_FILE_BYTES


@dataclass(frozen=True)
class ExportSizes:
    """The merges that will be made, and the estimated bytes of all formats that are made from one of them."""

    merges: Candidates
    derived_bytes: int


def check_export(attempt: Attempt, options: Export, gate_format: str, original: Path, loaded: Loaded) -> ExportSizes:
    """Refuses before training what cannot be exported after it; returns what will be made.

    Args:
        attempt: Its work folder will hold the merged models.
        options: Settings of the export: formats, and what to merge onto.
        gate_format: `JOB_GATE__ON`, the format that the gate judges, or `adapter`.
        original: Folder of the base's own files.
        loaded: The model, with any adapter.

    Raises:
        SettingsError: The base or the adapter cannot be exported as requested, or the gate judges a format that this
            machine cannot score.
        DataError: The base's files cannot be read.
        Unreachable: The disk or the memory is too small.
    """
    names = derived(options.formats)
    merges = candidates(loaded.model, original, options.merge_onto)
    problems, sizes = list[Problem](), dict[str, int]()
    if names:
        empty = build_empty(original, read_config(original))
        sizes = {name: _bytes(name, empty, merges.bytes_each) for name in names}
        problems += format_problems(empty, names, gate_format, loaded.model.device)
        problems += file_problems(names, original, attempt.check_stop)
    if problems:
        raise SettingsError(problems)
    for name in names if options.hub else ():
        if name.startswith(GGUF) and sizes[name] > MAX_FILE_BYTES:
            log.get_logger().warning(
                "the hub may refuse a file of this size",
                export=name,
                bytes=sizes[name],
                most=MAX_FILE_BYTES,
                change="a smaller GGUF type in JOB_EXPORT__FORMATS",
            )
    check_disk(attempt.work, required_bytes([len(merges.names) * merges.bytes_each, *sizes.values()]))
    _check_memory(loaded.model, merges.bytes_each, sizes)
    return ExportSizes(merges, sum(sizes.values()))


def check_least_size(work: Path, empty: Any, formats: Sequence[str], device: Any) -> None:
    """Refuses exports that are too large even in 16 bits, the least that a merged model is written in.

    Args:
        work: The folder that they will be written to.
        empty: The base on the meta device.
        formats: `JOB_EXPORT__FORMATS`, with at least one that needs the merge.
        device: The device on which they are scored.

    Raises:
        Unreachable: The disk, or the GPU's memory, is too small. A retry may get a larger machine.
    """
    merged = 2 * sum(parameter.numel() for parameter in empty.parameters())
    if device.type == "cuda":
        check_gpu_memory(device, merged)
    check_disk(work, required_bytes([merged, *(_bytes(name, empty, merged) for name in derived(formats))]))


def check_gpu_memory(device: Any, merged_bytes: int) -> None:
    """Refuses a merged model whose weights alone take more than the whole GPU, on which it is scored.

    Args:
        device: The GPU.
        merged_bytes: Lower bound of the bytes of the merged model.

    Raises:
        Unreachable: It does not fit. A retry may get a machine with more memory.
    """
    if (total := gpu_bytes(device)) < merged_bytes:
        raise Unreachable(
            f"the merged model takes {size(merged_bytes, ' ')} of the GPU's memory to be scored, which has "
            f"{size(total, ' ')}; use a larger GPU, or leave JOB_EXPORT__FORMATS empty and merge on another machine"
        )


def _bytes(name: str, empty: Any, merged_bytes: int) -> int:
    """Estimated bytes of an export format; `empty` is the model without weights, `merged_bytes` those of the merged."""
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    linear = sum(empty.get_submodule(layer).weight.numel() for layer in quantizable(empty))
    return weights_bytes(name, linear, parameters - linear, plain=round(merged_bytes / parameters))


def _check_memory(model: Any, merged_bytes: int, sizes: Mapping[str, int]) -> None:
    """Refuses formats whose weights alone do not fit into memory after training, when the model is freed.

    Args:
        model: The model that will be freed.
        merged_bytes: Bytes of the merged model.
        sizes: Bytes of each format that is made from the merged model.

    Raises:
        Unreachable: The memory is too small. A retry may get a machine with more memory.
    """
    on_gpu = model.device.type == "cuda"
    # (bytes that are held at once while a format is made or scored, the format)
    needed_bytes = [(min(SHARD, merged_bytes), MERGED) if on_gpu else (merged_bytes, MERGED)]
    for name, format_bytes in sizes.items():
        if find_format(name).calibrated:
            needed_bytes.append((merged_bytes, name))
        elif split_name(name)[0] == GGUF:  # on the processor
            needed_bytes.append((format_bytes, name))
    if on_gpu:
        check_gpu_memory(model.device, merged_bytes)
    freed_bytes = 0 if on_gpu else sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    need, name = max(needed_bytes)
    if (free := available_bytes() + freed_bytes) < need:
        raise Unreachable(
            f"JOB_EXPORT__FORMATS: {name} takes {size(need, ' ')} of this machine's memory, and {size(free, ' ')} are "
            "free; give the machine or the pod more memory, or remove the format"
        )
