"""The format `merged`: the base's checkpoint with the adapter added to its weights.

    W' = W + scale B A        for plain LoRA; for other kinds what PEFT's own layers make of W

computed in fp32, one tensor at a time, and rounded once to the dtype of the base's file. W is one of two:

    original       the weights in the base's files
    dequantized    the values that the quantized base in memory represents, bit for bit: those that the adapter was
                   trained on. Weights without an adapter are dequantized, too, if they were quantized in training.

The result has the names, the shapes and the other tensors of the base's own checkpoint, so that what loads the base
loads it. In memory are at any time one file of the result and one tensor in fp32.

A module that was trained whole takes the place of the base's, and so do the rows of new tokens: `whole_parameters`.

An adapter that begins with a part of the base (`decomposed_init`: PiSSA, OLoRA) is plain LoRA of twice the rank, on a
unchanged base, and merges as such.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from job.errors import Problem, SettingsError, TrainingFailed
from job.export.checkpoint import parameter_names, read_header, read_tensor, write_weights
from job.export.whole_parameters import (
    WholeParameter,
    grown_vocabulary,
    trained_whole,
    why_not_grown,
    with_vocabulary,
)
from job.model.base import dtype_by_name, is_quantized
from job.model.device import DTYPES
from job.model.experts import expert_tensors, packed
from job.model.files import (
    MAX_CONFIG_BYTES,
    build_empty,
    quantization_method,
    read_config,
    read_json,
    weight_files,
)
from job.model.fused.frozen_weights import dequantized
from job.model.tokenizer_files import copy_tokenizer

ORIGINAL, DEQUANTIZED, BEST = "original", "dequantized", "best"
BESIDE = (
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    "chat_template.json",
)
"""Files of the base that are copied unchanged, besides those of the tokenizer."""
_ADAPTER = "default"
_ROUNDED = {torch.float32, torch.float64}
"""Dtypes of a base's files that are not kept: its weights are rounded to the dtype that the run computes in."""


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the result: its name and file in the base's checkpoint, and the dtype that it is written in.

    `module` is the full name of the loaded model's module whose weight it is, if that is adapted or quantized.
    `transposed` is whether the file has it as (inputs, outputs), as GPT-2's do. `whole` is the name of a parameter
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
    tensors: tuple[_Tensor, ...]
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


def short_name(dtype: torch.dtype) -> str:
    """A dtype as the settings write it, such as `bf16`."""
    long = str(dtype).removeprefix("torch.")
    return next((short for short, name in DTYPES.items() if name == long), long)


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
    in_four_bits = any(is_quantized(module.weight) for _, module in _weighted(base))
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
    changed, whole_parameters = dict(_weighted(base)), trained_whole(base)
    problems = list(_unmergeable(model, empty, changed))
    tensors_of_base = {
        name: (file, shape, dtype) for file in weight_files(source) for name, shape, dtype in read_header(file)
    }
    parameters = parameter_names(tensors_of_base, empty)
    by_parameter = Counter(parameters.values())
    if lost := [name for name in changed if by_parameter[f"{name}.weight"] != 1]:
        message = f"the weight of {lost[0]} is not one tensor in the base's files, so it cannot be merged into them"
        problems.append(f"{message}; remove merged, or the layer from JOB_LORA__TARGET_MODULES")
    replaced = _replaced(whole_parameters, empty)
    if lost := sorted(whole_parameters.keys() - {replaced[name] for name in parameters.values() if name in replaced}):
        message = f"{lost[0]} was trained whole, and is not one tensor in the base's files, so it cannot be merged into"
        problems.append(f"{message} them; remove merged, or the module from JOB_LORA__MODULES_TO_SAVE")
    if problems:
        raise _refused("; ".join(problems))
    modules = {
        name: p.removesuffix(".weight") for name, p in parameters.items() if p.removesuffix(".weight") in changed
    }
    merged_tensors = {
        name: rest for name, rest in tensors_of_base.items() if not _is_quantization_constant(name, modules)
    }
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
        made = whole_parameters[own_name].shape if own_name else shape if plain is None else tuple(plain.weight.shape)
        transposed = plain is not None and _is_conv1d(plain)
        tensors.append(_Tensor(name, file, made, written_in(name, dtype), modules.get(name), transposed, own_name))
    rows = grown_vocabulary(base, config)
    if rows is not None:
        shapes = {parameters[tensor.name]: tensor.shape for tensor in tensors if tensor.name in parameters}
        if why := why_not_grown(source, config, rows, shapes):
            raise _refused(f"with new tokens (JOB_MODEL__ADD_TOKENS) {why}; remove merged")
    return MergePlan(source, tuple(tensors), target, rows)


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


def write_merged(
    model: Any,
    plan: MergePlan,
    onto: str,
    folder: Path,
    *,
    tokenizer: Any,
    added_tokens: Sequence[str] | None = None,
    alive: Callable[[], None] = lambda: None,
) -> None:
    """Writes the merged model as `AutoModelForCausalLM.from_pretrained` loads it.

    Args:
        model: The PEFT model with the adapter's weights.
        plan: From `plan_merge`.
        onto: `original` or `dequantized`.
        folder: Is made.
        tokenizer: As it was loaded from the base's folder, with the new tokens.
        added_tokens: The new tokens.
        alive: Called before each tensor; may raise what ends the job.

    Raises:
        TrainingFailed: A merged weight is not finite in its dtype.
    """
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    modules = dict(_weighted(model.get_base_model()))
    whole = trained_whole(model.get_base_model())

    def written(name: str) -> torch.Tensor:
        with torch.no_grad():
            return _written(by_name[name], modules, whole, onto, model)

    folder.mkdir(parents=True)
    write_weights(folder, {t.name: (t.shape, t.dtype) for t in plan.tensors}, written, alive=alive)
    said = read_json(plan.source / "config.json", MAX_CONFIG_BYTES)
    if plan.vocabulary is not None:
        said = with_vocabulary(said, read_config(plan.source), plan.vocabulary)
    config = _config(said, plan.dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(plan.source, folder, tokenizer, added_tokens)
    for name in BESIDE:
        if (plan.source / name).is_file():
            shutil.copyfile(plan.source / name, folder / name)


def _written(
    tensor: _Tensor, modules: Mapping[str, Any], whole_parameters: Mapping[str, WholeParameter], onto: str, model: Any
) -> torch.Tensor:
    """A tensor of the result, contiguous on the CPU."""
    from peft.tuners.lora import LoraLayer

    module = None if tensor.module is None else modules[tensor.module]
    takes_original = module is None or onto == ORIGINAL or not is_quantized(module.weight)
    if tensor.whole is not None:
        made = whole_parameters[tensor.whole].of(read_tensor(tensor.file, tensor.name))
        return _finite(made.to(tensor.dtype).contiguous(), tensor.whole)
    if takes_original and not isinstance(module, LoraLayer):
        return read_tensor(tensor.file, tensor.name).to(tensor.dtype).contiguous()
    if takes_original:
        weight = read_tensor(tensor.file, tensor.name).to(model.device, torch.float32)
        weight = weight.T if tensor.transposed else weight
    else:
        layer = module.get_base_layer() if isinstance(module, LoraLayer) else module
        # In the dtype that it was computed with in training, not the one that it was quantized from.
        weight = dequantized(layer, model.get_base_model().dtype).float()
    if isinstance(module, LoraLayer):
        weight = merge_weight(module, weight)
    rounded = (weight.T if tensor.transposed else weight).to(tensor.dtype).cpu().contiguous()
    return _finite(rounded, str(tensor.module))


def _finite(rounded: torch.Tensor, name: str) -> torch.Tensor:
    if not torch.isfinite(rounded).all():
        raise TrainingFailed(
            f"the merged weights of {name} are not finite in {short_name(rounded.dtype)}: the adapter "
            "diverged, or its numbers are too large for the base's dtype; lower JOB_TRAIN__LEARNING_RATE"
        )
    return rounded


def merge_weight(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """The weight with the adapter added to it, as PEFT computes it.

    Args:
        layer: A layer of PEFT with an adapter in fp32.
        weight: (outputs, inputs) fp32, on the layer's device; it is not changed.

    Returns:
        (outputs, inputs) fp32.
    """
    from peft import LoraConfig
    from peft.tuners.adalora import SVDLinear
    from peft.tuners.adalora.layer import AdaLoraLayer
    from peft.tuners.lora import Linear

    if isinstance(layer, AdaLoraLayer):
        # PEFT's layer of a 4-bit base has no method for it, nor this attribute.
        layer.fan_in_fan_out = getattr(layer, "fan_in_fan_out", False)
        return _upright(SVDLinear.get_delta_weight(layer, _ADAPTER).detach(), layer).add_(weight)
    if not layer.use_dora.get(_ADAPTER, False):
        # In place: the update is a separate tensor, and a sum has the same bits in either order.
        return _upright(layer.get_delta_weight(_ADAPTER).detach(), layer).add_(weight)
    # DoRA takes the norm of the weight that it is merged into, from its own base layer: so it gets one in fp32.
    plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    how: dict[str, Any] = {"r": layer.r[_ADAPTER], "lora_alpha": layer.lora_alpha[_ADAPTER]}
    made = Linear(plain, _ADAPTER, config=LoraConfig(**how, use_dora=True, init_lora_weights=False), **how)
    made.scaling[_ADAPTER] = layer.scaling[_ADAPTER]
    for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
        getattr(made, part)[_ADAPTER].weight = getattr(layer, part)[_ADAPTER].weight
    made.merge(safe_merge=True)
    merged: torch.Tensor = plain.weight.detach()
    return merged


def _upright(delta: torch.Tensor, layer: Any) -> torch.Tensor:
    """(outputs, inputs), from a layer whose weights may be transposed."""
    return delta.T if layer.fan_in_fan_out else delta


def release(model: Any) -> None:
    """Frees the memory of a model that is used no more: others still hold references to it, and there is one GPU."""
    from job.model.fused.frozen_weights import forget_dequantized
    from job.model.placed_weights import release as release_placed

    forget_dequantized(model)
    release_placed(model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _weighted(base: Any) -> Iterator[tuple[str, Any]]:
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
    """What PEFT would merge wrongly or leave out, in words."""
    from peft.tuners.lora import LoraLayer

    config = model.peft_config[_ADAPTER]
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
    """Whether a tensor belongs to the 4-bit weight of one of these, which bitsandbytes lays next to it."""
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


def _config(of_base: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The base's config.json for weights in `dtype`: without quantization, code of a repository, or a path."""
    dropped = {"quantization_config", "auto_map", "_name_or_path"}
    dtype_name = str(dtype).removeprefix("torch.")
    config: dict[str, Any] = {}
    for key, value in of_base.items():
        if key in dropped:
            continue
        if isinstance(value, dict) and key.endswith("_config"):
            config[key] = _config(value, dtype) if {"dtype", "torch_dtype"} & value.keys() else _without(value, dropped)
        else:
            config[key] = dtype_name if key == "torch_dtype" else value
    return {**config, "dtype": dtype_name}


def _without(part: Mapping[str, Any], dropped: set[str]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key not in dropped}


def _refused(message: str, name: str = "formats") -> SettingsError:
    return SettingsError([Problem(f"JOB_EXPORT__{name.upper()}", message)])
