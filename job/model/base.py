"""Loads the tokenizer and the quantized base, and chooses the device and the compute dtype."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from job import log
from job.errors import DataError, Problem, SettingsError
from job.model.adapter_options import PLAIN as PLAIN_LORA
from job.model.adapter_options import AdapterOptions
from job.model.decomposed_init import frozen_parameters
from job.model.files import (
    MAX_CONFIG_BYTES,
    build_empty,
    check_numbers,
    check_sizes,
    check_weights,
    read_config,
    read_json,
    readable,
    silence,
)
from job.model.lora import trainable
from job.model.target_modules import check_adapter, resolve_targets
from job.model.tokenizer_files import add_tokens
from job.records import ModelRecord

if TYPE_CHECKING:
    import torch

    from job.model.placed_weights import AllGather

PLAIN = "eager"
"""transformers' attention without a fused kernel (softmax(QK')V), which all its models have: the reference for packed
attention, and used in place of it where it is not correct."""
_PROBES = ("It's one of two words,  said 2023 men.\n", "\tx = 650841823", "un caf\u00e9 \u4e2d\u6587")
"""Texts on which tokenizers are compared: words, several spaces, digits, other scripts."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def make_deterministic() -> None:
    """Makes a GPU's results bit-for-bit reproducible; an operation that cannot be raises an error.

    `warn_only` does not suffice: torch's flash attention uses its deterministic algorithm only without it. cuBLAS also
    needs CUBLAS_WORKSPACE_CONFIG, which has to be set before CUDA starts. By default torch would also fill new memory,
    to reveal reads of uninitialized memory; that takes 6 % of a step's time and changes no bit, so it is off.
    """
    import torch

    torch.use_deterministic_algorithms(mode=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def choose_device(wanted: str = "auto") -> torch.device:
    """The GPU of this process, which sees no other (`cli` sees to that), else the CPU.

    Raises:
        SettingsError: A GPU is required by the settings, and there is none.
    """
    import torch

    if wanted != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if wanted == "gpu":
        what = "is gpu, and torch sees none; give the job a GPU, or JOB_RUN__DEVICE=cpu if it shall run without"
        raise SettingsError([Problem("JOB_RUN__DEVICE", what)])
    return torch.device("cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype: the setting, or for `auto` bf16 on a GPU that has it, else fp16; fp32 on a CPU."""
    import torch

    if name == "auto":
        if device.type != "cuda":
            name = "fp32"
        else:
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


def load_tokenizer(folder: Path, added_tokens: Sequence[str] | None = None) -> Any:
    """The tokenizer in the model's folder, with new tokens. It never runs code of the model's repository.

    Raises:
        DataError: It cannot be loaded, or the config.json beside it is broken.
        SettingsError: It has no end-of-sequence token, or a new token is none.
    """
    from transformers import AutoTokenizer

    if (folder / "config.json").is_file():  # it says which class the tokenizer is of, and transformers reads all of it
        check_numbers(folder, read_json(folder / "config.json", MAX_CONFIG_BYTES))
    check_sizes(folder)
    with readable(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        _check_against_file(folder, tokenizer)
    if tokenizer.eos_token_id is None:
        raise SettingsError(
            [Problem("JOB_MODEL__ID", "its tokenizer has no end-of-sequence token, so nothing could end")]
        )
    if _is_invented(folder, str(tokenizer.eos_token)):
        log.get_logger().warning(
            "the tokenizer's end-of-sequence token is none of its tokens: it was added with a new id, of which the"
            " model has learned nothing; correct eos_token in tokenizer_config.json",
            token=tokenizer.eos_token,
            id=tokenizer.eos_token_id,
        )
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(model, "dropout", None):  # tokens drawn anew in every attempt would be other data each time
        log.get_logger().warning(
            "the tokenizer's dropout is switched off: a text has one form in tokens", was=model.dropout
        )
        model.dropout = None
    add_tokens(tokenizer, added_tokens or ())
    return tokenizer


def _check_against_file(folder: Path, tokenizer: Any) -> None:
    """Compares the tokens of a few texts with those that the model's tokenizer.json gives.

    Transformers 5 builds the tokenizers of some classes anew from the file's vocabulary, by the rules of the class. If
    the file has other rules, words are split otherwise than the model learned them, or spaces vanish
    (huggingface/transformers#45488 and #45920). tokenizer_config.json or the architecture names the class.

    Raises:
        DataError: Text that the file's tokenizer keeps is lost.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file, used = folder / "tokenizer.json", getattr(tokenizer, "backend_tokenizer", None)
    if used is None or type(tokenizer) is PreTrainedTokenizerFast or not file.is_file():  # that class takes it as it is
        return
    own = Tokenizer.from_file(str(file))
    own.no_truncation()
    own.no_padding()
    kind = type(tokenizer).__name__
    for text in _PROBES:
        found, expected = (one.encode(text, add_special_tokens=False).ids for one in (used, own))
        if found == expected:
            continue
        if own.decode(expected).strip() == text.strip() != used.decode(found).strip():
            what = (
                f"is not followed by this version of transformers: its class {kind} makes {used.decode(found)!r} of"
                f" {text!r}, and the model would learn that; give a base whose tokenizer fits its class"
            )
            raise DataError([Problem(str(file), what)])
        log.get_logger().warning(
            "the tokenizer splits text otherwise than the model's tokenizer.json: its class has rules of its own",
            tokenizer_class=kind,
            text=text,
            tokens=found,
            tokens_of_file=expected,
        )
        return


def _is_invented(folder: Path, token: str) -> bool:
    """Whether none of the tokenizer's files but the name of the special token has this token; transformers adds it."""
    if not (folder / "tokenizer.json").is_file():
        return False
    files = [folder / name for name in ("tokenizer.json", "added_tokens.json")]
    text = "".join(file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file())
    settings = folder / "tokenizer_config.json"
    added = read_json(settings, MAX_CONFIG_BYTES).get("added_tokens_decoder") if settings.is_file() else None
    text += json.dumps(added, ensure_ascii=False)
    return not any(json.dumps(token, ensure_ascii=escaped) in text for escaped in (True, False))


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
        quantization: `nf4` or `none`. Weights that lie there quantized by bitsandbytes are taken as they are.
        double_quantization: Whether the quantization constants are quantized too.
        dtype: What the 4-bit weights are dequantized to, and what the other weights are held in.
        device: Where the model is placed.
        max_length: Longest sequence in tokens; a model with fewer positions is refused.
        quantized: Whether the folder holds the quantized base, as it was saved.
        targets: Layers that will get an adapter; checked to exist before weights are loaded.
        rank: Of the adapter, which is checked as well.
        options: Of the adapter.
        placement: Where the 4-bit weights of the decoder's layers lie: `gpu` for the device, `sharded` or `host`. In
            the last two a layer goes there as soon as it is loaded.
        group: The processes that load the same base now, where `placement` is `sharded`.

    Raises:
        DataError: The folder holds no complete model.
        SettingsError: As `inspect`; or there are no such weights.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from job.model import experts, packed_attention
    from job.model.fused.experts import use_frozen
    from job.model.placed_loading import layer_by_layer, placing

    config, empty = inspect(folder, max_length=max_length, targets=targets, rank=rank, options=options)
    check_weights(folder, config, empty)
    packed_attention.register()
    how = {}
    if quantization == "nf4" and not quantized and not getattr(config, "quantization_config", None):
        # what lies there quantized, be it the job's own cache or the user's, says how by itself
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quantization,
            bnb_4bit_compute_dtype=dtype,
        )
    apart = quantized and experts.has_files(folder)
    kinds = experts.kinds_of(empty) if how or apart else experts.Kinds()
    with ExitStack() as stack:
        stack.enter_context(readable(folder))
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
            **how,
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
            # Its rate is left as it is, since some routers evaluate by it.
            module.training = False
            module.train = MethodType(_train_parts, module)
    packed_attention.use(model, packed_attention.NAME)
    if placed is not None:
        placed.finish(model)
    experts.finish(model)
    use_frozen(model, dtype)
    return model


def _check_loaded(folder: Path, model: Any, loading_info: dict[str, Any]) -> None:
    """Refuses a model of which weights are missing, or not quantized as its config.json says.

    Weights that the model has no place for are a warning: a model for text may leave out those for images, but a
    config.json with too few layers, or without biases, would train another model than the folder holds.

    Raises:
        DataError: It is.
    """
    if missing := sorted(loading_info["missing_keys"]):  # transformers would silently initialize them at random
        what = f"{folder} lacks {len(missing)} weights of {type(model).__name__}: {', '.join(missing[:5])}"
        raise DataError([Problem("JOB_MODEL__ID", what)])
    if unused := sorted(loading_info["unexpected_keys"]):
        what = "weights of the base are not used: its config.json describes a model without them"
        log.get_logger().warning(what, folder=str(folder), weights=len(unused), first=unused[:5])
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
        what = f"{folder} has a config.json that says its weights are quantized, and those of {plain[0]} are not"
        raise DataError([Problem("JOB_MODEL__ID", what)])


def inspect(
    folder: Path,
    *,
    max_length: int,
    targets: Sequence[str] | str | None,
    rank: int = 1,
    options: AdapterOptions = PLAIN_LORA,
) -> tuple[Any, Any]:
    """What is known of a model without its weights: its configuration, and the model on the meta device.

    Args:
        folder: Holds config.json at least.
        max_length: Longest sequence in tokens.
        targets: Names of the layers to adapt, as `resolve_targets` takes them.
        rank: Of the adapter.
        options: Of the adapter.

    Raises:
        DataError: config.json describes no model that can be built.
        SettingsError: It is of a kind that is not trained here, has fewer positions, or cannot have this adapter.
    """
    config = read_config(folder)
    silence(config)
    check_positions(config, max_length)
    empty = build_empty(folder, config)
    check_adapter(empty, resolve_targets(empty, targets), rank, options)
    return config, empty


def _train_parts(module: Any, mode: bool = True) -> Any:  # noqa: FBT001, FBT002 - torch's signature
    """In place of a module's `train`: sets the mode of its parts (an adapter's dropout), and leaves its own."""
    for part in module.children():
        part.train(mode)
    return module


def _set_dtype(model: Any, dtype: torch.dtype) -> None:
    """Casts what is not quantized in a base that came quantized: transformers leaves it in the dtype of the file.

    Otherwise a base saved in bf16 would compute in bf16 whatever was asked for, on GPUs that have no bf16 too. What the
    model's class keeps in fp32 is cast to that.
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
    """Dropout modules of torch: rates that a model's class sets by itself, not by its configuration."""
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


def recompute_activations(model: Any, *, on: bool, random: bool = True) -> None:
    """Switches activation (gradient) checkpointing: less memory for about a third more time.

    Args:
        model: A PEFT model.
        on: Whether activations are computed again, or kept.
        random: Whether anything is drawn at random on the way, which then has to be drawn again.
    """
    base = model.get_base_model()
    if on and not base.supports_gradient_checkpointing:
        name = type(base).__name__
        log.get_logger().warning("activations are kept: this model does not support recomputing them", model=name)
        return
    if on:
        # transformers renamed it in 5.23; the model is an argument of neither name
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": random})
        # For reentrant recomputing, transformers has the embeddings require a gradient, which nothing here uses, and
        # under which a model that adds to them in place (BLT) fails.
        base.disable_input_require_grads()
    elif base.supports_gradient_checkpointing:
        (getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable)()


@dataclass(frozen=True)
class Held:
    """How the base's weights are held: as what, and how many of them."""

    quantization: str
    """`nf4`, `fp4`, `int8`, or `none`; that of most, where there are several."""
    double: bool
    weights: int


def held(model: Any) -> Held:
    """Inspects the loaded layers, since neither the settings nor config.json have to agree with them.

    Of a mixture the experts are among them, which are no linear layers.
    """
    found: Counter[tuple[str, bool]] = Counter()
    for weight in model.parameters():
        if (state := getattr(weight, "quant_state", None)) is not None:
            found[state.quant_type, state.nested] += state.shape.numel()
        elif type(weight).__name__ == "Int8Params":
            found["int8", False] += weight.numel()
    if not found:
        return Held("none", double=False, weights=0)
    (kind, double), _ = found.most_common(1)[0]
    return Held(kind, double, found.total())


def describe_model(
    model: Any, *, name: str, revision: str | None, sha256: str, added_tokens: Sequence[str] = ()
) -> ModelRecord:
    """The manifest's record of a PEFT model. Parameters are counted as in the unquantized model."""
    from job.model.experts import expert_parameters, idle_experts
    from job.model.fused.experts import adapter_of_experts

    adapter = sum(parameter.numel() for parameter in trainable(model).values())
    base = model.get_base_model()
    as_held, config = held(base), model.peft_config["default"]
    idle = idle_experts(base)
    return ModelRecord(
        id=name,
        revision=revision,
        sha256=sha256,
        architecture=type(base).__name__,
        quantization=as_held.quantization,
        double_quantization=as_held.double,
        dtype={long: short for short, long in DTYPES.items()}[str(base.dtype).removeprefix("torch.")],
        parameters=base.num_parameters() - adapter,
        trainable_parameters=adapter - frozen_parameters(model),
        quantized_parameters=as_held.weights,
        idle_parameters=round(idle * expert_parameters(base)),
        idle_trainable_parameters=round(idle * adapter_of_experts(model)),
        adapted=sorted({*config.target_modules, *(config.target_parameters or ())}),
        added_tokens=list(added_tokens),
    )
