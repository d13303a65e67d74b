"""The files of a model: which of them are loaded, and how they are validated. Nothing here loads weights.

A model's folder is untrusted: only files inside the folder are read, configuration keys that control loading are
dropped, and an invalid configuration is refused with a message before memory or time is spent on it.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from job.common.disk import is_of_the_machine
from job.common.hashing import hash_files
from job.common.out_of_memory import says_full
from job.errors import DataError, JobError, Problem, SettingsError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SOURCE_CONFIG = "source_config.json"
"""The base's own config.json, next to the one that the quantized base was saved with, which may be of another class."""
MAX_CONFIG_BYTES = 16 << 20
MAX_INDEX_BYTES = 256 << 20
MAX_TOKENIZER_BYTES = {"tokenizer.json": 256 << 20, "chat_template.jinja": 16 << 20, "tokenizer_config.json": 16 << 20}
"""Upper limits of files that transformers reads as a whole, and templates more than once."""
MAX_LAYERS = 10_000
MAX_WIDE = 100_000_000
"""Upper limit of any dimension in config.json: a larger one is invalid, and building the model would not end."""
MAX_LABELS = 1_000_000
"""Upper limit of `num_labels`, which a language model does not use: transformers names each of them."""
_LOADABLE = {"bitsandbytes"}
"""Quantization methods whose weights can be used for training. For others the user needs the unquantized model."""
_STEERING = {
    "attn_implementation",
    "auto_map",
    "dtype",
    "experts_implementation",
    "kernel_config",
    "return_dict",
    "torch_dtype",
    "torchscript",
    "use_kernels",
}
"""Keys of config.json that say how to load or to compute, not what the model is: the job decides that."""
_WEIGHT_DTYPES = {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "auto", "half", "float"}
_RANDOM = ("dropout", "pdrop", "layerdrop", "drop_path")
_NEVER_ZERO = {"num_attention_heads", "hidden_size", "n_head", "n_embd", "vocab_size"}
_PLAIN_NUMBERS = {"F64", "F32", "F16", "BF16"}
"""Types of safetensors whose numbers are the weights themselves."""
_PACKED_WEIGHTS = 8
"""The largest factor by which a quantized model's files have fewer numbers than the model."""


@contextmanager
def readable(
    folder: Path,
    message: str = "has no model that can be loaded",
    *,
    is_of_files: Callable[[Exception], bool] = lambda _: True,
) -> Iterator[None]:
    """Turns exceptions of libraries about a missing or broken model into a DataError.

    Transformers raises nearly every built-in exception for some broken file. Errors of the machine, such as too little
    memory, a file that may not be read or a disk that fails, are not caught.

    Args:
        folder: The model's.
        message: What is wrong with it.
        is_of_files: Whether an exception is about files at all; see `loading_errors`.

    Raises:
        DataError: Anything else was raised within.
    """
    import torch

    try:
        yield
    except (JobError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        if is_of_the_machine(error) or says_full(error) or not is_of_files(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        first = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        raise DataError([Problem("JOB_MODEL__ID", f"{folder} {message}: {first[:300]}")]) from error


def check_sizes(folder: Path) -> None:
    """Refuses files of a tokenizer that are larger than any tokenizer's.

    Raises:
        DataError: They are.
    """
    sizes = {name: (folder / name).stat().st_size for name in MAX_TOKENIZER_BYTES if (folder / name).is_file()}
    if large := [name for name, size in sizes.items() if size > MAX_TOKENIZER_BYTES[name]]:
        what = ", ".join(f"{name} of {sizes[name]:,} bytes" for name in large)
        raise DataError([Problem("JOB_MODEL__ID", f"{folder} has a {what}, which is too large for a tokenizer")])


def read_json(path: Path, most: int, setting: str = "JOB_MODEL__ID") -> dict[str, Any]:
    """A JSON object of the folder of a model, or of an adapter, which `setting` named.

    Raises:
        DataError: It is missing, larger than `most` bytes, or no JSON object.
    """

    def wrong(reason: str) -> DataError:
        return DataError([Problem(setting, f"{path.parent} has no {path.name} that can be read: {reason}")])

    try:
        if (size := path.stat().st_size) > most:
            raise wrong(f"it has {size} bytes, more than {most}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if is_of_the_machine(error):
            raise
        raise wrong(str(error)) from error
    if not isinstance(content, dict):
        raise wrong("it holds no object")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The files that the weights are loaded from: `model.safetensors`, else those that its index names.

    Raises:
        DataError: There are none, or the index names one that is not a safetensors file of this folder.
    """
    if (whole := folder / WEIGHTS).is_file():
        return [whole]
    if not (folder / INDEX).is_file():
        raise DataError([Problem("JOB_MODEL__ID", f"{folder} has no weights in safetensors ({WEIGHTS}, or {INDEX})")])
    file_of = read_json(folder / INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(file_of, dict) or not file_of or not all(isinstance(name, str) for name in file_of.values()):
        raise DataError([Problem("JOB_MODEL__ID", f"{folder / INDEX} lists no weight files")])
    problems = []
    for name in sorted(set(file_of.values())):
        if name != Path(name).name or not name.endswith(".safetensors") or "\\" in name or "\0" in name:
            reason = "is not a safetensors file in its folder"
        elif not (folder / name).is_file():
            reason = "is missing"
        else:
            continue
        problems.append(Problem("JOB_MODEL__ID", f"{INDEX} in {folder} names {name[:200]!r}, which {reason}"))
    if problems:
        raise DataError(problems)
    return [folder / name for name in sorted(set(file_of.values()))]


def fingerprint(folder: Path) -> str:
    """SHA-256 over names and contents of the files that make the model: weights, configuration, tokenizer.

    Of weights exactly those that are loaded.

    Raises:
        DataError: As `weight_files`.
    """
    total = hashlib.sha256()
    kinds = {".json", ".model", ".jinja"}
    small = [p for p in folder.iterdir() if p.is_file() and (p.suffix in kinds or p.name == "merges.txt")]
    files = sorted({*small, *weight_files(folder)})
    for path, sha256 in zip(files, hash_files(files), strict=True):
        total.update(f"{path.name}\0{sha256}\n".encode())
    return total.hexdigest()


def read_config(folder: Path, name: str = "config.json") -> Any:
    """The model's configuration, as transformers has it, without what would steer loading, and without dropout.

    The reference recipe has only LoRA's dropout; dropout in the base would change the recipe.

    Raises:
        DataError: config.json is missing, broken, or describes no model that could be built.
        SettingsError: The model is not of a kind that is trained here.
    """
    from transformers import AutoConfig

    content = read_json(folder / name, MAX_CONFIG_BYTES)
    _check_kind(folder, content)
    check_numbers(folder, content)
    with readable(folder, "has a config.json that does not describe a model"), tempfile.TemporaryDirectory() as cleaned:
        (Path(cleaned) / "config.json").write_text(json.dumps(_cleaned(content)), encoding="utf-8")
        return AutoConfig.from_pretrained(cleaned, trust_remote_code=False)


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses everything but a causal language model whose weights are unquantized or quantized by bitsandbytes."""
    problems = []
    if (folder / "adapter_config.json").exists():
        problems.append("has an adapter (adapter_config.json) instead of a model: give its base, or merge the two")
    if not isinstance(config.get("model_type"), str):
        problems.append("has a config.json without a model_type")
    if config.get("is_encoder_decoder") is True:
        problems.append(f"has an encoder-decoder model ({config.get('model_type')}); give a causal language model")
    if (method := quantization_method(config)) not in {None, *_LOADABLE}:
        problems.append(f"is quantized as {method}, which cannot be trained on; give the original, unquantized model")
    for key in ("dtype", "torch_dtype"):
        named = config.get(key)
        if named is not None and not (isinstance(named, str) and named.removeprefix("torch.") in _WEIGHT_DTYPES):
            problems.append(f"has a config.json whose {key} is not a dtype of weights: {str(named)[:100]!r}")
    if problems:
        raise SettingsError([Problem("JOB_MODEL__ID", f"{folder} {problem}") for problem in problems])


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """How a config.json says that the weights are quantized, of the whole model or of its text part."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and (said := part.get("quantization_config")):
            method = said.get("quant_method") if isinstance(said, dict) else None
            if method is None and isinstance(said, dict) and (said.get("load_in_4bit") or said.get("load_in_8bit")):
                method = "bitsandbytes"
            return str(method or "something unknown")[:50]
    return None


def in_eight_bits(published: Any) -> bool:
    """Whether a `quantization_config` of config.json is bitsandbytes' of 8 bits."""
    return isinstance(published, dict) and published.get("load_in_8bit") is True


def check_numbers(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses shapes that no model has: building 10^12 layers would take for ever, and 0 heads end in a division.

    Raises:
        DataError: A number of the folder's config.json is none that a model has.
    """
    problems = []
    for key, value in _numbers(config):
        name = key.rsplit(".", 1)[-1]
        if "layer" in name and name.startswith(("num_", "n_")):
            plausible = 0 <= value <= MAX_LAYERS
        elif name == "num_labels":
            plausible = 0 <= value <= MAX_LABELS
        elif name in _NEVER_ZERO:
            plausible = 0 < value <= MAX_WIDE
        else:
            plausible = not name.endswith(("_size", "_dim", "_heads", "_experts")) or abs(value) <= MAX_WIDE
        if not plausible:
            problems.append(f"{key} is {value}")
    if problems:
        raise DataError(
            [
                Problem(
                    "JOB_MODEL__ID",
                    f"{folder} has a config.json that does not describe a model: {', '.join(problems[:5])}",
                )
            ]
        )


def _numbers(config: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, float]]:
    """All numbers in it, by dotted key."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{at}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{at}{key}", value


def _cleaned(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without steering keys, at any depth, and with every rate of dropout at zero."""
    cleaned: dict[str, Any] = {}
    for key, value in config.items():
        if key in _STEERING or (key.startswith("_") and key.endswith(("_implementation", "_internal", "_autoset"))):
            continue
        if isinstance(value, dict):
            cleaned[key] = _cleaned(value)
        elif isinstance(value, float) and any(word in key for word in _RANDOM):
            cleaned[key] = 0.0
        else:
            cleaned[key] = value
    return cleaned


def silence(config: Any) -> None:
    """Sets every rate of dropout in a configuration to zero: classes have their own defaults.

    Not a router's noise: Phi-MoE chooses experts by that number when it evaluates, too (see `base.load_base`).
    """
    for part in [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]:
        for name, value in vars(part).items() if part is not None else ():
            if isinstance(value, float) and any(word in name for word in _RANDOM):
                setattr(part, name, 0.0)


def weights_held(folder: Path) -> int:
    """How many numbers the files of weights hold, by their headers.

    Raises:
        DataError: As `weight_files`, or one of them is cut or broken.
    """
    from safetensors import safe_open

    total = 0
    for path in weight_files(folder):
        with readable(folder), safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping
    return total


def build_empty(folder: Path, config: Any) -> Any:
    """The model without weights, on the meta device: which layers it has, and how large they are.

    Raises:
        DataError: transformers cannot build it.
        SettingsError: transformers has no causal language model of its kind.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:  # noqa: SLF001 - from_config's own question
        what = f"holds a {config.model_type} model, for which transformers has no causal language model"
        raise SettingsError([Problem("JOB_MODEL__ID", f"{folder} {what}")])
    from transformers.initialization import no_init_weights

    with (
        readable(folder, "has a config.json from which no model can be built"),
        torch.device("meta"),
        no_init_weights(),
    ):
        empty = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
        empty.tie_weights()  # which is part of the initialization that was left out
    return empty


def _scaled_weights(folder: Path) -> list[str]:
    """Weights that are integers, or floating-point numbers of 8 bits and less: they mean something with scales only."""
    from safetensors import safe_open

    scaled = []
    for path in weight_files(folder):
        with readable(folder), safe_open(path, framework="pt") as file:
            kinds = {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118 - no mapping
        # GPT-2's files hold masks of bytes, which are no weights
        scaled += [
            f"{name} ({kind})"
            for name, kind in kinds.items()
            if kind.startswith(("F4", "F6", "F8")) or (name.endswith(".weight") and kind not in _PLAIN_NUMBERS)
        ]
    return scaled


def check_weights(folder: Path, config: Any, empty: Any) -> None:
    """Refuses files with far fewer weights than config.json describes: transformers would draw the rest at random.

    And weights that are quantized in a way that config.json does not say: transformers would leave out their scales.

    Raises:
        DataError: They are.
    """
    if not getattr(config, "quantization_config", None) and (scaled := _scaled_weights(folder)):
        message = (
            f"holds {len(scaled)} quantized weights, such as {scaled[0]}, but its config.json does not "
            "say how they are quantized"
        )
        raise DataError([Problem("JOB_MODEL__ID", f"{folder} {message}; give the original, unquantized model")])
    packed = _PACKED_WEIGHTS if getattr(config, "quantization_config", None) else 1
    described = sum(parameter.numel() for parameter in empty.parameters())
    if described > 2 * packed * (held := weights_held(folder)):
        message = f"has a config.json that describes {described:,} weights, and its files hold {held:,}"
        raise DataError([Problem("JOB_MODEL__ID", f"{folder} {message}")])
