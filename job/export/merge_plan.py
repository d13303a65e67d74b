"""What a merge writes: which tensors of the base's files, from which module and in which dtype; and refusals.

The result has the names, the shapes and the other tensors of the base's own files, so that what loads the base loads
it. What cannot be merged is refused before training, with the setting to change. `merge` computes and writes it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from job.errors import Problem, SettingsError
from job.export.tensor_files import parameter_names, read_headers
from job.export.whole_parameters import WholeParameter, grown_vocabulary, trained_whole, why_not_grown
from job.model.experts import expert_tensors, packed
from job.model.files import MAX_CONFIG_BYTES, build_empty, quantization_method, read_config, read_json
from job.model.load_base import dtype_by_name, is_quantized

ORIGINAL, DEQUANTIZED, BEST = "original", "dequantized", "best"
ADAPTER = "default"
"""PEFT's name of the adapter."""
_ROUNDED = {torch.float32, torch.float64}
"""Dtypes of a base's files that are not kept: its weights are rounded to the dtype that the run computes in."""


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of the result: its name and file among the base's files, and the dtype that it is written in.

    `module` is the full name of the loaded model's module whose weight it is, if that is adapted or quantized.
    `transposed` is whether it lies in the file as (inputs, outputs), as GPT-2's do. `whole` is the name of a parameter
    that was trained whole, or in some of its rows, and takes this one's place.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    module: str | None
    transposed: bool
    whole: str | None = None


@dataclass(frozen=True)
class MergePlan:
    """What is written: the tensors in the order of the base's files, and the dtype of most of them.

    `vocabulary` are the rows of the embedding, if new tokens made it larger than the base's.
    """

    source: Path
    tensors: tuple[MergedTensor, ...]
    dtype: torch.dtype
    vocabulary: int | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self.tensors)


@dataclass(frozen=True)
class Candidates:
    """The ways to make a format, the bytes that each takes, and why there is only one of them, where that is so."""

    names: tuple[str, ...]
    bytes_each: int
    only: str = ""


def candidates(model: Any, source: Path, onto: str) -> Candidates:
    """The weights to merge onto; refuses what cannot be merged, or a value of the setting without effect.

    Args:
        model: The PEFT model.
        source: Folder of the base's own files.
        onto: JOB_EXPORT__MERGE_ONTO.

    Raises:
        SettingsError: With all problems.
        DataError: The base's files cannot be read.
    """
    base = model.get_base_model()
    in_four_bits = any(is_quantized(module.weight) for _, module in adapted_or_quantized(base))
    published_quantized = quantization_method(read_json(source / "config.json", MAX_CONFIG_BYTES)) is not None
    experts = any(packed(module, name) is not None for _, module, name in expert_tensors(base))
    if why := why_not_onto(onto, published_quantized=published_quantized, quantized=in_four_bits, experts=experts):
        raise _refused(why, "merge_onto")
    size = plan_merge(model, source).bytes
    if onto != BEST:
        return Candidates((onto,), size, f"JOB_EXPORT__MERGE_ONTO is {onto}")
    if not in_four_bits:
        return Candidates((ORIGINAL,), size, "no weight of the base is quantized")
    if published_quantized:
        return Candidates((DEQUANTIZED,), size, "the base is only published quantized")
    if experts:
        return Candidates(
            (ORIGINAL,), size, "experts of a mixture can only be written in the layout of the original base"
        )
    return Candidates((ORIGINAL, DEQUANTIZED), size)


def why_not_onto(onto: str, *, published_quantized: bool, quantized: bool, experts: bool) -> str:
    """Why JOB_EXPORT__MERGE_ONTO cannot be what it is; empty if it can.

    Args:
        onto: The setting.
        published_quantized: Whether the base's own files are quantized.
        quantized: Whether weights of the loaded base are.
        experts: Whether a mixture's experts are among these.
    """
    if onto == ORIGINAL and published_quantized:
        return "is original, but the base is only published quantized; use dequantized"
    if onto == DEQUANTIZED and not quantized:
        return "is dequantized, but no weight of the base is quantized; use original"
    if onto == DEQUANTIZED and experts:
        what = "is dequantized, but experts of a mixture can only be written in the layout of the original base"
        return f"{what}; use original"
    return ""


def plan_merge(model: Any, source: Path) -> MergePlan:
    """Finds the tensor in the base's files of every weight that is adapted, trained whole or quantized.

    Raises:
        SettingsError: There is none, or more than one, or it is made of several; or the adapter cannot be merged.
        DataError: The base's files cannot be read.
    """
    base, config = model.get_base_model(), read_config(source)
    empty = build_empty(source, config)
    changed, whole_parameters = dict(adapted_or_quantized(base)), trained_whole(base)
    problems = list(_unmergeable(model, empty, changed))
    in_files = read_headers(source)
    parameters = parameter_names(in_files, empty)
    replaced = _replaced(whole_parameters, empty)
    problems += _not_in_files(changed, whole_parameters, replaced, list(parameters.values()))
    if problems:
        raise _refused("; ".join(problems))
    modules = {
        name: p.removesuffix(".weight") for name, p in parameters.items() if p.removesuffix(".weight") in changed
    }
    merged_tensors = {name: rest for name, rest in in_files.items() if not _is_quantization_constant(name, modules)}
    main_dtype = _main_dtype((shape, dtype) for _, shape, dtype in merged_tensors.values())
    target = base.dtype if main_dtype in _ROUNDED else main_dtype
    held_in = dtype_by_name(base, target)

    def written_in(name: str, dtype: torch.dtype) -> torch.dtype:
        if not dtype.is_floating_point:  # packed 4-bit weights, or a mask of the base's own
            return target if name in modules else dtype
        return held_in(parameters.get(name, name)) if main_dtype in _ROUNDED and dtype in _ROUNDED else dtype

    tensors = []
    for name, (file, shape, dtype) in merged_tensors.items():
        plain = empty.get_submodule(modules[name]) if name in modules else None
        # packed weights have another shape in the file, and new tokens make more rows
        own_name = replaced.get(parameters.get(name, ""))
        result_shape = (
            whole_parameters[own_name].shape if own_name else shape if plain is None else tuple(plain.weight.shape)
        )
        transposed = plain is not None and _is_conv1d(plain)
        tensors.append(
            MergedTensor(name, file, result_shape, written_in(name, dtype), modules.get(name), transposed, own_name)
        )
    rows = grown_vocabulary(base, config)
    if rows is not None:
        shapes = {parameters[tensor.name]: tensor.shape for tensor in tensors if tensor.name in parameters}
        if why := why_not_grown(source, config, rows, shapes):
            raise _refused(f"with new tokens (JOB_MODEL__ADD_TOKENS) {why}; remove merged")
    return MergePlan(source, tuple(tensors), target, rows)


def _not_in_files(
    changed: Mapping[str, Any], whole: Mapping[str, WholeParameter], replaced: Mapping[str, str], in_files: list[str]
) -> Iterator[str]:
    """Which weights are not one tensor in the base's files, in words.

    Args:
        changed: By full name, the modules that are adapted or quantized.
        whole: By name, the parameters that were trained whole.
        replaced: From `_replaced`.
        in_files: The names of the parameters of all tensors in the files.
    """
    times = Counter(in_files)
    if lost := [name for name in changed if times[f"{name}.weight"] != 1]:
        what = f"the weight of {lost[0]} is not one tensor in the base's files, so it cannot be merged into them"
        yield f"{what}; remove merged, or the layer from JOB_LORA__TARGET_MODULES"
    if lost := sorted(whole.keys() - {replaced[name] for name in in_files if name in replaced}):
        what = f"{lost[0]} was trained whole, and is not one tensor in the base's files, so it cannot be merged into"
        yield f"{what} them; remove merged, or the module from JOB_LORA__MODULES_TO_SAVE"


def _replaced(whole_parameters: Mapping[str, WholeParameter], empty: Any) -> dict[str, str]:
    """Name of a parameter -> name of the one trained whole that takes its place, in the files of tied ones as well."""
    by_weight: dict[int, str] = {}
    every = [(name, id(parameter)) for name, parameter in empty.named_parameters(remove_duplicate=False)]
    for name, weight in every:
        if name in whole_parameters:
            by_weight.setdefault(weight, name)
    tied = {name: by_weight[weight] for name, weight in every if weight in by_weight}
    # Tied parameters may differ in the files, and then they are not tied.
    return {**tied, **{name: name for name in whole_parameters}}


def adapted_or_quantized(base: Any) -> Iterator[tuple[str, Any]]:
    """(full name, module) of the layers that are adapted, or whose weight is quantized."""
    from peft.tuners.lora import LoraLayer

    inner = set()
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            inner.add(module.get_base_layer())
            yield name, module
        elif module not in inner and is_quantized(getattr(module, "weight", None)):
            yield name, module


def _unmergeable(model: Any, empty: Any, changed: Mapping[str, Any]) -> Iterator[str]:
    """What PEFT would merge wrong, or not at all, in words."""
    from peft.tuners.lora import LoraLayer

    config = model.peft_config[ADAPTER]
    if config.bias != "none" or getattr(config, "lora_bias", False):
        yield "the adapter has biases, which cannot be merged"
    if getattr(config, "target_parameters", None):
        yield "the adapter is also on experts (JOB_LORA__EXPERTS), which cannot be merged"
        return
    shared = Counter(id(parameter) for _, parameter in empty.named_parameters(remove_duplicate=False))
    for name, module in changed.items():
        weight = module.weight
        if is_quantized(weight) and getattr(weight, "quant_state", None) is None:
            yield f"{name} is quantized to 8 bits; only 4-bit and unquantized bases can be merged"
            return
        if isinstance(module, LoraLayer):
            kind = type(module).__name__
            if kind not in {"Linear", "Linear4bit", "SVDLinear", "SVDLinear4bit"}:
                yield f"{name} has an adapter of PEFT's kind {kind}, which cannot be merged"
                return
            if shared[id(empty.get_submodule(name).weight)] > 1:
                yield (
                    f"the weight of {name} is shared with another module, which has no adapter and would change, too; "
                    "remove merged, or the layer from JOB_LORA__TARGET_MODULES"
                )
                return


def _is_quantization_constant(name: str, modules: Mapping[str, str]) -> bool:
    """Whether a tensor belongs to the 4-bit weight of one of these, which bitsandbytes lays beside it."""
    weight, dot, _ = name.partition(".weight.")
    return bool(dot) and f"{weight}.weight" in modules


def _main_dtype(tensors: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> torch.dtype:
    """The floating-point dtype of most numbers; fp32 where there are none."""
    numbers: Counter[torch.dtype] = Counter()
    for shape, dtype in tensors:
        if dtype.is_floating_point:
            numbers[dtype] += math.prod(shape)
    return max(numbers, key=lambda dtype: (numbers[dtype], str(dtype)), default=torch.float32)


def _is_conv1d(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _refused(message: str, name: str = "formats") -> SettingsError:
    return SettingsError([Problem(f"JOB_EXPORT__{name.upper()}", message)])
