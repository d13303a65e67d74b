"""Names of an adapter's tensors in its file, so that PEFT loads each into its module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
"""What PEFT puts before the name of every tensor."""


def tensor_files(model: Any, layers: Iterable[str], whole_modules: Iterable[str] = ()) -> dict[str, str | None]:
    """The name that each tensor of an adapter must have in the file, for PEFT to load it into its module.

    PEFT applies the renamings by which transformers loads a base's checkpoint to the adapter's tensors as well, and
    ignores what has no place in the model afterwards. So a tensor has to bear its module's name, or the name that the
    checkpoint has for it.

    Args:
        model: The base as readers load it, without an adapter; it may be on the meta device.
        layers: Full names of the modules that an adapter is on.
        whole_modules: Names of further tensors, with PEFT's prefix.

    Returns:
        The name of each tensor in the loaded model, as PEFT's files have it -> in the file; None where neither arrives.
    """
    names = [f"{PREFIX}{layer}.lora_{matrix}.weight" for layer in layers for matrix in "AB"] + list(whole_modules)
    files = {name: name for name in names}
    if lost := set(names) - _arriving(model, files):
        files |= {name: PREFIX + _as_in_checkpoint(model, name.removeprefix(PREFIX)) for name in lost}
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

    renamings = [
        conversion for conversion in get_model_conversion_mapping(model) if isinstance(conversion, WeightRenaming)
    ]
    renamed: str = rename_source_key(name, [r.reverse_transform() for r in reversed(renamings)], [], reverse=True)[0]
    return renamed


def saved_tensors(model: Any) -> dict[str, torch.Tensor]:
    """What PEFT saves of a PEFT model, by its names in the file. The tensors share the parameters' memory."""
    from peft import get_peft_model_state_dict

    # Not "auto": PEFT would ask the hub whether the base has another vocabulary than this one.
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return tensors
