"""Whether the tensors of one safetensors file are those of another, rounded to 16 bits."""

from __future__ import annotations

from pathlib import Path

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def first_not_rounded(copy: Path, original: Path, kind: str) -> str | None:
    """The name of the first tensor of a copy that is not the original's in the other dtype; None if there is none.

    Raises:
        SafetensorError: A file is broken.
        KeyError: `kind` is no dtype of 16 bits.
    """
    from safetensors import safe_open

    dtype = DTYPES[kind]
    with safe_open(copy, framework="pt") as one, safe_open(original, framework="pt") as other:
        if only := {*one.keys()} ^ {*other.keys()}:
            return str(min(only))
        for name in sorted(one.keys()):
            found, whole = one.get_tensor(name), other.get_tensor(name)
            wanted = whole.to(dtype) if whole.is_floating_point() else whole
            if found.dtype != wanted.dtype or not torch.equal(found, wanted):
                return str(name)
    return None
