"""The model: its tokenizer, its quantized base, what it is computed on and in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.common.hashing import hash_files
from job.errors import DataError, Problem, SettingsError
from job.model.lora import trainable
from job.records import ModelRecord

if TYPE_CHECKING:
    import torch

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
    quantized: bool = False,
) -> Any:
    """Loads the frozen base, quantized on the way in, ready for flat rows.

    Args:
        folder: A local folder in the hub's layout; weights in safetensors only, never pickles.
        quantization: `nf4` or `none`.
        double_quantization: Whether the quantization constants are quantized too.
        dtype: What the 4-bit weights are dequantized to, and what the other weights are held in.
        device: Where it goes.
        max_length: Longest sequence in tokens; a model with a shorter window is refused.
        quantized: Whether the folder holds the quantized base, as it was saved.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    from job.model import packed_attention

    with _readable(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    window = min(
        getattr(config, "sliding_window", None) or max_length, getattr(config, "max_position_embeddings", max_length)
    )
    if window < max_length:
        raise SettingsError(
            [Problem("train.max_length", f"{max_length} is more than the model's window of {window} tokens; lower it")]
        )
    packed_attention.register()
    how = {}
    if quantization == "nf4" and not quantized:  # what was saved quantized says so itself, unless it is told anything
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quantization,
            bnb_4bit_compute_dtype=dtype,
        )
    with _readable(folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=packed_attention.NAME,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            **how,
        )
    model.config.use_cache = False
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks a layer's weights for inference the first time it runs in
        # evaluation mode, in bf16 and without a gradient: training after an evaluation would be silently wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


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


def fingerprint(folder: Path) -> str:
    """SHA-256 over names and contents of the files that make the model: weights, configuration, tokenizer."""
    total = hashlib.sha256()
    files = sorted(
        p
        for p in folder.iterdir()
        if p.suffix in {".safetensors", ".json", ".model", ".jinja"} or p.name == "merges.txt"
    )
    for path, sha256 in zip(files, hash_files(files), strict=True):
        total.update(f"{path.name}\0{sha256}\n".encode())
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
