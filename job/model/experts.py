"""Quantizes a mixture's experts to 4 bits while they are loaded, and keeps them in files.

transformers holds all experts of a layer in two parameters, (experts, outputs, inputs) each. Since these are not linear
layers, its loading leaves them in 16 bits, although they are nine tenths or more of a mixture's weights. Here each such
parameter becomes a `Params4bit` at the moment it is assigned to its module. bitsandbytes' parametrization then gives
the dequantized tensor to any code that reads the attribute: transformers, PEFT, a merge. Training and scoring do not
read it, since autograd would keep 16-bit weights of every layer: `fused/experts.py` dequantizes for each use.

Source of the parametrization: bitsandbytes, `nn/parametrize.py`, made for such experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

from job import log
from job.errors import DataError, Problem
from job.model.files import MAX_CONFIG_BYTES, read_json

Kinds = frozenset[tuple[str, str]]
"""(class name of a module, name of one of its parameters)."""
FILES = "experts-{:05d}.safetensors"
"""Names of a kept base's files with experts, one for each parameter; transformers does not read them."""
_MOST = 2**31
"""bitsandbytes' kernels index with 32 bits: a tensor with this many elements cannot be quantized."""
_THREE = 3
_NAMES = ("gate_up_proj", "up_proj", "down_proj")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
"""Names in config.json of the number of experts that each token goes to (top-k), by family."""


def expert_tensors(model: Any) -> Iterator[tuple[str, Any, str]]:
    """(module's name, module, parameter's name) of each tensor that holds the experts of a layer, quantized or not.

    These are the three-dimensional parameters of modules that use transformers' experts interface, which are recognized
    by the attributes that it sets: `is_transposed` and `has_gate`.
    """
    for path, module in model.named_modules():
        if not (hasattr(module, "is_transposed") and hasattr(module, "has_gate")):
            continue
        within = module.parametrizations if "parametrizations" in module._modules else ()  # noqa: SLF001
        for name in [name for name in (*module._parameters, *within) if name in _NAMES]:  # noqa: SLF001
            held = packed(module, name)
            weight = module._parameters.get(name) if held is None else held  # noqa: SLF001 - `getattr` dequantizes
            if weight is not None and (held is not None or weight.ndim == _THREE):
                yield path, module, name


def packed(module: Any, name: str) -> Any:
    """The `Params4bit` behind a parameter of experts; None if that is not quantized."""
    if "parametrizations" in module._modules and name in module.parametrizations:  # noqa: SLF001 - it may be a property
        weight = module.parametrizations[name].original
    else:
        weight = module._parameters.get(name)  # noqa: SLF001
    return weight if getattr(weight, "quant_state", None) is not None else None


def quantized_experts(model: Any) -> int:
    """How many weights of the model's experts are held in 4 bits."""
    return sum(packed(module, name).quant_state.shape.numel() for _, module, name in _all_quantized(model))


def expert_parameters(model: Any) -> int:
    """Weights of all experts of a model, quantized or not."""
    return sum(_shape(module, name).numel() for _, module, name in expert_tensors(model))


def idle_experts(model: Any) -> Fraction:
    """The share of a layer's experts that a token does not go to; 0 without experts, or if config.json lacks top-k."""
    config = model.config.get_text_config(decoder=True)
    top_k = next((value for name in _CHOSEN if isinstance(value := getattr(config, name, None), int)), None)
    count = next((_shape(module, name)[0] for _, module, name in expert_tensors(model)), None)
    return Fraction(0) if top_k is None or count is None else Fraction(count - top_k, count)


def _shape(module: Any, name: str) -> Any:
    """The shape of the unpacked weights, (experts, outputs, inputs), or (experts, inputs, outputs) if transposed."""
    weight = packed(module, name)
    return module._parameters[name].shape if weight is None else weight.quant_state.shape  # noqa: SLF001


def kinds_of(empty: Any) -> Kinds:
    """The parameters that `quantizing` has to quantize; those with too many elements are left out, with a warning.

    Args:
        empty: The model without weights, on torch's meta device.
    """
    sizes = _sizes(empty)
    if large := sorted(kind for kind, numbers in sizes.items() if numbers >= _MOST):
        what = "experts stay in 16 bits, which takes more memory: bitsandbytes cannot quantize tensors this large"
        log.get_logger().warning(what, parameters=large, limit=_MOST, change="none; no setting avoids it")
    return frozenset(sizes.keys() - set(large))


def can_quantize(empty: Any) -> bool:
    """Whether `kinds_of` finds any, without its warning."""
    return any(numbers < _MOST for numbers in _sizes(empty).values())


def _sizes(empty: Any) -> dict[tuple[str, str], int]:
    """(class of a module, name of its parameter) of a mixture's experts -> how many numbers one has."""
    return {
        (type(module).__name__, name): module.get_parameter(name).numel() for _, module, name in expert_tensors(empty)
    }


@contextmanager
def quantizing(kinds: Kinds, *, double: bool) -> Iterator[None]:
    """Within it, loading a model quantizes its experts to NF4, each parameter as soon as it is assigned.

    Args:
        kinds: Which parameters.
        double: Whether the quantization constants are quantized, too (`JOB_MODEL__DOUBLE_QUANTIZATION`).
    """
    from torch.nn.modules import module as torch_module

    def registered(module: Any, name: str, weight: Any) -> Any | None:
        if (type(module).__name__, name) not in kinds or weight is None or weight.device.type == "meta":
            return None
        return None if getattr(weight, "quant_state", None) is not None else _quantized(weight, double=double)

    handle = torch_module.register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


def _quantized(weight: Any, *, double: bool) -> Any:
    """A `Params4bit` on the weight's device, with bitsandbytes' block size of linear layers."""
    from bitsandbytes.nn import Params4bit

    options = {"compress_statistics": double, "quant_type": "nf4", "requires_grad": False}
    made = Params4bit(weight.data, **options).to(weight.device)
    made._is_hf_initialized = True  # noqa: SLF001 - otherwise transformers initializes it at random
    return made


@contextmanager
def left_out(kinds: Kinds, empty: Any) -> Iterator[None]:
    """Within it, loading a model leaves its experts empty, so that transformers allocates no memory for them.

    Args:
        kinds: Which parameters.
        empty: A model of the same class without weights.
    """
    import torch
    from torch.nn.modules import module as torch_module

    def registered(module: Any, name: str, weight: Any) -> Any | None:
        if (type(module).__name__, name) not in kinds or weight is None or weight.device.type != "meta":
            return None
        return torch.nn.Parameter(weight.new_empty(0), requires_grad=False)

    owner, handle = type(empty), torch_module.register_module_parameter_registration_hook(registered)
    before = owner._keys_to_ignore_on_load_missing  # noqa: SLF001 - otherwise transformers warns of missing keys
    names = [re.escape(f"{path}.{name}") + "$" for path, _, name in expert_tensors(empty)]
    owner._keys_to_ignore_on_load_missing = [*(before or ()), *names]  # noqa: SLF001
    try:
        yield
    finally:
        owner._keys_to_ignore_on_load_missing = before  # noqa: SLF001
        handle.remove()


def finish(model: Any) -> None:
    """Makes the quantized experts of a loaded model return their dequantized values when they are read."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized

    for path, module, name in list(expert_tensors(model)):
        if (weight := packed(module, name)) is None:
            continue
        state = weight.quant_state
        replace_parameter_4bit_prequantized(module, name, state.as_dict(packed=True), weight.device)
        # The original state and not the copy that bitsandbytes made of it: in a base that is not on the GPU, reading
        # this object fetches the layer (`placed_weights`).
        module.parametrizations[name][0].quant_state = state
        assert packed(module, name) is weight, path  # noqa: S101 - a torch version that copies it would lose the state


@contextmanager
def plain_shapes(model: Any) -> Iterator[None]:
    """Within it, a model's quantized experts are plain parameters of the same shape, so that PEFT can add adapters.

    With parametrized parameters PEFT would nest the adapters of a module in another order. Their tensors would then
    have other names than for the unquantized base, into which other programs load them.
    """
    import torch
    from torch.nn.utils import parametrize

    hidden = []
    for _, module, name in _all_quantized(model):
        weight, parametrization = packed(module, name), module.parametrizations[name][0]
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        state = weight.quant_state
        shape = torch.zeros(1, dtype=state.dtype, device=weight.device).expand(state.shape)
        module._parameters[name] = torch.nn.Parameter(shape, requires_grad=False)  # noqa: SLF001 - replaces one, registers none
        hidden.append((module, name, weight, parametrization))
    try:
        yield
    finally:
        for module, name, weight, parametrization in hidden:
            module._parameters[name] = weight  # noqa: SLF001
            parametrize.register_parametrization(module, name, parametrization, unsafe=True)


def has_files(folder: Path) -> bool:
    """Whether a kept base has files of quantized experts."""
    return (folder / FILES.format(0)).is_file()


def left_plain(folder: Path) -> bool:
    """Whether a folder has weights that are quantized already, but not its experts, if it has any.

    Other programs publish mixtures in this form, since bitsandbytes itself quantizes linear layers only.
    """
    config = read_json(folder / "config.json", MAX_CONFIG_BYTES)
    return bool(config.get("quantization_config")) and not has_files(folder)


def save_experts(model: Any, folder: Path) -> bool:
    """Writes each tensor of quantized experts to a separate file, with the keys of bitsandbytes' `state_dict`.

    Returns:
        Whether there are any.
    """
    from safetensors.torch import save_file

    experts = _all_quantized(model)
    for number, (path, module, name) in enumerate(experts):
        weight = packed(module, name)
        if (bring := getattr(weight.quant_state, "bring", None)) is not None:
            bring()
        tensors = {f"{path}.{name}": weight.data}
        tensors |= {f"{path}.{name}.{key}": value for key, value in weight.quant_state.as_dict(packed=True).items()}
        tensors = {key: value.to("cpu").contiguous() for key, value in tensors.items()}
        save_file(tensors, folder / FILES.format(number), metadata={"format": "pt"})
    return bool(experts)


def without_experts(model: Any) -> dict[str, Any]:
    """The model's `state_dict` without the tensors that `save_experts` writes."""
    expert_names = {f"{path}.{name}" for path, _, name in _all_quantized(model)}
    within = tuple(f"{name}." for name in expert_names)
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in expert_names and not (within and name.startswith(within))
    }


def load_experts(model: Any, folder: Path, device: Any) -> None:
    """Loads the experts of a kept base into a model that was loaded within `left_out`.

    Args:
        model: The model.
        folder: The kept base.
        device: Where the experts go.

    Raises:
        DataError: A file of experts is missing.
    """
    from bitsandbytes.nn import Params4bit
    from safetensors.torch import load_file

    missing = {f"{path}.{name}": (module, name) for path, module, name in _empty(model)}
    for file in sorted(folder.glob(FILES.format(0).replace("00000", "*"))):
        tensors = load_file(file, device=str(device))
        (full,) = tensors.keys() & missing.keys()
        module, name = missing.pop(full)
        stats = {key.removeprefix(f"{full}."): value for key, value in tensors.items() if key != full}
        made = Params4bit.from_prequantized(tensors[full], stats, requires_grad=False, device=device)
        made._is_hf_initialized = True  # noqa: SLF001
        setattr(module, name, made)
    if missing:
        what = f"{folder} lacks the experts {', '.join(sorted(missing)[:5])}; fetch or quantize the model again"
        raise DataError([Problem("JOB_MODEL__ID", what)])


def _all_quantized(model: Any) -> list[tuple[str, Any, str]]:
    return [entry for entry in expert_tensors(model) if packed(entry[1], entry[2]) is not None]


def _empty(model: Any) -> Iterator[tuple[str, Any, str]]:
    """Like `expert_tensors`, the parameters that `left_out` has left empty."""
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if hasattr(module, "is_transposed") and hasattr(module, "has_gate") and weight.numel() == 0:
                yield path, module, name
