"""What a checkpoint holds: adapter, optimizer, scheduler and progress on local disk, without a single pickle.

Tensors are kept in safetensors and everything else in JSON, so restoring a checkpoint runs no code from its files. Both
formats keep floats exactly, so a resumed run computes the same numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from job.checkpoints import optimizer_state
from job.common.validation import adapter_of
from job.errors import TrainingFailed
from job.records import StepMetrics, ValidationMetrics

ADAPTER, OPTIMIZER, PROGRESS, METRICS = "adapter.safetensors", "optimizer.safetensors", "progress.json", "metrics.jsonl"
TRAINER = "trainer_state.json"  # Trainer reads its step from it, under this name
ADALORA = "adalora.safetensors"
"""The state of AdaLoRA's allocator, for adapters of that kind."""
FILES = frozenset({ADAPTER, OPTIMIZER, PROGRESS, METRICS, TRAINER})
VALIDATIONS, BEST = "validation.jsonl", "best.safetensors"
OPTIONAL = frozenset({VALIDATIONS, BEST})
"""In checkpoints of runs that validate: the validations so far; and the adapter of the best of them where that is kept
and is not the checkpoint's own."""

_MOST_TOKENS, _MOST_PROCESSES = 1 << 24, 1_000_000
"""What a checkpoint may say at most of a row's or a sequence's tokens, and of processes."""
_EMPTY_SEGMENTS = 64
"""How many more segments than tokens a padded sequence may have; generous, since versions round up differently."""

T = TypeVar("T")


@dataclass(frozen=True)
class ComputationOptions:
    """What determines the last bits of a gradient besides recipe, software and hardware.

    `forward` and `tile_tokens` are those of `records.ExecutionPlan`. `padded` has the shapes (length, segments) that
    packed sequences are padded to with the token budget of the newest step; None where none is padded.
    """

    forward: str
    tile_tokens: int | None
    processes: int
    padded: list[tuple[int, int]] | None
    divided_above: int | None = None
    """Of how many tokens a row was the longest that one process computed; None where none was divided."""


@dataclass(frozen=True)
class _Progress:
    """What `progress.json` holds; `optimizer` is what `optimizer_state.split` leaves besides the tensors.

    `computed` is None in checkpoints of older versions.
    """

    step: int
    optimizer: _PlainOptimizer
    scheduler: dict[str, Any]
    scaler: dict[str, Any] | None
    computed: ComputationOptions | None = None


@dataclass(frozen=True)
class _PlainOptimizer:
    state: dict[str, dict[str, Any]]
    param_groups: list[dict[str, Any]]
    tensors: list[str]


@dataclass(frozen=True)
class TrainerFiles:
    """The live objects of a trainer that a checkpoint is written from and restored into."""

    model: Any
    optimizer: Any
    scheduler: Any
    scaler: Any
    state: Any
    optimizer_name: str | None = None
    """A key of `OPTIMIZERS`; None where any of them may have written the checkpoint."""


def write_trainer_state(
    folder: Path, files: TrainerFiles, history: Sequence[StepMetrics], computed: ComputationOptions | None = None
) -> None:
    """Writes a checkpoint of the trainer's live objects into a new folder."""
    from safetensors.torch import save_file

    from job.model.adalora import allocator_state, is_adalora
    from job.model.lora import trainable

    folder.mkdir(parents=True, exist_ok=True)
    adapter = {name: parameter.detach().contiguous() for name, parameter in trainable(files.model).items()}
    save_file(adapter, folder / ADAPTER)
    tensors, plain = optimizer_state.split(files.optimizer.state_dict())
    save_file(tensors, folder / OPTIMIZER)
    progress = {
        "step": files.state.global_step,
        "optimizer": plain,
        "scheduler": {key: value for key, value in files.scheduler.state_dict().items() if key != "lr_lambdas"},
        "scaler": files.scaler.state_dict() if files.scaler is not None else None,
        "computed": None if computed is None else asdict(computed),
    }
    (folder / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
    if is_adalora(files.model):
        save_file(allocator_state(files.model), folder / ADALORA)
    files.state.save_to_json(str(folder / TRAINER))
    write_metrics(folder / METRICS, history)


def read_trainer_state(folder: Path, files: TrainerFiles) -> list[StepMetrics]:
    """Restores what `write_trainer_state` wrote, bit by bit, into the trainer's live objects; returns the steps so far.

    Raises:
        TrainingFailed: AdaLoRA in bf16 or fp16 by an older version, which cannot go on; nothing was restored.
        ValueError: It is of another model; nothing was restored.
    """
    import torch
    from safetensors.torch import load_file

    from job.model.adalora import is_adalora, restore_allocator
    from job.model.lora import trainable

    saved = load_file(folder / ADAPTER)
    parameters = trainable(files.model)
    if any(".ranknum." in name for name in saved.keys() - parameters.keys()):
        # Its optimizer state is numbered with them, and the adapter was scaled otherwise than the published one.
        what = "an older version wrote the checkpoint, and trained a constant of AdaLoRA that is not published"
        raise TrainingFailed(f"{what}; start a new run with another JOB_RUN__ID")
    # Shapes too: copying would stretch a single number over a whole matrix.
    if {name: tensor.shape for name, tensor in saved.items()} != {name: p.shape for name, p in parameters.items()}:
        raise ValueError(f"the checkpoint in {folder} is not of this model")
    progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    tensors = load_file(folder / OPTIMIZER)
    shapes = [parameter.shape for group in files.optimizer.param_groups for parameter in group["params"]]
    optimizer_state.check_fit(tensors, progress["optimizer"], shapes, files.optimizer_name)
    if is_adalora(files.model):
        if not (folder / ADALORA).is_file():
            raise ValueError(f"the checkpoint in {folder} is not of an adapter of the kind adalora")
        restore_allocator(files.model, load_file(folder / ADALORA))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    files.optimizer.load_state_dict(optimizer_state.join(tensors, progress["optimizer"]))
    files.scheduler.load_state_dict({**progress["scheduler"], "lr_lambdas": [None] * len(files.scheduler.base_lrs)})
    if files.scaler is not None and progress["scaler"] is not None:
        files.scaler.load_state_dict(progress["scaler"])
    return read_metrics(folder / METRICS)


def read_computation_options(folder: Path) -> ComputationOptions | None:
    """How the gradients of a checkpoint were computed; None if an older version wrote it."""
    return _parse_as(_Progress, folder / PROGRESS).computed


def write_validations(
    folder: Path, validations: Sequence[ValidationMetrics], best: Mapping[str, Any] | None = None
) -> None:
    """Adds the validations so far to a checkpoint, and the adapter of the best one where it is not the checkpoint's."""
    from safetensors.torch import save_file

    write_metrics(folder / VALIDATIONS, validations)
    if best is not None:
        save_file(dict(best), folder / BEST)


def read_validations(folder: Path) -> tuple[list[ValidationMetrics], dict[str, Any] | None]:
    """The inverse of `write_validations`.

    Raises:
        ValueError: The checkpoint has no validations, or the adapter is of another model than its own.
    """
    from safetensors.torch import load_file

    if not (folder / VALIDATIONS).exists():
        raise ValueError(f"the checkpoint in {folder} has no validations")
    validations = [
        ValidationMetrics(**json.loads(line)) for line in (folder / VALIDATIONS).read_text("utf-8").splitlines()
    ]
    return validations, load_file(folder / BEST) if (folder / BEST).exists() else None


def validate_trainer_state(folder: Path, step: int) -> None:
    """Checks, without a model, that a downloaded checkpoint is of `step` and that `read_trainer_state` can read it.

    Raises:
        ValueError: What is wrong with it.
    """
    from transformers import TrainerState

    if (names := {path.name for path in folder.iterdir()} - OPTIONAL - {ADALORA}) != FILES:
        raise ValueError(f"missing or unexpected files in the checkpoint: {', '.join(sorted(names ^ FILES))}")
    _tensor_names(folder / ADAPTER)
    if (folder / ADALORA).exists():
        _tensor_names(folder / ADALORA)
    progress = _parse_as(_Progress, folder / PROGRESS)
    if progress.computed is not None:
        _check_computed(progress.computed)
    optimizer_state.check_places(_tensor_names(folder / OPTIMIZER), asdict(progress.optimizer))
    _parse_as(dict[str, Any], folder / TRAINER)
    _parse_as(list[StepMetrics], folder / METRICS)
    try:
        trainer = TrainerState.load_from_json(str(folder / TRAINER))
        history = read_metrics(folder / METRICS)
    except TypeError as error:
        raise ValueError(f"{TRAINER} or {METRICS} has a field that is unknown: {error}") from None
    _check_validations(folder, step)
    if not progress.step == trainer.global_step == step:
        raise ValueError(f"it is of step {progress.step}")
    if [metrics.step for metrics in history] != list(range(1, step + 1)):
        raise ValueError(f"its metrics are not of steps 1 to {step}")
    _check_budget(history, METRICS)


def _check_computed(computed: ComputationOptions) -> None:
    """Checks the numbers that a resumed run computes with.

    Raises:
        ValueError: One of them cannot be.
    """
    numbers = {
        "processes": (computed.processes, _MOST_PROCESSES),
        "tile_tokens": (computed.tile_tokens, _MOST_TOKENS),
        "divided_above": (computed.divided_above, _MOST_TOKENS),
    }
    for name, (number, most) in numbers.items():
        if number is not None and not 1 <= number <= most:
            raise ValueError(f"{PROGRESS} has {name} {number}, which must be from 1 to {most}")
    shapes = computed.padded or []
    lengths = [length for length, _ in shapes]
    if lengths != sorted(set(lengths)) or not all(
        0 < length <= _MOST_TOKENS and 0 < segments <= length + _EMPTY_SEGMENTS for length, segments in shapes
    ):
        raise ValueError(f"{PROGRESS} has impossible shapes of padded sequences: {shapes[:3]}")


def _check_budget(metrics: Sequence[StepMetrics] | Sequence[ValidationMetrics], name: str) -> None:
    """Checks the token budget that a resumed run continues with: the newest one.

    Raises:
        ValueError: It is missing, or cannot be.
    """
    token_budget = metrics[-1].measured.get("micro_batch_tokens", 0) if metrics else None
    if token_budget is not None and not 1 <= token_budget < math.inf:
        raise ValueError(f"{name} has no micro_batch_tokens of at least 1 in its last line")


def _check_validations(folder: Path, step: int) -> None:
    """Checks that validations can be read, and that the best adapter fits the checkpoint's own.

    Raises:
        ValueError: What is wrong.
    """
    if (folder / VALIDATIONS).exists():
        validations = _parse_as(list[ValidationMetrics], folder / VALIDATIONS)
        steps = [metrics.step for metrics in validations]
        if not steps or steps != sorted(set(steps)) or not 0 <= steps[0] <= steps[-1] <= step:
            raise ValueError(f"the steps of its validations do not rise, or go beyond {step}")
        _check_budget(validations, VALIDATIONS)
    if (folder / BEST).exists() and _shapes(folder / BEST) != _shapes(folder / ADAPTER):
        raise ValueError(f"{BEST} and {ADAPTER} have different tensors")


def _tensor_names(path: Path) -> list[str]:
    """Reads the header of a safetensors file, which must describe the whole file.

    Raises:
        ValueError: It is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a safetensors file: {error}") from None


def _shapes(path: Path) -> dict[str, tuple[Any, ...]]:
    """Shape and dtype by name of the tensors in a file, whose header must describe the whole file."""
    from safetensors import safe_open

    names = _tensor_names(path)
    with safe_open(path, framework="pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in names}
        return {name: (*part.get_shape(), part.get_dtype()) for name, part in slices.items()}


def _parse_as(kind: type[T], path: Path) -> T:
    """Reads a file of JSON, or of JSON lines.

    Raises:
        ValueError: It does not hold a `kind`.
    """
    data = path.read_bytes()
    if path.suffix == ".jsonl":
        data = b"[" + b",".join(data.splitlines()) + b"]"
    try:
        return adapter_of(kind).validate_json(data)
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read: {str(error)[:200]}") from None


def write_metrics(path: Path, history: Sequence[StepMetrics] | Sequence[ValidationMetrics]) -> None:
    """One JSON line a step, or a validation; metrics of preferences only where there are any."""
    lines = ({name: value for name, value in asdict(m).items() if name != "preference" or value} for m in history)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_metrics(path: Path) -> list[StepMetrics]:
    """The inverse of `write_metrics`."""
    return [StepMetrics(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
