"""The format `merged`: the base's files with the adapter added to their weights.

    W' = W + scale B A        for plain LoRA; for other kinds what PEFT's own layers make of W

computed in fp32, one tensor at a time, and rounded once to the dtype of the base's file. W is one of two:

    original       the weights in the base's files
    dequantized    the values that the quantized base in memory represents, bit for bit: those that the adapter was
                   trained on. Weights without an adapter are dequantized, too, if they were quantized in training.

Which tensors are written, and what cannot be merged, is in `merge_plan`. In memory are at any time one file of the
result and one tensor in fp32.

A module that was trained whole takes the place of the base's, and so do the rows of new tokens: `whole_parameters`.

An adapter that begins with a part of the base (`decomposed_init`: PiSSA, OLoRA) is plain LoRA of twice the rank, on an
unchanged base, and merges as such.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from job.errors import TrainingFailed
from job.export.merge_plan import ADAPTER, ORIGINAL, MergedTensor, MergePlan, adapted_or_quantized
from job.export.tensor_files import read_tensor, write_config, write_weights
from job.export.whole_parameters import WholeParameter, trained_whole, with_vocabulary
from job.model.device import short_name
from job.model.files import MAX_CONFIG_BYTES, read_config, read_json
from job.model.fused.frozen_weights import dequantized
from job.model.load_base import is_quantized
from job.model.tokenizer_files import copy_tokenizer

COPIED_FILES = (
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    "chat_template.json",
)
"""Files of the base that are copied unchanged, besides those of the tokenizer."""


def write_merged(
    model: Any,
    plan: MergePlan,
    onto: str,
    folder: Path,
    *,
    tokenizer: Any,
    added_tokens: Sequence[str] | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> None:
    """Writes the merged model as `AutoModelForCausalLM.from_pretrained` loads it.

    Args:
        model: The PEFT model with the adapter's weights.
        plan: From `plan_merge`.
        onto: `original` or `dequantized`.
        folder: Is made.
        tokenizer: As it was loaded from the base's folder, with the new tokens.
        added_tokens: The new tokens.
        check_stop: Called before each tensor; may raise what ends the job.

    Raises:
        TrainingFailed: A merged weight is not finite in its dtype.
    """
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    modules = dict(adapted_or_quantized(model.get_base_model()))
    whole = trained_whole(model.get_base_model())

    def written(name: str) -> torch.Tensor:
        with torch.no_grad():
            return _written(by_name[name], modules, whole, onto, model)

    folder.mkdir(parents=True)
    write_weights(folder, {t.name: (t.shape, t.dtype) for t in plan.tensors}, written, check_stop=check_stop)
    base_config = read_json(plan.source / "config.json", MAX_CONFIG_BYTES)
    if plan.vocabulary is not None:
        base_config = with_vocabulary(base_config, read_config(plan.source), plan.vocabulary)
    write_config(folder, _config(base_config, plan.dtype))
    copy_tokenizer(plan.source, folder, tokenizer, added_tokens)
    for name in COPIED_FILES:
        if (plan.source / name).is_file():
            shutil.copyfile(plan.source / name, folder / name)


def _written(
    tensor: MergedTensor,
    modules: Mapping[str, Any],
    whole_parameters: Mapping[str, WholeParameter],
    onto: str,
    model: Any,
) -> torch.Tensor:
    """A tensor of the result, contiguous on the CPU."""
    from peft.tuners.lora import LoraLayer

    module = None if tensor.module is None else modules[tensor.module]
    takes_original = module is None or onto == ORIGINAL or not is_quantized(module.weight)
    if tensor.whole is not None:
        whole = whole_parameters[tensor.whole].of(read_tensor(tensor.file, tensor.name))
        return _require_finite(whole.to(tensor.dtype).contiguous(), tensor.whole)
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
    return _require_finite(rounded, str(tensor.module))


def _require_finite(rounded: torch.Tensor, name: str) -> torch.Tensor:
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
        return _outputs_by_inputs(SVDLinear.get_delta_weight(layer, ADAPTER).detach(), layer).add_(weight)
    if not layer.use_dora.get(ADAPTER, False):
        # In place: the update is a separate tensor, and a sum has the same bits in either order.
        return _outputs_by_inputs(layer.get_delta_weight(ADAPTER).detach(), layer).add_(weight)
    # DoRA takes the norm of the weight that it is merged into, from its own base layer: so it gets one in fp32.
    base_layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    base_layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    rank: dict[str, Any] = {"r": layer.r[ADAPTER], "lora_alpha": layer.lora_alpha[ADAPTER]}
    dora = Linear(base_layer, ADAPTER, config=LoraConfig(**rank, use_dora=True, init_lora_weights=False), **rank)
    dora.scaling[ADAPTER] = layer.scaling[ADAPTER]
    for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
        getattr(dora, part)[ADAPTER].weight = getattr(layer, part)[ADAPTER].weight
    dora.merge(safe_merge=True)
    merged: torch.Tensor = base_layer.weight.detach()
    return merged


def _outputs_by_inputs(delta: torch.Tensor, layer: Any) -> torch.Tensor:
    """(outputs, inputs), from a layer whose weights may be transposed."""
    return delta.T if layer.fan_in_fan_out else delta


def _config(base_config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The base's config.json for weights in `dtype`: without quantization, code of a repository, or a path."""
    dropped = {"quantization_config", "auto_map", "_name_or_path"}
    dtype_name = str(dtype).removeprefix("torch.")
    config: dict[str, Any] = {}
    for key, value in base_config.items():
        if key in dropped:
            continue
        if isinstance(value, dict) and key.endswith("_config"):
            config[key] = _config(value, dtype) if {"dtype", "torch_dtype"} & value.keys() else _without(value, dropped)
        else:
            config[key] = dtype_name if key == "torch_dtype" else value
    return {**config, "dtype": dtype_name}


def _without(part: Mapping[str, Any], dropped: set[str]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key not in dropped}
