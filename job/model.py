"""The model: tokenizer, quantized base, adapter. The only room that knows peft and bitsandbytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import DataError, Problem, SettingsError
from job.records import ModelRecord

if TYPE_CHECKING:
    import torch

    from job.kernels import Kernels

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def make_deterministic() -> None:
    """Makes a GPU give the same bits every time; an operation that cannot is an error, not a surprise.

    `warn_only` would not do: torch's flash attention takes its deterministic way only without it. cuBLAS also needs
    CUBLAS_WORKSPACE_CONFIG, which has to be set before CUDA starts. torch would then also fill fresh memory, to show
    reads of what nobody wrote; that takes 6 % of a step's time and changes no bit.
    """
    import torch

    torch.use_deterministic_algorithms(mode=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def choose_device(wanted: str = "auto") -> torch.device:
    """The GPU of this process, which sees no other (`cli` sees to that), else the CPU.

    Raises:
        SettingsError: It was to be a GPU, and there is none.
    """
    import torch

    if wanted != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if wanted == "gpu":
        what = "is gpu, and torch sees none; give the job a GPU, or run.device=cpu if it shall run without"
        raise SettingsError([Problem("run.device", what)])
    return torch.device("cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype: what was asked for, or for `auto` bf16 where the GPU has it, else fp16; fp32 on a CPU."""
    import torch

    if name == "auto":
        if device.type != "cuda":
            name = "fp32"
        else:
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turns what transformers says of a folder that holds no model, or a broken one, into an error about data."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError([Problem("model.id", f"{folder} holds no model that can be loaded: {first[:300]}")]) from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that lies beside the model. It never runs code of the model's repository."""
    from transformers import AutoTokenizer

    with _readable(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise SettingsError([Problem("model.id", "its tokenizer has no end-of-sequence token, so nothing could end")])
    return tokenizer


def load_base(
    folder: Path,
    *,
    quantization: str,
    double_quantization: bool,
    dtype: torch.dtype,
    device: torch.device,
    max_length: int,
) -> Any:
    """Loads the frozen base, quantized on the way in, ready for flat rows.

    Args:
        folder: A local folder in the hub's layout; weights in safetensors only, never pickles.
        quantization: `nf4` or `none`.
        double_quantization: Whether the quantization constants are quantized too.
        dtype: What the 4-bit weights are dequantized to, and what the other weights are held in.
        device: Where it goes.
        max_length: Longest sequence in tokens; a model with a shorter window is refused.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    from job import attention

    with _readable(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    window = min(
        getattr(config, "sliding_window", None) or max_length, getattr(config, "max_position_embeddings", max_length)
    )
    if window < max_length:
        raise SettingsError(
            [Problem("train.max_length", f"{max_length} is more than the model's window of {window} tokens; lower it")]
        )
    attention.register()
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )
    with _readable(folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=quantized if quantization == "nf4" else None,
            attn_implementation=attention.NAME,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
        )
    model.config.use_cache = False
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks a layer's weights for inference the first time it runs in
        # evaluation mode, in bf16 and without a gradient: training after an evaluation would be silently wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def add_adapter(model: Any, *, rank: int, alpha: int, dropout: float, target_modules: Sequence[str], seed: int) -> Any:
    """Wraps the base in a fresh LoRA adapter in fp32, whose initial weights depend on the seed alone.

    The adapter stays in fp32 whatever the base is: rounding it would make a resumed run differ from a whole one.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if missing := [name for name in target_modules if name not in linear]:
        fix = f"it has {', '.join(sorted(linear))}"
        raise SettingsError([Problem("lora.target_modules", f"the model has no linear {', '.join(missing)}; {fix}")])
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    for parameter in trainable(adapted).values():
        parameter.data = parameter.data.to(torch.float32)
    return adapted


def make_lean(model: Any, *, keep_dequantized: bool, kernels: Kernels | None) -> str:
    """Replaces the forward of the adapted layers, and of what lies between them, by that of `lean`.

    Args:
        model: A PEFT model over a base loaded with flat attention.
        keep_dequantized: Whether the base's weights are dequantized once and kept, or anew for each use. The products
            are the same, bit by bit.
        kernels: What lies between the layers is computed by; None leaves it as it is.

    Returns:
        How far it got: `all`; `layers` where the decoder is not one that it knows, and only the adapted layers were
        replaced; `nothing` where there is dropout, which is left to PEFT.
    """
    from peft.tuners.lora import LoraLayer

    from job import lean

    base = model.get_base_model()
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not all(lean.fits(module) for module in adapted):
        return "nothing"
    weights = {module: _Frozen(module.get_base_layer(), base.dtype, keep=keep_dequantized) for module in adapted}
    return "all" if lean.adapt(base, weights, base.dtype, kernels) else "layers"


class _Frozen:
    """Gives the weight of a linear layer of the base, in `dtype`: kept, or dequantized for each use."""

    def __init__(self, layer: Any, dtype: torch.dtype, *, keep: bool) -> None:
        self._layer, self._dtype = layer, dtype
        self._kept = self._made() if keep else None

    def __call__(self) -> torch.Tensor:
        """The weight."""
        return self._made() if self._kept is None else self._kept

    def forget(self) -> None:
        """Dequantizes for each use from now on."""
        self._kept = None

    def _made(self) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight: torch.Tensor = self._layer.weight
        if getattr(weight, "quant_state", None) is None:
            return weight
        values: torch.Tensor = dequantize_4bit(weight.data, self._layer.weight.quant_state)
        return values.to(self._dtype)


def forget_dequantized(model: Any) -> None:
    """Has a lean model dequantize its base's weights for each use, and frees the kept ones."""
    for module in model.modules():
        if (group := module.__dict__.get("lean")) is not None:
            for layer in group.layers:
                layer.weight.forget()


def trainable(model: Any) -> dict[str, Any]:
    """The adapter's parameters by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def recompute_activations(model: Any, *, on: bool, random: bool = True) -> None:
    """Switches activation (gradient) checkpointing: less memory for about a third more time.

    Args:
        model: A PEFT model.
        on: Whether activations are computed again, or kept.
        random: Whether anything is drawn at random on the way, which then has to be drawn again.
    """
    base = model.get_base_model()
    if on:
        # transformers renamed it in 5.23; the model is an argument of neither name
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": random})
    else:
        (getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable)()


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Within it the model is its base: the same loaded weights, adapter switched off."""
    with model.disable_adapter():
        yield


def save_adapter(model: Any, folder: Path, *, base: str, revision: str | None) -> None:
    """Writes the adapter in PEFT's layout; `PeftModel.from_pretrained(base, folder)` loads it.

    Without the card that PEFT puts beside it, which is a form to fill in: ours needs the evaluation, and comes later.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base, revision
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written["target_modules"] = sorted(written["target_modules"])  # PEFT keeps a set, in another order every time
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(model: Any, folder: Path) -> None:
    """Puts saved adapter weights into the model, bit by bit; a missing or unexpected tensor is an error."""
    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    state = load_file(folder / "adapter_model.safetensors", device="cpu")
    expected = get_peft_model_state_dict(model)
    wrong = sorted(
        expected.keys() ^ state.keys()
        | {k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape}
    )
    if wrong:
        raise ValueError(f"the adapter in {folder} is not of this model: {', '.join(wrong[:5])}")
    with torch.no_grad():
        set_peft_model_state_dict(model, state)


def fingerprint(folder: Path) -> str:
    """SHA-256 over names and contents of the files that make the model: weights, configuration, tokenizer."""
    total = hashlib.sha256()
    files = sorted(p for p in folder.iterdir() if p.suffix in {".safetensors", ".json", ".model", ".jinja"})
    for path in files:
        with path.open("rb") as file:
            total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def describe_model(
    model: Any, *, name: str, revision: str | None, sha256: str, quantization: str, double: bool
) -> ModelRecord:
    """What the manifest says of the model. Parameters are counted as of the unquantized model."""
    adapter = sum(parameter.numel() for parameter in trainable(model).values())
    dtype = str(model.get_base_model().dtype).removeprefix("torch.")
    return ModelRecord(
        id=name,
        revision=revision,
        sha256=sha256,
        architecture=type(model.get_base_model()).__name__,
        quantization=quantization,
        double_quantization=double and quantization != "none",
        dtype={long: short for short, long in DTYPES.items()}[dtype],
        parameters=model.get_base_model().num_parameters() - adapter,
        trainable_parameters=adapter,
    )
