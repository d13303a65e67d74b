"""Which layers of a model get an adapter: the names that settings give, found, checked, and as PEFT takes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from job.errors import Problem, SettingsError, check_all, raise_problems
from job.model.adapter_options import PLAIN, AdapterOptions, check_options, in_group
from job.model.experts import expert_tensors
from job.model.tensor_names import tensor_files
from job.model.whole_modules import check_whole


def resolve_targets(model: Any, targets: Sequence[str] | str | None) -> list[str]:
    """Names of the layers to adapt, as PEFT takes them.

    Args:
        model: May be one without weights.
        targets: Names, which are returned; `attention` or `mlp`; `auto`, `all-linear` or None for all linear ones.

    Raises:
        SettingsError: There are none of this kind.
    """
    if targets is None or targets in ("auto", "all-linear"):
        return find_targets(model)
    if not isinstance(targets, str):
        return list(targets)
    layers, modules = linear_layers(model), dict(model.named_modules())
    inside = {name for name in layers if in_group(targets, [type(modules[outer]).__name__ for outer in _around(name)])}
    outside = {name.rpartition(".")[2] for name in layers.keys() - inside}
    resolved = set()
    for name in inside:
        *_, holder, leaf = ("", *name.split("."))
        if not leaf.isdigit() and not _is_refused(model, leaf):
            resolved.add(f"{holder}.{leaf}" if leaf in outside else leaf)  # GPT-2 calls two layers c_proj
    if not resolved:
        has = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers})) or "none"
        what = f"{type(model).__name__} has no linear layers in modules of the kind {targets}; set it to names of {has}"
        if any(True for _ in expert_tensors(model)):
            what = f"{what}; for adapters on its experts set JOB_LORA__EXPERTS=true"
        raise SettingsError([Problem("JOB_LORA__TARGET_MODULES", what)])
    return sorted(resolved)


def _around(name: str) -> list[str]:
    """Names of the modules around a module, innermost first, without the model itself."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def named_by(names: Iterable[str], targets: Sequence[str]) -> list[str]:
    """Those of the full names that PEFT takes the targets to mean."""
    return [name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)]


def check_adapter(model: Any, targets: Sequence[str], rank: int, options: AdapterOptions) -> None:
    """Refuses what this model cannot have; works on a model without weights, too.

    Raises:
        SettingsError: With all problems.
    """
    if options == PLAIN:
        check_targets(model, targets)
        return
    config, adapted = model.config.get_text_config(decoder=True), adapted_layers(model, targets, options)
    of_options = (
        *check_options(options, rank=rank, layers=config.num_hidden_layers, adapted=adapted),
        *check_whole(model, options, adapted),
    )
    check_all(
        (
            ("targets", lambda: check_targets(model, targets)),
            ("experts", lambda: check_experts(model, options)),
            ("options", lambda: raise_problems(of_options)),
        )
    )
    if options.init == "orthogonal" and any(_packed(model.get_submodule(name)) for name in adapted):
        what = "orthogonal needs a base in floating point; set JOB_MODEL__QUANTIZATION=none, or use another"
        raise SettingsError([Problem("JOB_LORA__INIT", what)])


def check_experts(model: Any, options: AdapterOptions) -> None:
    """Refuses adapters of experts in a model whose experts cannot have any; works on a model without weights, too.

    Raises:
        SettingsError: JOB_LORA__EXPERTS is on there.
    """
    from job.model.fused.experts import why_not_adapted

    if options.experts and (why := why_not_adapted(model)):
        what = f"is on, and {type(model).__name__} {why}; remove it"
        raise SettingsError([Problem("JOB_LORA__EXPERTS", what)])


def adapted_layers(model: Any, targets: Sequence[str], options: AdapterOptions) -> list[str]:
    """Full names of the linear layers that get an adapter; of a model without weights, too."""
    names = named_by(linear_layers(model), targets)
    return names if options.layers is None else [name for name in names if _layer_of(name) in options.layers]


def expert_targets(model: Any, layers: Sequence[int] | None = None) -> list[str]:
    """What of a mixture's experts an adapter can be on, as PEFT's `target_parameters`.

    Args:
        model: May be one without weights.
        layers: Numbers of the layers; None for all, and then short names, which PEFT looks for in each.
    """
    full = [f"{path}.{name}" for path, _, name in expert_tensors(model)]
    if layers is not None:
        return [name for name in full if _layer_of(name) in layers]
    return sorted({".".join(name.split(".")[-3:]) for name in full})


def _layer_of(name: str) -> int | None:
    """The number of the decoder's layer that a module is in; as PEFT, the first number in its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _packed(layer: Any) -> bool:
    """Whether a layer's weight is no floating-point tensor."""
    return not layer.weight.is_floating_point()


def linear_layers(model: Any) -> dict[str, Any]:
    """The linear layers of the model's text part that an adapter can go on, by full name.

    Not the head, whose weights the loss uses directly. GPT-2's `Conv1D` is a linear layer by another name.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head, text = model.get_output_embeddings(), text_part(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and module is not head
        and name.startswith(text)
        and _is_linear(module)
    }


def _is_linear(module: Any) -> bool:
    """Whether a linear layer of a model's own class maps inputs to outputs, as PEFT takes for granted of all.

    Some routers of experts (Llama 4, Phi-MoE) return a tuple, and DeepSeek-V4 multiplies in groups.
    """
    import torch
    from torch.func import functional_call

    kind = type(module)
    if kind.forward is torch.nn.Linear.forward or not kind.__module__.startswith("transformers.models."):
        return True
    parameters = {name: parameter.to("meta") for name, parameter in module.named_parameters()}
    try:
        out = functional_call(module, parameters, torch.empty(1, 2, module.in_features, device="meta"))
    except Exception:  # noqa: BLE001 - of a stranger's class, that takes something else
        return False
    return isinstance(out, torch.Tensor) and out.shape == (1, 2, module.out_features)


def linear_weights(model: Any) -> list[Any]:
    """The weights that are quantized where a base is: those of all linear layers but the head, and of experts."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head]
    return [*linear, *(module.get_parameter(name) for _, module, name in expert_tensors(model))]


def find_targets(model: Any) -> list[str]:
    """The layers that get an adapter where none are named: all linear ones of the text part (PEFT's `all-linear`).

    Of Llama's family they are the seven of the reference recipe. Left out is what PEFT refuses to adapt, since the
    model's code uses its weights without calling it, what PEFT could not load again (`tensor_files`), and what bears
    the head's name (BLT contains a second model, which has a head).

    Raises:
        SettingsError: There are none.
    """
    layers = linear_layers(model)
    head = model.get_output_embeddings()
    of_head = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if module is head}
    names = sorted({name.rsplit(".", 1)[-1] for name in layers} - of_head - _lost(model, layers))
    if not (usable := [name for name in names if not name.isdigit() and not _is_refused(model, name)]):
        what = f"no linear layers were found in {type(model).__name__}; name them"
        raise SettingsError([Problem("JOB_LORA__TARGET_MODULES", what)])
    return usable


def check_targets(model: Any, targets: Sequence[str]) -> None:
    """Refuses names that match no linear layer of the model; works on a model without weights, too.

    Raises:
        SettingsError: There are some.
    """
    layers = linear_layers(model)
    missing = [
        target for target in targets if not any(name == target or name.endswith(f".{target}") for name in layers)
    ]
    if missing:
        has = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers})) or "none"
        message = f"the model has no linear {', '.join(missing)}; it has {has}"
        raise SettingsError([Problem("JOB_LORA__TARGET_MODULES", message)])
    if refused := [target for target in targets if _is_refused(model, target.rpartition(".")[2])]:
        message = f"PEFT does not adapt {', '.join(refused)} of {type(model).__name__}, whose code does not call them"
        raise SettingsError([Problem("JOB_LORA__TARGET_MODULES", f"{message}; leave them out")])
    named = {name for name in layers if any(name == target or name.endswith(f".{target}") for target in targets)}
    if lost := sorted(_lost(model, named)):
        message = (
            f"PEFT could not load the adapter of {', '.join(lost)} again, since it renames the tensors; leave them out"
        )
        raise SettingsError([Problem("JOB_LORA__TARGET_MODULES", message)])


def _lost(model: Any, layers: Iterable[str]) -> set[str]:
    """The last parts of the names of those layers whose adapter PEFT could not load again under any name."""
    lost = {name.rpartition(".lora_")[0] for name, file in tensor_files(model, layers).items() if file is None}
    return {name.rsplit(".", 1)[-1] for name in lost}


def _is_refused(model: Any, name: str) -> bool:
    """Whether PEFT would not adapt a layer of this name in this model."""
    from peft import LoraConfig
    from peft.tuners import tuners_utils

    try:
        tuners_utils._check_lora_target_modules_mamba(LoraConfig(), model, name)  # noqa: SLF001 - the only list there is
    except ValueError:
        return True
    return False


def text_part(model: Any) -> str:
    """What the names of the text part's modules begin with; nothing where the model is text throughout."""
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    others = getattr(model.config, "sub_configs", None) or {}
    return f"{name}." if name and others else ""


def excluded(model: Any, targets: Sequence[str]) -> str | None:
    """A pattern of the modules that bear a target's name and are no linear layer of the text part; None without such.

    Those outside of the text part are excluded as a whole.
    """
    layers, text = linear_layers(model), text_part(model)
    bears = tuple(f".{target}" for target in targets)
    others = [name for name, _ in model.named_modules() if name.endswith(bears) and name not in layers]
    patterns = [re.escape(name) for name in others if name.startswith(text)]
    if len(patterns) < len(others):
        patterns.append(rf"(?!{re.escape(text)}).*")
    return "|".join(patterns) or None
