"""The content of a GGUF file, read with the package gguf of the extra `export`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any


def gguf_contents(file: Path) -> dict[str, Any]:
    """By type the numbers that are held in it (`types`), and the bits for each of them (`bits_per_weight`).

    Raises:
        ValueError, IndexError: It is no file of GGUF.
    """
    import gguf

    numbers: Counter[str] = Counter()
    held = 0
    for tensor in gguf.GGUFReader(file).tensors:
        numbers[tensor.tensor_type.name] += int(tensor.n_elements)
        held += int(tensor.n_bytes)
    return {"types": dict(sorted(numbers.items())), "bits_per_weight": round(8 * held / max(1, numbers.total()), 4)}


def quantized_tensors(file: Path) -> int:
    """How many tensors are held in blocks of integers."""
    import gguf

    plain = {gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16")}
    return sum(tensor.tensor_type not in plain for tensor in gguf.GGUFReader(file).tensors)
