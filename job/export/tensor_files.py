"""The files of a model's weights: what is in them, and writing them, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from job.model.files import readable, weight_files

SHARD = 5_000_000_000
"""Most bytes of a file of weights: one file is in memory at a time, and an interrupted upload begins its file again."""
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""safetensors' names of dtypes."""


def read_headers(folder: Path) -> dict[str, tuple[Path, tuple[int, ...], torch.dtype]]:
    """File, shape and dtype by name of every tensor in a folder's files of weights.

    Raises:
        DataError: One cannot be read.
    """
    return {name: (file, shape, dtype) for file in weight_files(folder) for name, shape, dtype in _read_header(file)}


def _read_header(file: Path) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor in a file of weights.

    Raises:
        DataError: It cannot be read.
    """
    from safetensors import safe_open

    with readable(file.parent), safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        return [(name, tuple(part.get_shape()), _TYPES[part.get_dtype()]) for name, part in slices.items()]


def parameter_names(names: Iterable[str], empty: Any) -> dict[str, str]:
    """Name in the base's files -> name of the parameter that transformers loads it into unchanged.

    Without those that transformers makes a parameter of together with others.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(empty)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    state = empty.state_dict()
    parameters = {}
    for name in sorted(names):
        renamed, converted = rename_source_key(name, renamings, converters, empty.base_model_prefix, state)
        if converted is None:
            parameters[name] = renamed
    return parameters


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """A tensor of a file of weights.

    Raises:
        DataError: It cannot be read.
    """
    from safetensors import safe_open

    with readable(file.parent), safe_open(file, framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
        return tensor


def write_weights(
    folder: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensor: Callable[[str], torch.Tensor],
    *,
    check_stop: Callable[[], None],
) -> None:
    """Writes files of at most `SHARD` and their index, as transformers does; one file is in memory at any time.

    Args:
        folder: Exists.
        tensors: Shape and dtype by name.
        tensor: Makes the one of a name, contiguous on the CPU.
        check_stop: Called before each tensor; may raise what ends the job.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in tensors.items()}
    split = split_torch_state_dict_into_shards(empty, max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            check_stop()
            shard[name] = tensor(name)
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_other_files(source: Path, folder: Path) -> None:
    """Copies all files of a merged model but its weights and config.json, such as those of the tokenizer."""
    for path in sorted(source.iterdir()):
        if path.name != "config.json" and not path.name.startswith("model."):
            shutil.copyfile(path, folder / path.name)
