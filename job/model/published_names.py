"""The names of an adapter's tensors in the class that readers load, which may not be the class that is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from job import log
from job.errors import Problem, SettingsError
from job.model.files import SOURCE_CONFIG, read_config, readable
from job.model.target_modules import excluded, text_part
from job.model.tensor_names import PREFIX, saved_tensors, tensor_files
from job.model.whole_modules import refuse_renamed


@dataclass(frozen=True)
class PublishedNames:
    """The class that the base's config.json names, and what its modules are called that an adapter is on.

    transformers loads the text part of some multimodal checkpoints (Qwen3.5, Llama 4) as a separate class. The class
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
        return f"{PREFIX}{self.theirs}{name.removeprefix(PREFIX + self.ours)}"

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
        SettingsError: PEFT would not load the same adapter into that class.
    """
    base = model.get_base_model()
    adapted = [name for name, module in base.named_modules() if hasattr(module, "lora_A")]
    names, reader = _published_class(model, adapted, folder, quantized=quantized)
    published = [names.published(PREFIX + name).removeprefix(PREFIX) for name in adapted]
    whole = [name for name in saved_tensors(model) if ".lora_" not in name]
    files = tensor_files(base if reader is None else reader, published, whole)
    # In another class these modules are elsewhere, and only layers with an adapter are compared with it.
    refuse_renamed(whole if reader is not None else [n for n in whole if files[n] is None], names.architecture)
    if lost := [name for name, file in files.items() if file is None]:
        what = f"PEFT could not load the adapter of {lost[0]} into {names.architecture}: it renames the tensors"
        raise SettingsError([Problem("JOB_LORA__TARGET_MODULES", what)])
    return replace(names, files={name: file for name, file in files.items() if file is not None and file != name})


def _published_class(
    model: Any, adapted: Sequence[str], folder: Path, *, quantized: bool
) -> tuple[PublishedNames, Any]:
    """The names, and the class that config.json names without weights; None where it is the one that was loaded."""
    import torch
    from transformers import AutoModelForImageTextToText

    base = model.get_base_model()
    text_names = PublishedNames(type(base).__name__)
    kept = quantized and (folder / SOURCE_CONFIG).is_file()
    if not kept and text_names.architecture in (base.config.architectures or []):
        return text_names, None
    config = read_config(folder, SOURCE_CONFIG if kept else "config.json")
    classes = AutoModelForImageTextToText._model_mapping  # noqa: SLF001 - from_config's own question
    published = classes[type(config)].__name__ if type(config) in classes else None
    if published in {None, text_names.architecture} or published not in (config.architectures or []):
        return text_names, None
    with readable(folder), torch.device("meta"):
        multimodal = AutoModelForImageTextToText.from_config(
            config, attn_implementation="eager", trust_remote_code=False
        )
    theirs = {
        name: _shape(module) for name, module in multimodal.named_modules() if name.startswith(text_part(multimodal))
    }
    for ours, prefix in _prefixes(adapted[0], theirs):
        renamed = {prefix + name.removeprefix(ours): base.get_submodule(name) for name in adapted}
        if all(theirs.get(name) == _shape(module) for name, module in renamed.items()):
            targets = model.peft_config["default"].target_modules
            return PublishedNames(published, ours, prefix, excluded(multimodal, targets) is not None), multimodal
    log.get_logger().warning(
        "the adapter names its modules differently from the class of the base",
        named=text_names.architecture,
        base=published,
    )
    return text_names, None


def _shape(module: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, adapted or not, quantized or not."""
    shape = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return None if None in shape else shape  # type: ignore[return-value]


def _prefixes(name: str, published_names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """What to take from the front of a module's name, and what to put there, to get one of the others' names."""
    parts = name.split(".")
    for taken in range(len(parts)):
        rest = ".".join(parts[taken:])
        ours = name.removesuffix(rest)
        yield from ((ours, other.removesuffix(rest)) for other in published_names if f".{other}".endswith(f".{rest}"))
