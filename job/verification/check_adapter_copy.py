"""Checks a copy of the adapter in another dtype: it has the adapter's files, and the adapter's numbers rounded.

`verify` does not import torch, so the rounding to bf16 and fp16 is computed on the bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from job.results.adapter_facts import WEIGHTS
from job.runs.layout import ADAPTER, EXPORT_CARD, RESULTS, SIGNATURE, export_folder
from job.verification.differences import MAX_SHOWN, Copies, Difference, find_differences

_NAMES = {"bf16": "BF16", "fp16": "F16"}
"""Type of a copy -> safetensors' name of the dtype."""


def adapter_files(export: Mapping[str, Any], copies: Copies) -> Iterator[Difference]:
    """How the files of a copy differ from the adapter's, apart from the dtype."""
    folder, kind = export_folder(export["format"]), export["format"].partition(":")[2]
    originals, files_of_copy = (
        {path.removeprefix(prefix): copy for path, copy in copies.items() if path.startswith(prefix)}
        for prefix in (ADAPTER, folder)
    )
    copy_names, original_names = (
        sorted(files.keys() - {EXPORT_CARD, SIGNATURE}) for files in (files_of_copy, originals)
    )
    yield from find_differences(f"{folder} files", copy_names, original_names)
    yield from find_differences(f"{RESULTS} exports {export['format']} dtype", export["dtype"], kind)
    for name in sorted({*copy_names} & {*original_names}):
        if name == WEIGHTS:
            yield from _tensors_differ(folder + name, files_of_copy[name], originals[name], kind)
        elif files_of_copy[name].read_bytes() != originals[name].read_bytes():
            yield Difference(folder + name, "the bytes of the adapter's own file", "other bytes")


def _tensors_differ(where: str, copy: Path, original: Path, kind: str) -> Iterator[Difference]:
    """The first tensor of a copy that is not the original's tensor rounded to `kind`."""
    from safetensors import SafetensorError

    try:
        copied, originals = _tensors(copy), _tensors(original)
        yield from find_differences(f"{where} tensors", sorted(copied), sorted(originals))
        for name in sorted(copied.keys() & originals.keys()):
            if copied[name] != _in_dtype(originals[name], _NAMES[kind]):
                yield Difference(f"{where} {name}", f"the adapter's numbers in {kind}", "other numbers")
                return
    except (SafetensorError, KeyError, ValueError) as error:
        yield Difference(where, "tensors", f"{type(error).__name__}: {str(error)[:MAX_SHOWN]}")


def _tensors(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> (dtype, shape, bytes)."""
    from safetensors import deserialize

    tensors = deserialize(file.read_bytes())  # type: ignore[no-untyped-call]
    return {name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"])) for name, tensor in tensors}


def _in_dtype(tensor: tuple[str, tuple[int, ...], bytes], dtype: str) -> tuple[str, tuple[int, ...], bytes]:
    """The tensor rounded to `dtype`, to nearest with ties to even; unchanged if its numbers are not floats."""
    own_dtype, shape, data = tensor
    if own_dtype not in {"F32", "BF16", "F16"} or own_dtype == dtype:
        return tensor
    numbers = _fp32(own_dtype, data)
    if dtype == "F16":
        with np.errstate(over="ignore"):  # a number too large for fp16 becomes infinite, and then differs
            return dtype, shape, numbers.astype("<f2").tobytes()
    bits = numbers.view("<u4").astype(np.uint64)  # bf16 is the upper half of fp32's bits
    return dtype, shape, ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()


def _fp32(dtype: str, data: bytes) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, "<f4" if dtype == "F32" else "<f2").astype("<f4")
