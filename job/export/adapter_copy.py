"""The format `adapter:TYPE`: the published adapter with its numbers in 16 bits, in PEFT's layout, half as large.

Programs that load the adapter load this folder in the same way: PEFT converts it to fp32, vLLM to the dtype that it
serves in, llama.cpp's converter to the requested type. Only the rounding here changes numbers. So it is scored as PEFT
computes it: with the rounded numbers in fp32, on the base of the run.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from job.export.quantizable import CannotMake
from job.model.device import DTYPES

WEIGHTS_FILE = "adapter_model.safetensors"


def write_adapter_copy(files: Sequence[Path], folder: Path, kind: str) -> None:
    """Writes the copy: the same numbers give the same bytes.

    Args:
        files: Files of the published adapter, one of them `adapter_model.safetensors`; all others are copied unchanged.
        folder: Is made.
        kind: Dtype of the copy, `bf16` or `fp16`; numbers that are no floats keep theirs.

    Raises:
        CannotMake: A number is too large for it.
    """
    from safetensors.torch import load_file, save_file

    dtype = getattr(torch, DTYPES[kind])
    folder.mkdir(parents=True)
    for path in files:
        if path.name != WEIGHTS_FILE:
            shutil.copyfile(path, folder / path.name)
            continue
        rounded = {}
        for name, tensor in load_file(path).items():
            rounded[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            if not torch.isfinite(rounded[name]).all():
                raise CannotMake(f"{name} has numbers above {torch.finfo(dtype).max:g}, the largest of {kind}")
        save_file(rounded, folder / WEIGHTS_FILE, metadata={"format": "pt"})
