"""What a checkpoint holds: adapter, optimizer, scheduler and progress on local disk, without a single pickle.

Tensors lie in safetensors and everything else in JSON, so that restoring one can run nobody's code. Floats survive both
exactly, which is what makes a resumed run the same run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job.records import StepMetrics

ADAPTER, OPTIMIZER, PROGRESS, METRICS = "adapter.safetensors", "optimizer.safetensors", "progress.json", "metrics.jsonl"


@dataclass(frozen=True)
class TrainerFiles:
    """The live objects of a trainer that a checkpoint is written from and restored into."""

    model: Any
    optimizer: Any
    scheduler: Any
    scaler: Any
    state: Any


def write_state(folder: Path, files: TrainerFiles, history: Sequence[StepMetrics]) -> None:
    """Writes the trainer's whole state into a new folder."""
    from safetensors.torch import save_file

    from job.model import trainable

    folder.mkdir(parents=True, exist_ok=True)
    adapter = {name: parameter.detach().contiguous() for name, parameter in trainable(files.model).items()}
    save_file(adapter, folder / ADAPTER)
    tensors, plain = _split(files.optimizer.state_dict())
    save_file(tensors, folder / OPTIMIZER)
    progress = {
        "step": files.state.global_step,
        "optimizer": plain,
        "scheduler": {key: value for key, value in files.scheduler.state_dict().items() if key != "lr_lambdas"},
        "scaler": files.scaler.state_dict() if files.scaler is not None else None,
    }
    (folder / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
    files.state.save_to_json(str(folder / "trainer_state.json"))  # Trainer reads its step from it
    write_metrics(folder / METRICS, history)


def read_state(folder: Path, files: TrainerFiles) -> list[StepMetrics]:
    """Restores what `write_state` wrote, bit by bit, into the trainer's live objects; returns the steps so far."""
    import torch
    from safetensors.torch import load_file

    from job.model import trainable

    saved = load_file(folder / ADAPTER)
    parameters = trainable(files.model)
    if saved.keys() != parameters.keys():
        raise ValueError(f"the checkpoint in {folder} is not of this model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    files.optimizer.load_state_dict(_join(load_file(folder / OPTIMIZER), progress["optimizer"]))
    files.scheduler.load_state_dict({**progress["scheduler"], "lr_lambdas": [None] * len(files.scheduler.base_lrs)})
    if files.scaler is not None and progress["scaler"] is not None:
        files.scaler.load_state_dict(progress["scaler"])
    return read_metrics(folder / METRICS)


def _split(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts an optimizer's state into tensors, named by their place (`3/state1`), and the rest, which JSON can hold."""
    import torch

    tensors: dict[str, Any] = {}

    def part(value: Any, place: str) -> Any:
        if isinstance(value, torch.Tensor):
            # a clone, because 8-bit optimizers share one quantization map between all parameters
            tensors[place] = value.detach().clone().contiguous()
            return None
        if isinstance(value, dict):  # bitsandbytes nests a parameter's quantized state
            return {str(key): part(item, f"{place}/{key}") for key, item in value.items()}
        return value

    plain = {str(index): part(values, str(index)) for index, values in state["state"].items()}
    return tensors, {"state": plain, "param_groups": state["param_groups"]}


def _join(tensors: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_split`."""
    for place, tensor in tensors.items():
        *parents, name = place.split("/")
        target = plain["state"]
        for parent in parents:
            target = target[parent]
        target[name] = tensor
    state = {int(index): values for index, values in plain["state"].items()}
    return {"state": state, "param_groups": plain["param_groups"]}


def write_metrics(path: Path, history: Sequence[StepMetrics]) -> None:
    """One JSON line a step."""
    path.write_text("".join(json.dumps(asdict(metrics)) + "\n" for metrics in history), encoding="utf-8")


def read_metrics(path: Path) -> list[StepMetrics]:
    """The inverse of `write_metrics`."""
    return [StepMetrics(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
