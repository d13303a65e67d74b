"""Loads the quantized base, and refuses a model that is not trained here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from job import log
from job.errors import DataError, Problem, SettingsError, check_all, raise_problems
from job.model.adapter_options import PLAIN as PLAIN_LORA
from job.model.adapter_options import AdapterOptions
from job.model.files import (
    build_empty,
    check_weights,
    read_config,
    silence,
)
from job.model.loading_errors import loading_weights
from job.model.target_modules import check_adapter, resolve_targets

if TYPE_CHECKING:
    import torch

    from job.model.placed_weights import AllGather

PLAIN = "eager"
"""transformers' attention without a fused kernel (softmax(QK')V), which all its models have: the reference for packed
attention, and used in place of it where it is not correct."""


def load_base(
    folder: Path,
    *,
    quantization: str,
    double_quantization: bool,
    dtype: torch.dtype,
    device: torch.device,
    max_length: int,
    quantized: bool = False,
    targets: Sequence[str] | str | None = None,
    rank: int = 1,
    options: AdapterOptions = PLAIN_LORA,
    placement: str = "gpu",
    group: AllGather | None = None,
) -> Any:
    """Loads the frozen base, quantizing it while loading, with packed attention where its layers support it.

    Whether the model then computes packed sequences correctly is tested later, by `packing_check`.

    Args:
        folder: A local folder in the hub's layout; weights in safetensors only, never pickles.
        quantization: `nf4` or `none`. Weights that bitsandbytes has quantized already are used unchanged.
        double_quantization: Whether the quantization constants are quantized too.
        dtype: What the 4-bit weights are dequantized to, and what the other weights are held in.
        device: Where the model is placed.
        max_length: Longest sequence in tokens; a model with fewer positions is refused.
        quantized: Whether the folder holds the quantized base, as it was saved.
        targets: Layers that will get an adapter; checked to exist before weights are loaded.
        rank: Rank of the adapter; checked as well.
        options: The adapter's options.
        placement: Where the 4-bit weights of the decoder's layers are kept: `gpu` for the device, `sharded` or `host`.
            In the last two a layer goes there as soon as it is loaded.
        group: The processes that load the same base now, where `placement` is `sharded`.

    Raises:
        DataError: The folder holds no complete model.
        SettingsError: As `inspect`; or the weights do not exist.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from job.model import experts, packed_attention
    from job.model.fused.experts import use_frozen
    from job.model.placed_loading import layer_by_layer, placing

    config, empty = inspect(folder, max_length=max_length, targets=targets, rank=rank, options=options)
    check_weights(folder, config, empty)
    packed_attention.register()
    quantization_options = {}
    if quantization == "nf4" and not quantized and not getattr(config, "quantization_config", None):
        # weights that are already quantized, in the job's cache or the user's folder, name their quantization
        quantization_options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quantization,
            bnb_4bit_compute_dtype=dtype,
        )
    apart = quantized and experts.has_files(folder)
    kinds = experts.kinds_of(empty) if quantization_options or apart else experts.Kinds()
    with ExitStack() as stack:
        stack.enter_context(loading_weights(folder))
        if kinds:
            kept, fresh = experts.left_out, experts.quantizing
            stack.enter_context(kept(kinds, empty) if apart else fresh(kinds, double=double_quantization))
            stack.enter_context(layer_by_layer())
        placed = None if placement == "gpu" else stack.enter_context(placing(placement, device, group, kinds))
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=PLAIN,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **quantization_options,
        )
        if apart:
            experts.load_experts(model, folder, device)
    _check_loaded(folder, model, loading_info)
    model.config.use_cache = False
    _set_dtype(model, dtype)
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks a layer's weights for inference the first time it runs in
        # evaluation mode, in bf16 and without a gradient: training after an evaluation would be silently wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "compute_dtype"):  # a base that came quantized names the dtype of the machine it was made on
            module.compute_dtype = dtype
        if isinstance(module, _dropouts()):
            module.p = 0.0  # type: ignore[attr-defined]
        if any("jitter" in name and isinstance(value, float) and value for name, value in vars(module).items()):
            # A router that adds noise in training, or draws experts at random (Phi-MoE): it stays in evaluation mode.
            # Its rate is unchanged, since some routers evaluate by it.
            module.training = False
            module.train = MethodType(_train_parts, module)
    packed_attention.use(model, packed_attention.NAME)
    if placed is not None:
        placed.finish(model)
    experts.finish(model)
    use_frozen(model, dtype)
    return model


def _check_loaded(folder: Path, model: Any, loading_info: dict[str, Any]) -> None:
    """Refuses a model of which weights are missing, of another shape, or not quantized as its config.json says.

    Weights that the model has no place for are a warning: a model for text may leave out those for images, but a
    config.json with too few layers, or without biases, would train another model than the folder holds.

    Raises:
        DataError: It is.
    """
    if missing := sorted(loading_info["missing_keys"]):  # transformers would silently initialize them at random
        message = f"{folder} lacks {len(missing)} weights of {type(model).__name__}: {', '.join(missing[:5])}"
        raise DataError([Problem("JOB_MODEL__ID", message)])
    if unused := sorted(loading_info["unexpected_keys"]):
        message = "weights of the base are not used: its config.json describes a model without them"
        log.get_logger().warning(message, folder=str(folder), weights=len(unused), first=unused[:5])
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if (
        getattr(model.config, "tie_word_embeddings", False)
        and head is not None
        and head.weight is not embeddings.weight
    ):
        log.get_logger().warning(
            "the base has an output layer, and config.json says that it is the embedding: this job uses the layer",
            folder=str(folder),
            change="tie_word_embeddings: false in config.json; else a server may use the embedding",
        )
    layers = {name: module for name, module in model.named_modules() if _is_bitsandbytes(module)}
    if plain := [name for name, layer in layers.items() if not is_quantized(layer.weight)]:
        message = f"{folder} has a config.json for quantized weights, but those of {plain[0]} are not quantized"
        raise DataError([Problem("JOB_MODEL__ID", message)])
    # transformers compares shapes, but not of weights that it quantizes.
    for name, layer in layers.items():
        held, needed = getattr(layer.weight, "quant_state", None), (layer.out_features, layer.in_features)
        if held is not None and tuple(held.shape) != needed:
            message = f"{folder} has no model that can be loaded: {name}.weight has the shape {tuple(held.shape)}"
            raise DataError([Problem("JOB_MODEL__ID", f"{message} instead of {needed}")])


def inspect(
    folder: Path,
    *,
    max_length: int,
    targets: Sequence[str] | str | None,
    rank: int = 1,
    options: AdapterOptions = PLAIN_LORA,
    problems: Callable[[Any, Any], Iterable[Problem]] = lambda _config, _empty: (),
) -> tuple[Any, Any]:
    """A model without its weights: its configuration, and the model on the meta device.

    Args:
        folder: Holds config.json at least.
        max_length: Longest sequence in tokens.
        targets: Names of the layers to adapt, as `resolve_targets` takes them.
        rank: The adapter's rank.
        options: The adapter's options.
        problems: What else of the settings this model excludes, by its configuration and the model on the meta device.

    Raises:
        DataError: config.json describes no model that can be built.
        SettingsError: It is of a kind that is not trained here; or with all problems: it has fewer positions, cannot
            have this adapter, or has one of `problems`.
    """
    config = read_config(folder)
    silence(config)
    empty = build_empty(folder, config)
    check_all(
        (
            ("positions", lambda: check_positions(config, max_length)),
            ("adapter", lambda: check_adapter(empty, resolve_targets(empty, targets), rank, options)),
            ("settings", lambda: raise_problems(problems(config, empty))),
        )
    )
    return config, empty


def _train_parts(module: Any, mode: bool = True) -> Any:  # noqa: FBT001, FBT002 - torch's signature
    """In place of a module's `train`: sets the mode of its parts (an adapter's dropout), and leaves its own."""
    for part in module.children():
        part.train(mode)
    return module


def _set_dtype(model: Any, dtype: torch.dtype) -> None:
    """Casts what is not quantized in a base that came quantized: transformers leaves it in the dtype of the file.

    Otherwise a base saved in bf16 would compute in bf16 in spite of the requested dtype, on GPUs that have no bf16 too.
    What the model's class keeps in fp32 is cast to that.
    """
    held_in = dtype_by_name(model, dtype)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not is_quantized(parameter):
            parameter.data = parameter.data.to(held_in(name))


def dtype_by_name(model: Any, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """The dtype of a parameter, by its name, in a model that is loaded in `dtype`: fp32 for what its class keeps so."""
    kept = model._get_dtype_plan(dtype)  # noqa: SLF001 - the one place that knows: patterns of names -> dtype
    return lambda name: next((own for pattern, own in kept.items() if re.search(pattern, name)), dtype)


def _is_bitsandbytes(module: Any) -> bool:
    """Whether it is a quantized linear layer."""
    return type(module).__module__.startswith("bitsandbytes.") and getattr(module, "weight", None) is not None


def is_quantized(parameter: Any) -> bool:
    """Whether bitsandbytes holds it; its storage may be of a floating-point dtype."""
    return getattr(parameter, "quant_state", None) is not None or type(parameter).__name__ == "Int8Params"


def _dropouts() -> tuple[type, ...]:
    """Dropout modules of torch: rates that a model's class sets, not its configuration."""
    from torch import nn

    return nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout


def check_positions(config: Any, max_length: int) -> None:
    """Refuses sequences of more tokens than the model has positions; a sliding window is no limit.

    Raises:
        SettingsError: `max_length` is more than that.
    """
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < max_length:
        what = f"{max_length} is more than the model's window of {positions} tokens; lower it"
        raise SettingsError([Problem("JOB_TRAIN__MAX_LENGTH", what)])
