"""The experts of a mixture in 4 bits: quantized by bitsandbytes while they are loaded, and how they are kept.

transformers holds all experts of a layer in two parameters, (experts, outputs, inputs) each, which are no linear
layers, so that its own loading leaves them in 16 bits: nine tenths of a mixture and more. Here each becomes a
`Params4bit` when it is set, as a linear layer's weight does, and bitsandbytes' parametrization then gives the
dequantized tensor to whatever reads it: transformers' code, PEFT's adapters, a merge. Training and scoring do not read
it so, since autograd would keep 16 bits of every layer: `fused/experts.py` dequantizes for each use.

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
"""(name of the class of a module, name of the parameter)."""
FILES = "experts-{:05d}.safetensors"
"""Of a kept base: one for each such parameter, which transformers does not read."""
_MOST = 2**31
"""Numbers of a tensor that bitsandbytes' kernels can count."""
_THREE = 3
_NAMES = ("gate_up_proj", "up_proj", "down_proj")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
"""What config.json calls the number of experts that a token goes to."""


def expert_tensors(model: Any) -> Iterator[tuple[str, Any, str]]:
    """(name of the module, module, name of the parameter) of tensors that hold a layer's experts; quantized or not.

    They are the three-dimensional parameters of the classes that transformers' experts interface computes, which gives
    each module of them the attributes asked for here.
    """
    for path, module in model.named_modules():
        if not (hasattr(module, "is_transposed") and hasattr(module, "has_gate")):
            continue
        within = module.parametrizations if "parametrizations" in module._modules else ()  # noqa: SLF001
        for name in [name for name in (*module._parameters, *within) if name in _NAMES]:  # noqa: SLF001
            held = packed(module, name)
            weight = module._parameters.get(name) if held is None else held  # noqa: SLF001 - not what is made of it
            if weight is not None and (held is not None or weight.ndim == _THREE):
                yield path, module, name


def packed(module: Any, name: str) -> Any:
    """The `Params4bit` of a parameter of experts; None if it is not quantized."""
    if "parametrizations" in module._modules and name in module.parametrizations:  # noqa: SLF001 - it may be a property
        weight = module.parametrizations[name].original
    else:
        weight = module._parameters.get(name)  # noqa: SLF001
    return weight if getattr(weight, "quant_state", None) is not None else None


def quantized_experts(model: Any) -> int:
    """How many weights of experts are held in 4 bits."""
    return sum(packed(module, name).quant_state.shape.numel() for _, module, name in _all_quantized(model))


def expert_parameters(model: Any) -> int:
    """Weights of all experts of a model, quantized or not."""
    return sum(_shape(module, name).numel() for _, module, name in expert_tensors(model))


def idle_experts(model: Any) -> Fraction:
    """Which part of its experts a token does not go to; 0 where there are none, or config.json does not say it."""
    config = model.config.get_text_config(decoder=True)
    chosen = next((value for name in _CHOSEN if isinstance(value := getattr(config, name, None), int)), None)
    count = next((_shape(module, name)[0] for _, module, name in expert_tensors(model)), None)
    return Fraction(0) if chosen is None or count is None else Fraction(count - chosen, count)


def _shape(module: Any, name: str) -> Any:
    """(experts, outputs, inputs), or the other way: of the values, not of packed bytes."""
    weight = packed(module, name)
    return module._parameters[name].shape if weight is None else weight.quant_state.shape  # noqa: SLF001


def kinds_of(empty: Any) -> Kinds:
    """What `quantizing` looks for, by a model without weights; experts that are too many for it are left out."""
    found = {}
    for _, module, name in expert_tensors(empty):
        found[type(module).__name__, name] = module.get_parameter(name).numel()
    if large := sorted(kind for kind, numbers in found.items() if numbers >= _MOST):
        log.get_logger().warning("experts stay in 16 bits: a layer has more numbers than can be quantized", of=large)
    return frozenset(found.keys() - set(large))


@contextmanager
def quantizing(kinds: Kinds, *, double: bool) -> Iterator[None]:
    """Has the experts of a model that is loaded within become 4-bit values, each as soon as it is there."""
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
    """A `Params4bit` on the weight's device, with the blocks that a linear layer's weight has."""
    from bitsandbytes.nn import Params4bit

    how = {"compress_statistics": double, "quant_type": "nf4", "requires_grad": False}
    made = Params4bit(weight.data, **how).to(weight.device)
    made._is_hf_initialized = True  # noqa: SLF001 - otherwise transformers draws first values for it
    return made


@contextmanager
def left_out(kinds: Kinds, empty: Any) -> Iterator[None]:
    """Has the experts of a model that is loaded within be empty, so that transformers makes no memory for them.

    Args:
        kinds: Which.
        empty: A model of the same class.
    """
    import torch
    from torch.nn.modules import module as torch_module

    def registered(module: Any, name: str, weight: Any) -> Any | None:
        if (type(module).__name__, name) not in kinds or weight is None or weight.device.type != "meta":
            return None
        return torch.nn.Parameter(weight.new_empty(0), requires_grad=False)

    owner, handle = type(empty), torch_module.register_module_parameter_registration_hook(registered)
    before = owner._keys_to_ignore_on_load_missing  # noqa: SLF001 - otherwise transformers warns of them
    names = [re.escape(f"{path}.{name}") + "$" for path, _, name in expert_tensors(empty)]
    owner._keys_to_ignore_on_load_missing = [*(before or ()), *names]  # noqa: SLF001
    try:
        yield
    finally:
        owner._keys_to_ignore_on_load_missing = before  # noqa: SLF001
        handle.remove()


def finish(model: Any) -> None:
    """Has the quantized experts of a loaded model give their dequantized values to whoever reads them."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized

    for path, module, name in list(expert_tensors(model)):
        if (weight := packed(module, name)) is None:
            continue
        state = weight.quant_state
        replace_parameter_4bit_prequantized(module, name, state.as_dict(packed=True), weight.device)
        # The state itself in place of its copy: where the base does not lie on the device, it brings the bytes there.
        module.parametrizations[name][0].quant_state = state
        assert packed(module, name) is weight, path  # noqa: S101 - a torch that copies it would lose the state


@contextmanager
def plain_shapes(model: Any) -> Iterator[None]:
    """Shows the quantized experts of a model as plain parameters of their shape, for PEFT to add an adapter to them.

    Of such that give dequantized values PEFT would nest the adapters of a module in another order, and so name their
    tensors otherwise than it does for the unquantized base, which readers load them into.
    """
    import torch
    from torch.nn.utils import parametrize

    hidden = []
    for _, module, name in _all_quantized(model):
        weight, how = packed(module, name), module.parametrizations[name][0]
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        state = weight.quant_state
        shape = torch.zeros(1, dtype=state.dtype, device=weight.device).expand(state.shape)
        module._parameters[name] = torch.nn.Parameter(shape, requires_grad=False)  # noqa: SLF001 - it is no new one
        hidden.append((module, name, weight, how))
    try:
        yield
    finally:
        for module, name, weight, how in hidden:
            module._parameters[name] = weight  # noqa: SLF001
            parametrize.register_parametrization(module, name, how, unsafe=True)


def has_files(folder: Path) -> bool:
    """Whether a kept base has its experts in files of their own."""
    return (folder / FILES.format(0)).is_file()


def left_plain(folder: Path) -> bool:
    """Whether a model's folder has weights that are quantized already, and its experts, if it has any, are not.

    Programs that quantize by bitsandbytes publish such, as it has 4 bits for linear layers alone.
    """
    config = read_json(folder / "config.json", MAX_CONFIG_BYTES)
    return bool(config.get("quantization_config")) and not has_files(folder)


def save_experts(model: Any, folder: Path) -> bool:
    """Writes each tensor of quantized experts into a file of its own, as bitsandbytes' `state_dict` has it.

    Returns:
        Whether there are any.
    """
    from safetensors.torch import save_file

    found = _all_quantized(model)
    for number, (path, module, name) in enumerate(found):
        weight = packed(module, name)
        if (bring := getattr(weight.quant_state, "bring", None)) is not None:
            bring()
        tensors = {f"{path}.{name}": weight.data}
        tensors |= {f"{path}.{name}.{key}": value for key, value in weight.quant_state.as_dict(packed=True).items()}
        tensors = {key: value.to("cpu").contiguous() for key, value in tensors.items()}
        save_file(tensors, folder / FILES.format(number), metadata={"format": "pt"})
    return bool(found)


def without_experts(model: Any) -> dict[str, Any]:
    """The model's `state_dict` without the tensors of `save_experts`."""
    held = {f"{path}.{name}" for path, _, name in _all_quantized(model)}
    within = tuple(f"{name}." for name in held)
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in held and not (within and name.startswith(within))
    }


def load_experts(model: Any, folder: Path, device: Any) -> None:
    """Puts the experts of a kept base into a model whose own are empty.

    Raises:
        DataError: Some are not there.
    """
    from bitsandbytes.nn import Params4bit
    from safetensors.torch import load_file

    wanted = {f"{path}.{name}": (module, name) for path, module, name in _empty(model)}
    for file in sorted(folder.glob(FILES.format(0).replace("00000", "*"))):
        tensors = load_file(file, device=str(device))
        (full,) = tensors.keys() & wanted.keys()
        module, name = wanted.pop(full)
        stats = {key.removeprefix(f"{full}."): value for key, value in tensors.items() if key != full}
        made = Params4bit.from_prequantized(tensors[full], stats, requires_grad=False, device=device)
        made._is_hf_initialized = True  # noqa: SLF001
        setattr(module, name, made)
    if wanted:
        what = f"{folder} lacks the experts {', '.join(sorted(wanted)[:5])}"
        raise DataError([Problem("JOB_MODEL__ID", what)])


def _all_quantized(model: Any) -> list[tuple[str, Any, str]]:
    return [found for found in expert_tensors(model) if packed(found[1], found[2]) is not None]


def _empty(model: Any) -> Iterator[tuple[str, Any, str]]:
    """Those of `left_out`."""
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if hasattr(module, "is_transposed") and hasattr(module, "has_gate") and weight.numel() == 0:
                yield path, module, name
