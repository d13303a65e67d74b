"""The LoRA adapter: added to a base, switched off temporarily, saved and loaded in PEFT's layout."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from job import log
from job.errors import DataError, Problem, SettingsError
from job.model.adapter_options import PLAIN, AdapterOptions, check_options, in_group
from job.model.decomposed_init import decompose
from job.model.files import read_config, readable

SOURCE_CONFIG = "source_config.json"
"""The base's own config.json, beside the one that the quantized base was saved with, which may be of another class."""
_PEFT = "base_model.model."
"""What PEFT puts before the name of every tensor."""
CONFIG_KEYS = {
    *("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha", "lora_dropout", "peft_type"),
    *("r", "revision", "target_modules", "task_type", "use_dora", "use_rslora"),
}
"""Keys of adapter_config.json that are always written: tools that read it without PEFT have no defaults for them."""
TOKENIZER_FILES = (
    *("added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "*.model"),
)
"""Names of files that make a tokenizer. All are of kinds that the quantized cache keeps beside the weights: a restart
publishes the same ones."""


def add_adapter(
    model: Any,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    target_modules: Sequence[str] | str | None,
    seed: int,
    options: AdapterOptions = PLAIN,
) -> Any:
    """Adds a new LoRA adapter in fp32 to the base; its initial weights depend only on the seed.

    The adapter stays in fp32 whatever the base's dtype: rounding would make a resumed run differ from an uninterrupted
    one.

    Args:
        model: transformers' causal language model. Of a multimodal model, the text part is adapted.
        rank: Rank r of the update.
        alpha: The update is multiplied by alpha / rank.
        dropout: Of the adapter's input.
        target_modules: As `resolve_targets` takes them.
        seed: Of the initial weights.
        options: What else PEFT's configuration may say.

    Raises:
        SettingsError: The model lacks one of them, or PEFT cannot adapt it.
    """
    import torch
    from peft import AdaLoraConfig, LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    targets = resolve_targets(model, target_modules)
    check_adapter(model, targets, rank, options)
    layers = linear_layers(model)
    adapted_kinds = {type(layers[name]) for name in _named(layers, targets)}
    torch.manual_seed(seed)
    # Half of the ranks of a decomposition are frozen; alpha grows with them, so the scale is that of the trained half.
    times = 2 if options.decomposed else 1
    how: dict[str, Any] = {
        "lora_alpha": times * alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(targets),
        "exclude_modules": _excluded(model, targets),
        "bias": "none",
        "fan_in_fan_out": adapted_kinds == {Conv1D},  # whose weight is (inputs, outputs)
        "task_type": "CAUSAL_LM",
        "layers_to_transform": None if options.layers is None else list(options.layers),
    }
    if options.adalora is not None:
        chosen = {"deltaT": options.adalora.delta_t, **asdict(options.adalora)}
        del chosen["delta_t"]
        config: LoraConfig = AdaLoraConfig(**how, **chosen)
    else:
        config = LoraConfig(
            r=times * rank,
            use_rslora=options.use_rslora,
            use_dora=options.use_dora,
            init_lora_weights=_OWN_INIT.get(options.init, True),
            rank_pattern={key: times * value for key, value in options.rank_pattern.items()},
            alpha_pattern={key: times * value for key, value in options.alpha_pattern.items()},
            **how,
        )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:  # of layers that it knows it would break
        what = f"PEFT cannot adapt {', '.join(targets)}: {(str(error).splitlines() or [''])[0][:300]}"
        raise SettingsError([Problem("JOB_LORA__TARGET_MODULES", what)]) from error
    # The weights have their first values now; who loads the adapter shall not compute others first, or change the base.
    config.init_lora_weights = True
    for parameter in trainable(adapted).values():
        parameter.data = parameter.data.to(torch.float32)
    if options.decomposed and model.device.type != "meta":
        decompose(adapted, options.init)
    return adapted


_OWN_INIT = {"gaussian": "gaussian", "orthogonal": "orthogonal"}
"""Initializations that PEFT makes without changing the base."""


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
    found = set()
    for name in inside:
        *_, holder, leaf = ("", *name.split("."))
        if not leaf.isdigit() and not _is_refused(model, leaf):
            found.add(f"{holder}.{leaf}" if leaf in outside else leaf)  # GPT-2 calls two layers c_proj
    if not found:
        has = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers})) or "none"
        what = f"{type(model).__name__} has no linear layers in modules of the kind {targets}; name them, of {has}"
        raise SettingsError([Problem("JOB_LORA__TARGET_MODULES", what)])
    return sorted(found)


def _around(name: str) -> list[str]:
    """Names of the modules around a module, innermost first, without the model itself."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _named(names: Iterable[str], targets: Sequence[str]) -> list[str]:
    """Those of the full names that PEFT takes the targets to mean."""
    return [name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)]


def check_adapter(model: Any, targets: Sequence[str], rank: int, options: AdapterOptions) -> None:
    """Refuses what this model cannot have; works on a model without weights, too.

    Raises:
        SettingsError: With all problems.
    """
    check_targets(model, targets)
    if options == PLAIN:
        return
    config = model.config.get_text_config(decoder=True)
    adapted = _named(linear_layers(model), targets)
    if options.layers is not None:
        adapted = [name for name in adapted if _layer_of(name) in options.layers]
    problems = list(check_options(options, rank=rank, layers=config.num_hidden_layers, adapted=adapted))
    if problems:
        raise SettingsError(problems)
    if options.init == "orthogonal" and any(_packed(model.get_submodule(name)) for name in adapted):
        what = "orthogonal needs a base in floating point; set JOB_MODEL__QUANTIZATION=none or take another"
        raise SettingsError([Problem("JOB_LORA__INIT", what)])


def _layer_of(name: str) -> int | None:
    """The number of the decoder's layer that a module is in; as PEFT, the first number in its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _packed(layer: Any) -> bool:
    """Whether a layer's weight is no floating-point tensor."""
    return not layer.weight.is_floating_point()


def count_parameters(
    model: Any, *, rank: int, target_modules: Sequence[str] | str | None, options: AdapterOptions
) -> int:
    """Numbers in an adapter for a model without weights, which it is added to; of a decomposition with its frozen half.

    Raises:
        SettingsError: As `add_adapter`.
    """
    made = add_adapter(
        model, rank=rank, alpha=rank, dropout=0.0, target_modules=target_modules, seed=0, options=options
    )
    # AdaLoRA's ranknum is a constant; on the meta device PEFT forgets to say so.
    return sum(parameter.numel() for name, parameter in trainable(made).items() if ".ranknum." not in name)


def linear_layers(model: Any) -> dict[str, Any]:
    """The linear layers of the model's text part that an adapter can go on, by full name.

    Not the head, whose weights the loss takes as they are. GPT-2's `Conv1D` is a linear layer by another name.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head, text = model.get_output_embeddings(), _text_part(model)
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
        found = functional_call(module, parameters, torch.empty(1, 2, module.in_features, device="meta"))
    except Exception:  # noqa: BLE001 - of a stranger's class, that takes something else
        return False
    return isinstance(found, torch.Tensor) and found.shape == (1, 2, module.out_features)


def linear_weights(model: Any) -> list[Any]:
    """The weights that are quantized where a base is: those of all linear layers but the head."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head]


def find_targets(model: Any) -> list[str]:
    """The layers that get an adapter where none are named: all linear ones of the text part (PEFT's `all-linear`).

    Of Llama's family they are the seven of the reference recipe. Left out is what PEFT refuses to adapt, since the
    model's code uses its weights without calling it, what PEFT could not load again (`tensor_files`), and what bears
    the head's name (BLT has a second model within, with a head of its own).

    Raises:
        SettingsError: There are none.
    """
    layers = linear_layers(model)
    head = model.get_output_embeddings()
    of_head = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if module is head}
    names = sorted({name.rsplit(".", 1)[-1] for name in layers} - of_head - _lost(model, layers))
    if not (found := [name for name in names if not name.isdigit() and not _is_refused(model, name)]):
        what = f"no linear layers were found in {type(model).__name__}; name them"
        raise SettingsError([Problem("JOB_LORA__TARGET_MODULES", what)])
    return found


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
        what = f"the model has no linear {', '.join(missing)}; it has {has}"
        raise SettingsError([Problem("JOB_LORA__TARGET_MODULES", what)])
    named = {name for name in layers if any(name == target or name.endswith(f".{target}") for target in targets)}
    if lost := sorted(_lost(model, named)):
        what = f"PEFT would not load the adapter of {', '.join(lost)} again: it renames the tensors; leave them out"
        raise SettingsError([Problem("JOB_LORA__TARGET_MODULES", what)])


def _lost(model: Any, layers: Iterable[str]) -> set[str]:
    """The last parts of the names of those layers whose adapter PEFT could not load again under any name."""
    lost = {name.rpartition(".lora_")[0] for name, file in tensor_files(model, layers).items() if file is None}
    return {name.rsplit(".", 1)[-1] for name in lost}


def tensor_files(model: Any, layers: Iterable[str]) -> dict[str, str | None]:
    """Under which name each tensor of an adapter has to lie in the file, for PEFT to load it where it belongs.

    PEFT applies the renamings by which transformers loads a base's checkpoint to the adapter's tensors as well, and
    ignores what has no place in the model afterwards. So a tensor has to bear its module's name, or the name that the
    checkpoint has for it, whichever of them arrives.

    Args:
        model: The base as readers load it, without an adapter; it may be on the meta device.
        layers: Full names of the modules that an adapter is on.

    Returns:
        The name of each tensor in the loaded model, as PEFT's files have it -> in the file; None where neither arrives.
    """
    names = [f"{_PEFT}{layer}.lora_{matrix}.weight" for layer in layers for matrix in "AB"]
    files = {name: name for name in names}
    if lost := set(names) - _arriving(model, files):
        files |= {name: _PEFT + _as_in_checkpoint(model, name.removeprefix(_PEFT)) for name in lost}
    arriving = _arriving(model, files) if lost else files.keys()
    return {name: files[name] if name in arriving else None for name in names}


def _arriving(model: Any, files: Mapping[str, str]) -> set[str]:
    """The names of those tensors that PEFT loads into the module of that name, given the names in the file."""
    import torch
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    numbers = {name: number for number, name in enumerate(files)}  # in place of the tensors' contents
    tensors = {file: torch.tensor(numbers[name], device="cpu") for name, file in files.items()}
    loaded = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), tensors)
    return {name for name, number in numbers.items() if name in loaded and int(loaded[name]) == number}


def _as_in_checkpoint(model: Any, name: str) -> str:
    """A tensor's name by the renamings with which transformers would save the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [found for found in get_model_conversion_mapping(model) if isinstance(found, WeightRenaming)]
    renamed: str = rename_source_key(name, [r.reverse_transform() for r in reversed(renamings)], [], reverse=True)[0]
    return renamed


def _is_refused(model: Any, name: str) -> bool:
    """Whether PEFT would not adapt a layer of this name in this model."""
    from peft import LoraConfig
    from peft.tuners import tuners_utils

    try:
        tuners_utils._check_lora_target_modules_mamba(LoraConfig(), model, name)  # noqa: SLF001 - the only list there is
    except ValueError:
        return True
    return False


def _text_part(model: Any) -> str:
    """What the names of the text part's modules begin with; nothing where the model is text throughout."""
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    others = getattr(model.config, "sub_configs", None) or {}
    return f"{name}." if name and others else ""


def _excluded(model: Any, targets: Sequence[str]) -> str | None:
    """A pattern of the modules that bear a target's name and are no linear layer of the text part; None without such.

    Those outside of the text part are excluded as a whole.
    """
    layers, text = linear_layers(model), _text_part(model)
    bears = tuple(f".{target}" for target in targets)
    others = [name for name, _ in model.named_modules() if name.endswith(bears) and name not in layers]
    patterns = [re.escape(name) for name in others if name.startswith(text)]
    if len(patterns) < len(others):
        patterns.append(rf"(?!{re.escape(text)}).*")
    return "|".join(patterns) or None


def trainable(model: Any) -> dict[str, Any]:
    """The adapter's parameters by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Context manager: switches the adapter off, so that the model computes its base, with the same loaded weights."""
    with model.disable_adapter():
        yield


@dataclass(frozen=True)
class PublishedNames:
    """The class that the base's config.json names, and what its modules are called that an adapter is on.

    transformers loads the text part of some multimodal checkpoints (Qwen3.5, Llama 4) as a class of its own. The class
    that readers load by config.json has that part under another name, and PEFT ignores tensors of unknown names.
    """

    architecture: str
    ours: str = ""
    """What the names of adapted modules begin with in the loaded model; ends in a dot, or is empty."""
    theirs: str = ""
    """What takes its place in the published class."""
    ambiguous: bool = False
    """Whether modules that are not adapted bear the names of adapted ones in that class."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors in that class -> in the file, where they differ; see `tensor_files`."""

    def published(self, name: str) -> str:
        """Name of an adapter's tensor in the class that readers load, from that in the loaded model."""
        return f"{_PEFT}{self.theirs}{name.removeprefix(_PEFT + self.ours)}"

    def filed(self, name: str) -> str:
        """Name of an adapter's tensor in the file, from that in the loaded model."""
        published = self.published(name)
        return self.files.get(published, published)


def find_published_names(model: Any, folder: Path, *, quantized: bool = False) -> PublishedNames:
    """Compares the loaded model with the class that config.json names, which is built without weights.

    Args:
        model: The adapted model.
        folder: The base's files.
        quantized: Whether the folder is of the quantized cache, where SOURCE_CONFIG is the source's config.json.

    Raises:
        DataError: config.json is missing or invalid.
        SettingsError: PEFT would not load the adapter into that class as it was trained.
    """
    base = model.get_base_model()
    adapted = [name for name, module in base.named_modules() if hasattr(module, "lora_A")]
    names, reader = _published_class(model, adapted, folder, quantized=quantized)
    published = [names.published(_PEFT + name).removeprefix(_PEFT) for name in adapted]
    files = tensor_files(base if reader is None else reader, published)
    if lost := [name for name, file in files.items() if file is None]:
        what = f"PEFT would not load the adapter of {lost[0]} into {names.architecture}: it renames the tensors"
        raise SettingsError([Problem("JOB_LORA__TARGET_MODULES", what)])
    return replace(names, files={name: file for name, file in files.items() if file is not None and file != name})


def _published_class(
    model: Any, adapted: Sequence[str], folder: Path, *, quantized: bool
) -> tuple[PublishedNames, Any]:
    """The names, and the class that config.json names without weights; None where it is the one that was loaded."""
    import torch
    from transformers import AutoModelForImageTextToText

    base = model.get_base_model()
    own = PublishedNames(type(base).__name__)
    kept = quantized and (folder / SOURCE_CONFIG).is_file()
    if not kept and own.architecture in (base.config.architectures or []):
        return own, None
    config = read_config(folder, SOURCE_CONFIG if kept else "config.json")
    classes = AutoModelForImageTextToText._model_mapping  # noqa: SLF001 - from_config's own question
    published = classes[type(config)].__name__ if type(config) in classes else None
    if published in {None, own.architecture} or published not in (config.architectures or []):
        return own, None
    with readable(folder), torch.device("meta"):
        other = AutoModelForImageTextToText.from_config(config, attn_implementation="eager", trust_remote_code=False)
    theirs = {name: _shape(module) for name, module in other.named_modules() if name.startswith(_text_part(other))}
    for ours, prefix in _prefixes(adapted[0], theirs):
        renamed = {prefix + name.removeprefix(ours): base.get_submodule(name) for name in adapted}
        if all(theirs.get(name) == _shape(module) for name, module in renamed.items()):
            targets = model.peft_config["default"].target_modules
            return PublishedNames(published, ours, prefix, _excluded(other, targets) is not None), other
    log.get_logger().warning(
        "the adapter's names are not those of the base's class", named=own.architecture, base=published
    )
    return own, None


def _shape(module: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, adapted or not, quantized or not."""
    found = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return None if None in found else found  # type: ignore[return-value]


def _prefixes(name: str, others: Iterable[str]) -> Iterator[tuple[str, str]]:
    """What to take from the front of a module's name, and what to put there, to get one of the others' names."""
    parts = name.split(".")
    for taken in range(len(parts)):
        rest = ".".join(parts[taken:])
        ours = name.removesuffix(rest)
        yield from ((ours, other.removesuffix(rest)) for other in others if f".{other}".endswith(f".{rest}"))


def save_adapter(
    model: Any, folder: Path, *, base: str, revision: str | None, names: PublishedNames | None = None
) -> None:
    """Writes the adapter in PEFT's layout; `PeftModel.from_pretrained(base, folder)` loads it, in PEFT 0.13 too.

    PEFT's model card, an empty template, is left out: the job writes its own after the evaluation.

    Args:
        model: The adapted model.
        folder: Is made where it does not exist.
        base: By what name the base can be had; no path of this machine.
        revision: Commit of the base, where `base` is a hub id.
        names: Of the tensors in the file; None for those of the loaded model.
    """
    from safetensors.torch import load_file, save_file

    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base, revision
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    written = portable_config(json.loads(path.read_text(encoding="utf-8")))
    names = names or PublishedNames("")
    saved = load_file(weights)
    if names.ambiguous or written.pop("exclude_modules", None):
        # By full name, so that no other layer of that name is meant, which older PEFT has no other way to say.
        published = [names.published(name).removeprefix(_PEFT) for name in saved]
        written["target_modules"] = sorted({name.rpartition(".lora_")[0] for name in published})
    if (tensors := {names.filed(name): tensor for name, tensor in saved.items()}).keys() != saved.keys():
        save_file(tensors, weights, metadata={"format": "pt"})
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def portable_config(written: Mapping[str, Any]) -> dict[str, Any]:
    """What readers need of an adapter_config.json: `CONFIG_KEYS`, and all else that is not as PEFT has it by default.

    PEFT writes all its fields, and older releases refuse fields that they do not know. So fields with default values
    are left out.
    """
    from peft import LoraConfig

    usual = json.loads(json.dumps(LoraConfig().to_dict(), default=list))
    kept = {key: value for key, value in written.items() if key in CONFIG_KEYS or value != usual.get(key)}
    kept.pop("peft_version", None)  # no field of a configuration before PEFT 0.18; the manifest has it
    if isinstance(targets := kept["target_modules"], list):
        kept["target_modules"] = sorted(targets)  # PEFT keeps a set, in another order every time
    return kept


def copy_tokenizer(base: Path, folder: Path, tokenizer: Any) -> None:
    """Copies the tokenizer's files of the base, byte for byte.

    transformers would save the tokenizer in the format of its own release, for example with the class
    `TokenizersBackend`, which older releases refuse. It does so where the vocabulary is in none of these files: those
    bases are old, and not cached.

    Args:
        base: Folder of the base; that of a quantized one has the same files as its source.
        folder: Is made where it does not exist.
        tokenizer: What was loaded from the base.

    Raises:
        DataError: As `tokenizer_files`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = tokenizer_files(base)
    for path in files:
        shutil.copyfile(path, folder / path.name)
    if not any(path.name in {"tokenizer.json", "vocab.json"} or path.suffix == ".model" for path in files):
        tokenizer.save_pretrained(folder)


def tokenizer_files(base: Path) -> list[Path]:
    """The files of a base's folder that make its tokenizer, as far as they exist.

    Raises:
        DataError: One of them is a link to something outside of the folder: it would be published with the adapter.
    """
    found = sorted({path for kind in TOKENIZER_FILES for path in base.glob(kind) if path.is_file()})
    if outside := [path for path in found if not _belongs(path.resolve(), base.resolve())]:
        what = "is a link out of its folder, and would be published with the adapter; put the file itself there"
        raise DataError([Problem("JOB_MODEL__ID", f"{path} {what}") for path in outside])
    return found


def _belongs(file: Path, base: Path) -> bool:
    """Whether a file lies in the base's folder, or is a blob of the hub's cache, to which its folders link."""
    blobs = file.parent
    return file.is_relative_to(base) or (blobs.name == "blobs" and blobs.parent.name.startswith("models--"))


def load_adapter(model: Any, folder: Path, names: PublishedNames | None = None) -> None:
    """Puts saved adapter weights into the model, bit by bit; a missing or unexpected tensor is an error.

    `names` are those that it was saved by.
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    names = names or PublishedNames("")
    state = load_file(folder / "adapter_model.safetensors", device="cpu")
    if model.peft_config["default"].peft_type == "ADALORA":
        _take_ranks_away(
            model, json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["rank_pattern"]
        )
    # Not "auto": PEFT would ask the hub whether the base has another vocabulary than this one.
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    files = {names.filed(name): tensor for name, tensor in expected.items()}
    wrong = sorted(
        files.keys() ^ state.keys() | {k for k in files.keys() & state.keys() if files[k].shape != state[k].shape}
    )
    if wrong:
        raise ValueError(f"the adapter in {folder} is not of this model: {', '.join(wrong[:5])}")
    # Not by PEFT's set_peft_model_state_dict, which renames tensors and ignores those that then have no place. What
    # `expected` holds shares the parameters' memory, so that this writes into the model.
    with torch.no_grad():
        for name, tensor in files.items():
            tensor.copy_(state[name])


def _take_ranks_away(model: Any, pattern: Mapping[str, list[bool]]) -> None:
    """Gives AdaLoRA's layers the ranks of a saved adapter: by the name of `lora_E`, which are left.

    PEFT makes the parameters anew for that, in the dtype of the base.
    """
    import torch

    parameters = dict(model.base_model.model.named_parameters())
    whole = {name: kept for name, kept in pattern.items() if parameters[f"{name}.default"].shape[0] == len(kept)}
    model.base_model.resize_modules_by_rank_pattern(whole, "default")
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(torch.float32)
    model.peft_config["default"].rank_pattern = dict(pattern)
