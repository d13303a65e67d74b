"""The names of the formats that a run can export: one table that settings, plan, stage, report and `verify` read.

How they are made, loaded and scored is in `job/export/formats.py`, which says how to add one.

No torch: the names are among the settings, which must answer before torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec

MERGED = "merged"
ADAPTER = "adapter"
GGUF = "gguf"
EXTRA = ".[export]"
"""What `pip install` gets, in the repository, for the formats that are made from the merged model. No package index has
this project: there `qlora-job` would be somebody else's package."""


@dataclass(frozen=True)
class ExportFormat:
    """The properties of a format that are known without making it.

    Attributes:
        title: In words, for the report.
        bits: Bits of a quantized weight with its share of the scales, to estimate bytes; 0 if its types say so.
        modules: Python modules that it needs beyond those of the job; all are installed by `EXTRA`.
        types: Those that may follow its name and a colon, as in `gguf:q4_k_m`; one has to, if there are any. With the
            bits of a weight, as above.
        calibrated: Whether it is made with rows of the training data.
    """

    title: str
    bits: float = 16.0
    modules: tuple[str, ...] = ()
    types: Mapping[str, float] = field(default_factory=dict)
    calibrated: bool = False


_FOUR_BIT = ("auto_round", "compressed_tensors")

EXPORT_FORMATS: Mapping[str, ExportFormat] = {
    MERGED: ExportFormat("the whole model, with the adapter added to its weights"),
    ADAPTER: ExportFormat("the adapter with its numbers in 16 bits", types={"bf16": 16, "fp16": 16}),
    "fp8": ExportFormat("8-bit floats, FP8_DYNAMIC of compressed-tensors", 8.1, ("compressed_tensors",)),
    "w4a16": ExportFormat("4-bit integers, W4A16 of compressed-tensors", 4.2, _FOUR_BIT, calibrated=True),
    "gptq": ExportFormat("4-bit integers in the layout of GPTQ", 4.3, _FOUR_BIT, calibrated=True),
    "awq": ExportFormat("4-bit integers in the layout of AWQ", 4.3, _FOUR_BIT, calibrated=True),
    "gguf": ExportFormat(
        "one file for llama.cpp",
        0,
        ("auto_round", "gguf", "xllamacpp"),
        {
            "f16": 16,
            "bf16": 16,
            "q8_0": 8.5,
            "q6_k": 6.6,
            "q5_k_m": 5.8,
            "q5_k_s": 5.6,
            "q4_k_m": 5.0,
            "q4_k_s": 4.7,
            "q4_0": 4.7,
        },
    ),
}
"""All but `merged` and `adapter` are made from the merged model."""

_GGUF_HEAD = 6.6
"""Bits that llama.cpp holds a head in at least: Q6_K."""


def split_name(name: str) -> tuple[str, str]:
    """The format and its type: `gguf:q4_k_m` -> (`gguf`, `q4_k_m`), `merged` -> (`merged`, ``).

    Raises:
        ValueError: There is no such format, or no such type of it.
    """
    family, colon, kind = name.partition(":")
    found = EXPORT_FORMATS.get(family)
    if found is None or (bool(colon) and not found.types):
        raise ValueError(f"must be of {', '.join(all_names())}")
    if found.types and kind not in found.types:
        raise ValueError(f"must have a type of {family} after the colon: one of {', '.join(found.types)}")
    return family, kind


def find_format(name: str) -> ExportFormat:
    """The entry of a format, with or without a type.

    Raises:
        ValueError: As `split_name`.
    """
    return EXPORT_FORMATS[split_name(name)[0]]


def weights_bytes(name: str, linear: int, others: int, *, plain: int = 2) -> int:
    """Estimated bytes of the weights of a whole model in a format.

    Args:
        name: The format, with its type.
        linear: Weights of the linear layers that are quantized.
        others: All other weights: embedding, head, norms.
        plain: Bytes of one that is not quantized.
    """
    family, kind = split_name(name)
    export_format = EXPORT_FORMATS[family]
    if family == MERGED:
        return plain * (linear + others)
    if family == GGUF:  # holds the embedding and the head in blocks too, one of them in finer ones
        return int((export_format.types[kind] * linear + max(export_format.types[kind], _GGUF_HEAD) * others) / 8)
    return int(export_format.bits * linear / 8) + plain * others


def all_names() -> list[str]:
    """Every value of a format, with a placeholder where a type has to follow."""
    return [f"{name}:TYPE" if found.types else name for name, found in EXPORT_FORMATS.items()]


def is_adapter(name: str) -> bool:
    """Whether a format is a copy of the adapter, and no whole model."""
    return name.partition(":")[0] == ADAPTER


def adapter_copies(names: Iterable[str]) -> list[str]:
    """Those of the names that are copies of the adapter, in their order."""
    return [name for name in names if is_adapter(name)]


def derived(names: Iterable[str]) -> list[str]:
    """Those of the names that are made from the merged model, in their order."""
    return [name for name in names if name != MERGED and not is_adapter(name)]


def needs_merge(names: Iterable[str]) -> bool:
    """Whether the adapter is merged for these: for whole models."""
    return not all(map(is_adapter, names))


def to_make(names: Iterable[str]) -> list[str]:
    """The formats that are made and scored for the requested ones, in the order of the work.

    First the copies of the adapter, for which the run's own base is still in memory; then `merged`, whether or not it
    was requested, since the others are made from it.
    """
    asked = list(names)
    return [*adapter_copies(asked), *([MERGED, *derived(asked)] if needs_merge(asked) else [])]


def not_installed(names: Iterable[str]) -> list[str]:
    """The modules that these formats need and that are not installed."""
    needed = {module for name in names for module in find_format(name).modules}
    specs = {module: find_spec(module) for module in sorted(needed)}
    return [module for module, spec in specs.items() if spec is None or spec.origin is None]
