"""Modules that are trained and saved whole besides the adapter, and rows of new tokens. PEFT's wrappers compute both.

A module trained whole (`modules_to_save`) is a copy in fp32; the base keeps its own. Of new tokens only their rows in
the embedding and in the output layer are trained (`trainable_token_indices`), which takes a few numbers instead of the
whole matrix. Both are in the adapter's file: PEFT loads them, after the reader has added rows for the new
tokens in the base.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from job.errors import Problem, SettingsError
from job.model.adapter_options import AdapterOptions

_MODULES, _TOKENS = "JOB_LORA__MODULES_TO_SAVE", "JOB_MODEL__ADD_TOKENS"


def check_whole(model: Any, options: AdapterOptions, adapted: Collection[str]) -> Iterator[Problem]:
    """What of `modules_to_save` and `added_tokens` this model cannot have; works on a model without weights, too.

    Args:
        model: The base.
        options: The adapter's options.
        adapted: Full names of the layers that get an adapter.
    """
    if options.added_tokens and getattr(model.get_output_embeddings(), "bias", None) is not None:
        yield Problem(_TOKENS, f"the output layer of {type(model).__name__} has a bias, which PEFT would ignore")
    for name in options.modules_to_save:
        matches = modules_named(model, name)
        if not matches:
            has = ", ".join(n for n in (_name_of(model, module) for module in _vocabulary_layers(model)) if n)
            yield Problem(_MODULES, f"the model has no module {name}; those of its vocabulary are {has}")
        for full in matches:
            yield from _why_not(model, full, adapted)


def modules_named(model: Any, name: str) -> list[str]:
    """Full names of the modules that a name, or its end, means."""
    return [full for full, _ in model.named_modules() if full == name or full.endswith(f".{name}")]


def names_for_peft(model: Any, names: Sequence[str]) -> list[str] | None:
    """PEFT's `modules_to_save`: as given, or in full where PEFT would take other modules to be meant, too.

    To PEFT `norm` is every module whose name ends so, `input_layernorm` as well.
    """
    everything = [full for full, _ in model.named_modules()]
    taken = []
    for name in names:
        matches = modules_named(model, name)
        taken += [name] if len(matches) == sum(full.endswith(name) for full in everything) else matches
    return taken or None


def _why_not(model: Any, name: str, adapted: Collection[str]) -> Iterator[Problem]:
    from torch import nn

    module = model.get_submodule(name)
    if isinstance(module, nn.ModuleList | nn.ModuleDict) or not any(True for _ in module.parameters()):
        yield Problem(_MODULES, f"{name} is a {type(module).__name__}, which PEFT cannot train whole")
        return
    if within := [layer for layer in adapted if layer == name or layer.startswith(f"{name}.")]:
        yield Problem(_MODULES, f"{name} holds {within[0]}, which gets an adapter; remove one of them")
    if any(not parameter.is_floating_point() for parameter in module.parameters()):
        yield Problem(_MODULES, f"{name} is quantized, so it cannot be trained whole; set JOB_MODEL__QUANTIZATION=none")
    own = {id(parameter) for parameter in module.parameters()}
    inside = (name, f"{name}.")
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in own and not other.startswith(inside[1]):
            what = (
                f"{name} is tied to {other}: trained whole, they would no longer be equal; {_TOKENS} "
                "trains rows of both"
            )
            yield Problem(_MODULES, what)
            break


def grow_embeddings(model: Any, rows: int) -> None:
    """Makes room for new tokens: new rows of embedding and output layer are the mean of all others.

    Not drawn at random, as transformers does it: a restart has to begin with the same numbers.

    Args:
        model: The base, without an adapter.
        rows: The least number of rows; a vocabulary that has as many is unchanged.
    """
    import torch

    before = model.get_input_embeddings().weight.shape[0]
    if rows <= before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for weight in {id(layer.weight): layer.weight for layer in _vocabulary_layers(model)}.values():
            weight[before:] = weight[:before].float().mean(0)


def token_rows(model: Any, modules_to_save: Sequence[str], tokens: Sequence[int]) -> dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices`: the rows to train, by the layer they are in; None without new tokens.

    A layer that is trained whole has them among all its rows. Of tied ones the embedding is named: PEFT ties them.
    """
    if not tokens:
        return None
    whole = {full for name in modules_to_save for full in modules_named(model, name)}
    layers = {id(layer.weight): _name_of(model, layer) for layer in reversed(_vocabulary_layers(model))}
    return {name: list(tokens) for name in reversed(layers.values()) if name not in whole} or None


def prepare_wrappers(model: Any) -> None:
    """Makes PEFT's wrappers fit what calls them here.

    - A module trained whole is in fp32 like the adapter, and the model around it may be in half precision: inputs and
      outputs are cast, except for the output layer, whose logits stay in fp32.
    - The fused loss reads weight and bias of the output layer, and PEFT's wrapper of its rows has no bias.
    """
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    base = model.get_base_model()
    head = base.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.bias = None
        elif isinstance(module, ModulesToSaveWrapper):
            copy = module.modules_to_save["default"]
            copy.register_forward_pre_hook(_to_fp32)
            if module is not head:
                copy.register_forward_hook(_to_dtype(base.dtype))


def _to_fp32(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.float() if _is_floating(one) else one for one in inputs)


def _to_dtype(dtype: Any) -> Any:
    def cast(_module: Any, _inputs: Any, output: Any) -> Any:
        return output.to(dtype) if _is_floating(output) else output

    return cast


def _is_floating(value: Any) -> bool:
    return hasattr(value, "is_floating_point") and value.is_floating_point()


def _vocabulary_layers(model: Any) -> list[Any]:
    """Embedding and output layer, where there is one."""
    return [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]


def _name_of(model: Any, layer: Any) -> str:
    return next((name for name, module in model.named_modules() if module is layer), "")


def refuse_renamed(names: Sequence[str], architecture: str) -> None:
    """Refuses modules whose tensors PEFT would not find again in the class that readers load.

    Raises:
        SettingsError: There are some.
    """
    if names:
        what = f"PEFT could not load {names[0]} into {architecture}, since it renames the tensors; leave it out"
        raise SettingsError([Problem(_MODULES, what)])
