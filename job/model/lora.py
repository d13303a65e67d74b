"""The LoRA adapter: added to a base, and switched off temporarily."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from job.common.formatting import first_line
from job.errors import Problem, SettingsError
from job.model.adapter_options import PLAIN, AdapterOptions
from job.model.decomposed_init import decompose
from job.model.experts import plain_shapes
from job.model.target_modules import check_adapter, excluded, expert_targets, linear_layers, named_by, resolve_targets
from job.model.whole_modules import grow_embeddings, names_for_peft, prepare_wrappers, token_rows


def add_adapter(
    model: Any,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    target_modules: Sequence[str] | str | None,
    seed: int,
    options: AdapterOptions = PLAIN,
    token_ids: Sequence[int] = (),
) -> Any:
    """Adds a new LoRA adapter in fp32 to the base; its initial weights depend only on the seed.

    The adapter stays in fp32 for every dtype of the base: rounding would make a resumed run differ from an
    uninterrupted one.

    Args:
        model: transformers' causal language model. Of a multimodal model, the text part is adapted.
        rank: Rank r of the update.
        alpha: The update is multiplied by alpha / rank.
        dropout: Rate of dropout on the adapter's input.
        target_modules: As `resolve_targets` takes them.
        seed: Seed of the initial weights.
        options: What else PEFT's configuration may say.
        token_ids: Ids of the new tokens; the base has rows for them.

    Raises:
        SettingsError: The model lacks one of them, or PEFT cannot adapt it.
    """
    import torch
    from peft import AdaLoraConfig, LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    targets = resolve_targets(model, target_modules)
    check_adapter(model, targets, rank, options)
    layers = linear_layers(model)
    adapted_kinds = {type(layers[name]) for name in named_by(layers, targets)}
    torch.manual_seed(seed)
    # Half of the ranks of a decomposition are frozen; alpha grows with them, so the scale is that of the trained half.
    times = 2 if options.decomposed else 1
    config_options: dict[str, Any] = {
        "lora_alpha": times * alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(targets),
        "exclude_modules": excluded(model, targets),
        "bias": "none",
        "fan_in_fan_out": adapted_kinds == {Conv1D},  # whose weight is (inputs, outputs)
        "task_type": "CAUSAL_LM",
        "layers_to_transform": None if options.layers is None else list(options.layers),
        "modules_to_save": names_for_peft(model, options.modules_to_save),
        "trainable_token_indices": token_rows(model, options.modules_to_save, token_ids),
    }
    if options.experts:
        config_options["target_parameters"] = expert_targets(model, options.layers)
    if options.adalora is not None:
        adalora_options = {"deltaT": options.adalora.delta_t, **asdict(options.adalora)}
        del adalora_options["delta_t"]
        config: LoraConfig = AdaLoraConfig(**config_options, **adalora_options)
    else:
        config = LoraConfig(
            r=times * rank,
            use_rslora=options.use_rslora,
            use_dora=options.use_dora,
            init_lora_weights=_OWN_INIT.get(options.init, True),
            rank_pattern={key: times * value for key, value in options.rank_pattern.items()},
            alpha_pattern={key: times * value for key, value in options.alpha_pattern.items()},
            **config_options,
        )
    try:
        with plain_shapes(model):
            adapted = get_peft_model(model, config)
    except ValueError as error:  # of layers that it knows it would break
        what = f"PEFT cannot adapt {', '.join(targets)}: {first_line(error, 300)}"
        raise SettingsError([Problem("JOB_LORA__TARGET_MODULES", what)]) from error
    # The weights have their first values now; who loads the adapter shall not compute others first, or change the base.
    config.init_lora_weights = True
    for name, parameter in adapted.named_parameters():
        if ".ranknum." in name:  # AdaLoRA's constant, which PEFT makes anew where it casts it to a half dtype
            parameter.requires_grad = False
            parameter.data = parameter.data.to(torch.float32)
    for parameter in trainable(adapted).values():
        parameter.data = parameter.data.to(torch.float32)
    prepare_wrappers(adapted)
    if options.experts:
        from job.model.fused.experts import fuse_experts

        fuse_experts(adapted, model.dtype)
    if options.decomposed and model.device.type != "meta":
        decompose(adapted, options.init)
    return adapted


_OWN_INIT = {"gaussian": "gaussian", "orthogonal": "orthogonal"}
"""Initializations that PEFT makes without changing the base."""


def count_parameters(
    model: Any, *, rank: int, target_modules: Sequence[str] | str | None, options: AdapterOptions
) -> int:
    """Numbers in an adapter for a model without weights, which it is added to; of a decomposition with its frozen half.

    Raises:
        SettingsError: As `add_adapter`.
    """
    # An upper bound of the rows: a vocabulary with unused rows grows by fewer.
    grow_embeddings(model, model.get_input_embeddings().weight.shape[0] + len(options.added_tokens))
    adapted = add_adapter(
        model,
        rank=rank,
        alpha=rank,
        dropout=0.0,
        target_modules=target_modules,
        seed=0,
        options=options,
        token_ids=range(len(options.added_tokens)),  # which rows they are does not change their number
    )
    return sum(parameter.numel() for parameter in trainable(adapted).values())


def base_of(model: Any) -> Any:
    """The causal language model without PEFT's wrapper; a model without an adapter itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trainable(model: Any) -> dict[str, Any]:
    """The adapter's parameters by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Context manager: switches the adapter off, so that the model computes its base, with the same loaded weights."""
    with model.disable_adapter():
        yield
